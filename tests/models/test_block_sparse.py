"""Attention to blocks that an index chooses: which are read, which are not, and what is refused."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mpillama.errors import UserError
from mpillama.loading import plan
from mpillama.loading.model_file import ModelFile, open_model
from mpillama.loading.shares import by_positions
from mpillama.models.cache import KVCache, single_sequence_step
from mpillama.models.config import ModelConfig
from mpillama.models.decoder import Decoder
from mpillama.models.partition import Division
from mpillama.models.shapes import SHAPES
from tests import golden_models as g
from tests import running
from tests.conftest import THREADS

FAMILY, BLOCK, CHOSEN = "minimax_m3", 64, 2
TOKENS, TABLE = 264, np.array([3, 0, 4, 1, 2])
SPARSE = 1
"""The first layer with an index."""


def settings() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((g.FOLDER / FAMILY / "config.json").read_text())
    return found


def changed(folder: Path, **changes: Any) -> ModelFile:
    """The golden model with another configuration."""
    (folder / "config.json").write_text(json.dumps({**settings(), **changes}))
    (folder / "model.safetensors").symlink_to(g.FOLDER / FAMILY / "model.safetensors")
    return open_model(str(folder), "f32")


@cache
def model() -> Decoder:
    return running.load_file(open_model(str(g.FOLDER / FAMILY), "f32"), THREADS)


def test_few_positions_are_all_seen_with_the_bits_of_full_attention(tmp_path):
    """Beside others of the same step that must choose, as if they were alone."""
    full = running.load_file(changed(tmp_path, index_topk_blocks=5), THREADS)
    ids = g.golden(FAMILY)[0]
    expected, found = (running.all_logits(each, [ids]) for each in (full, model()))
    assert np.array_equal(found[: CHOSEN * BLOCK], expected[: CHOSEN * BLOCK])
    assert (np.abs(found - expected).max(axis=1)[3 * BLOCK :] > 1e-3 * np.abs(expected).max()).all()


@pytest.mark.parametrize("size", [7, 64, 100])
def test_chunks_leave_the_bits_alone(size):
    ids = g.golden(FAMILY)[0]
    for kv_type in ("f16", "f32"):
        whole, cut = (running.all_logits(model(), chunks, kv_type) for chunks in ([ids], running.cut(ids, size)))
        assert np.array_equal(whole, cut)


def after_prompt() -> KVCache:
    """The cache of all but the last token."""
    kept = running.new_cache(model(), len(TABLE), "f32")
    model().forward(single_sequence_step(g.golden(FAMILY)[0][:-1], 0, TABLE, 1), kept)
    return kept


def last_token(kept: KVCache) -> np.ndarray:
    """The logits of the last token, which is in the fifth block."""
    found: np.ndarray = model().forward(single_sequence_step(g.golden(FAMILY)[0][-1:], TOKENS - 1, TABLE, 1), kept)
    return found


def blocks_read(kept: KVCache, head: int) -> Iterator[int]:
    """The blocks before its own that the last token reads of a KV head: those that make all of it NaN."""
    for block, place in enumerate(TABLE[:-1]):
        keys, _, values, *_ = kept.layers[SPARSE]
        before = [array[place, head].copy() for array in (keys, values)]
        keys[place, head] = values[place, head] = np.nan
        found = np.isnan(last_token(kept))
        assert found.all() or not found.any()
        if found.all():
            yield block
        keys[place, head], values[place, head] = before


def test_only_what_is_chosen_is_read():
    """One block of four for each KV head, since the other one is its own; not the same of all."""
    kept = after_prompt()
    expected = last_token(kept)
    read = [list(blocks_read(kept, head)) for head in range(7)]
    assert all(len(blocks) == CHOSEN - 1 for blocks in read)
    assert len({tuple(blocks) for blocks in read}) > 1
    assert np.array_equal(last_token(kept), expected)


def test_of_equal_blocks_the_first_is_chosen():
    kept = after_prompt()
    keys = kept.layers[SPARSE][-1]
    keys[TABLE[1:-1]] = keys[TABLE[0]]
    assert list(blocks_read(kept, 2)) == [0]
    keys[TABLE[0]] = np.nan  # no match at all
    assert list(blocks_read(kept, 2)) == [1]


def test_a_folder_as_it_is_published_gives_the_same_bits(tmp_path, caplog):
    """Under its own names, within a model that also sees, beside a layer that drafts tokens."""
    inner = settings()
    for key in [key for key in inner if key.startswith(("index_", "layer_types", "mlp_layer_types"))]:
        inner.pop(key)
    inner |= {
        "hidden_act": "swigluoai", "moe_layer_freq": [0, 1, 1], "use_gemma_norm": True, "qk_norm_type": "per_head",
        "n_shared_experts": 1, "scoring_func": "sigmoid", "use_routing_bias": True, "num_mtp_modules": 1,
        "sparse_attention_config": {
            "use_sparse_attention": True, "sparse_num_index_heads": 7, "sparse_index_dim": 10, "sparse_init_block": 0,
            "sparse_block_size": BLOCK, "sparse_topk_blocks": CHOSEN, "sparse_local_block": 1,
            "sparse_score_type": "max", "sparse_disable_index_value": [0, 1, 1], "sparse_attention_freq": [0, 1, 1],
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "minimax_m3_vl", "text_config": inner}))
    experts = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    tensors = dict.fromkeys(("vision_tower.x.weight", "patch_merge_mlp.linear_1.weight"), np.ones((2, 3), np.float32))
    for name, tensor in g.family_tensors(FAMILY).items():
        stored = tensor - 1 if name.endswith("norm.weight") else tensor
        sparse = not name.startswith("model.layers.0.")
        name = name.replace(".mlp.", ".block_sparse_moe.") if sparse else name
        if ".experts." in name:
            name = ".".join(experts.get(part, part) for part in name.split("."))
        name = name.replace("gate.e_score_correction_bias", "e_score_correction_bias")
        tensors[f"language_model.{name}"] = stored
    tensors["language_model.model.mtp.layers.0.enorm.weight"] = np.ones(32, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    found = running.load_file(open_model(str(tmp_path), "f32"), THREADS)
    ids = g.golden(FAMILY)[0]
    error = np.abs(running.all_logits(found, [ids]) - g.golden(FAMILY)[1]).max()
    assert error < 1e-5 * np.abs(g.golden(FAMILY)[1]).max()
    assert "2 tensors" in caplog.text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"index_n_heads": 1}, "index_n_heads=1"),
        ({"index_block_size": 48}, "index_block_size=48"),
        ({"index_block_size": 2048}, "index_block_size=2048"),
        ({"index_local_blocks": 3}, "index_local_blocks=3"),
        ({"index_head_dim": 4}, "index_head_dim=4"),
        ({"rotary_dim": 12}, "rotary_dim=12"),
        ({"layer_types": ["minimax_m3_sparse"] * 2 + ["sliding_attention"]}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"swiglu_beta": 0.5}, "swiglu_beta=0.5"),
        ({"attention_output_gate": True}, "attention_output_gate=True"),
        ({"qk_norm_type": "per_layer"}, "qk_norm_type='per_layer'"),
        ({"n_shared_experts": 2}, "n_shared_experts=2"),
        ({"sparse_attention_config": {"sparse_init_block": 1}}, "sparse_init_block=1"),
        ({"sparse_attention_config": {"sparse_score_type": "mean"}}, "sparse_score_type='mean'"),
        ({"sparse_attention_config": {"sparse_window": 3}}, "sparse_window=3"),
        ({"sparse_attention_config": [1]}, "sparse_attention_config"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named):
        ModelConfig.from_hf({**settings(), **changes})


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings()))
    kept = {name: tensor for name, tensor in g.family_tensors(FAMILY).items() if "2.self_attn.index_k_norm" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"2\.self_attn\.index_k_norm\.weight' is missing"):
        open_model(str(tmp_path))


def test_positions_are_not_divided_over_ranks():
    """Neither in a run nor by what a plan advises, though every rank has the same index keys."""
    config = ModelConfig.from_hf(SHAPES["minimax-m3"])
    with pytest.raises(UserError, match=r"--context-parallel: this model.s layers choose .*: leave it out"):
        by_positions(Division(8), config)
    request = plan.PlanRequest(
        config, config.quantised_to(plan.SMALLEST), nodes=8, ranks_per_node=1, memory_per_node=2**36, max_seq_len=65536,
        batch=1, kv_type="f16",
    )  # fmt: skip
    assert not plan.make_plan(request).repeats_cache
