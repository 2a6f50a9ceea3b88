"""Layers that draft tokens: their input against float64, the layer against a plain model of the family."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mpillama.errors import UserError
from mpillama.loading.model_file import open_model, open_mtp
from mpillama.models.cache import single_sequence_step
from mpillama.models.workspace import KEPT_ROWS, workspace_bytes
from tests import golden_models as g
from tests import mtp_models as m
from tests import running
from tests.conftest import THREADS

TOKENS = 40
FAMILIES = pytest.mark.parametrize("family", list(m.LAYERS))


def ids_of(family: str) -> np.ndarray:
    return np.random.default_rng(1).integers(5, m.settings(family)["vocab_size"], TOKENS)


def logits_of_layer(folder: Path, ids: np.ndarray, chunks: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The model's hidden states [tokens, hidden], a chunk at a time; its layer's logits after tokens 1, 2, …"""
    main = running.load_file(open_model(str(folder), "f32"), THREADS)
    layer = running.load_file(open_mtp(str(folder), "f32"), THREADS)
    layer.main = main
    table = np.arange(1)
    cache, own = running.new_cache(main, 1, "f32"), running.new_cache(layer, 1, "f32")
    hidden, logits, start = [], [], 0
    for count in chunks:
        main.forward(single_sequence_step(ids[start : start + count], start, table, 0), cache)
        hidden.append(main.hidden_states(0, count).copy())
        behind = ids[start + 1 : start + count + 1]
        layer.take(np.arange(len(behind)))
        logits.append(layer.forward(single_sequence_step(behind, start, table, len(behind)), own))
        start += count
    return np.concatenate(hidden), np.concatenate(logits)


def joint_inputs(family: str, ids: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """eh_proj (norm of the embedding of token t + 1, norm of h_t) in float64 [tokens - 1, hidden]."""
    tensors, (_, beside) = m.main_tensors(family), m.drafting_layer(family)
    eps, plus = m.settings(family)["rms_norm_eps"], 1.0 if family.startswith("qwen") else 0.0

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps) * (weight.astype(np.float64) + plus)

    embedded = tensors["model.embed_tokens.weight"].astype(np.float64)[ids[1:]]
    both = np.concatenate([norm(embedded, beside["enorm"]), norm(hidden[:-1], beside["hnorm"])], axis=1)
    return both @ beside["eh_proj"].astype(np.float64).T


@FAMILIES
def test_a_layer_predicts_what_its_definition_says(family, tmp_path):
    ids = ids_of(family)
    hidden, found = logits_of_layer(m.write_folder(tmp_path / "model", family), ids, [TOKENS])
    inputs = joint_inputs(family, ids, hidden)
    oracle = open_model(str(m.write_oracle(tmp_path / "oracle", family, inputs)), "f32")
    expected = running.all_logits(running.load_file(oracle, THREADS), [np.arange(TOKENS - 1)])
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@FAMILIES
def test_chunks_give_the_same_bits(family, tmp_path):
    folder, ids = m.write_folder(tmp_path / "model", family), ids_of(family)
    whole = logits_of_layer(folder, ids, [TOKENS])[1]
    assert np.array_equal(logits_of_layer(folder, ids, [1, 17, 2, 20])[1], whole)


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "glm_moe_dsa"])
def test_a_gguf_has_the_same_layer(family, tmp_path):
    file = m.write_gguf(tmp_path / "model.gguf", tmp_path / "folder", family)
    assert open_model(str(file)).config.num_hidden_layers == m.settings(family)["num_hidden_layers"]
    hidden, found = logits_of_layer(file, ids_of(family), [TOKENS])
    expected_hidden, expected = logits_of_layer(m.write_folder(tmp_path / "model", family), ids_of(family), [TOKENS])
    assert np.abs(hidden - expected_hidden).max() < 1e-5
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_guess_goes_on_from_the_layers_own_hidden_state(tmp_path):
    """h of a guess is the layer's output after its norm."""
    family = "glm4_moe"
    folder, ids = m.write_folder(tmp_path / "model", family), ids_of(family)
    main = running.load_file(open_model(str(folder), "f32"), THREADS)
    layer = running.load_file(open_mtp(str(folder), "f32"), THREADS)
    layer.main, table = main, np.arange(1)
    own = running.new_cache(layer, 1, "f32")
    main.forward(single_sequence_step(ids[:9], 0, table, 0), running.new_cache(main, 1, "f32"))
    layer.take(np.arange(9))
    layer.forward(single_sequence_step(ids[1:10], 0, table, 1), own)
    hidden = np.concatenate([main.hidden_states(0, 9), layer.hidden_states(8, 1)])
    layer.take(np.array([-9]))
    guess = layer.forward(single_sequence_step(ids[10:11], 9, table, 1), own)
    inputs = joint_inputs(family, ids[:11], np.concatenate([hidden, hidden[:1]]))
    oracle = open_model(str(m.write_oracle(tmp_path / "oracle", family, inputs)), "f32")
    expected = running.all_logits(running.load_file(oracle, THREADS), [np.arange(10)])[-1]
    assert np.abs(guess[0] - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_model_without_such_a_layer_is_refused():
    with pytest.raises(UserError, match="no layer that drafts tokens"):
        open_mtp(str(g.FOLDER / "llama"))


def test_steps_of_any_size_keep_no_more_memory_than_is_counted(tmp_path):
    """Neither the model nor its layer keeps arrays of its own for each number of rows."""
    folder = m.write_folder(tmp_path / "model", "glm4_moe")
    main = running.load_file(open_model(str(folder), "f32"), THREADS)
    layer = running.load_file(open_mtp(str(folder), "f32"), THREADS)
    layer.main, table = main, np.arange(2)
    cache, own = running.new_cache(main, 2, "f32"), running.new_cache(layer, 2, "f32")
    longest = KEPT_ROWS + 8
    tracemalloc.start()
    for count in range(1, longest + 1):
        step = single_sequence_step(np.full(count, 7), 0, table, count)
        main.forward(step, cache)
        layer.take(np.arange(count))
        layer.forward(step, own)
    only_arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    traces = tracemalloc.take_snapshot().filter_traces([only_arrays]).traces
    tracemalloc.stop()
    counted = sum(workspace_bytes(model.config, model.part, longest) for model in (main, layer))
    assert sum(trace.size for trace in traces) <= counted + 8192  # what steps say of their tokens
