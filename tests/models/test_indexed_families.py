"""Models whose layers choose the positions that they see: what is read, refused, and kept together."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mpillama.errors import UserError
from mpillama.formats.gguf.config import Metadata, hugging_face_config
from mpillama.formats.gguf.header import read_gguf_header
from mpillama.loading.model_file import open_model
from mpillama.loading.shares import by_positions, divide, repeats_cache
from mpillama.models.cache import cache_bytes
from mpillama.models.config import MTP, ModelConfig
from mpillama.models.partition import Division
from mpillama.models.shapes import shape_config
from mpillama.models.workspace import scratch_bytes, workspace_bytes
from mpillama.quant.types.f32 import F32
from tests import golden_models as g
from tests import running
from tests.conftest import THREADS
from tests.quantised_checkpoints import SCHEMES, Written, write_values

IN_FP8 = re.compile(r"\.(\w+_proj|kv_a_proj_with_mqa|wq_b|wk)\.weight")
LEFT_ALONE = re.compile(r"weights_proj|index_[qk]_proj")


def read(family: str, **options) -> ModelConfig:
    config = json.loads((g.FOLDER / family / "config.json").read_text())
    return ModelConfig.from_hf({**config, **options})


def with_indexer(config: ModelConfig) -> str:
    return "".join("S" if block.attention.follows else "F" for block in config.blocks)


@pytest.mark.parametrize(
    ("family", "option", "value"),
    [
        ("deepseek_v32", "q_lora_rank", None),
        ("deepseek_v32", "rope_interleave", False),
        ("deepseek_v32", "indexer_rope_interleave", True),
        ("deepseek_v32", "indexer_types", ["full", "shared", "full"]),
        ("deepseek_v32", "index_topk_pattern", "FSF"),
        ("deepseek_v32", "index_topk_freq", 2),
        ("deepseek_v32", "index_head_dim", 6),
        ("deepseek_v32", "layer_types", ["full_attention"] * 3),
        ("deepseek_v32", "attention_bias", True),
        ("deepseek_v32", "scoring_func", "softmax"),
        ("glm_moe_dsa", "indexer_rope_interleave", False),
        ("glm_moe_dsa", "indexer_types", ["shared", *["full"] * 4]),
        ("glm_moe_dsa", "indexer_types", ["full"] * 4),
        ("glm_moe_dsa", "indexer_types", ["full"] * 6),
        ("glm_moe_dsa", "indexer_types", ["full", "half", *["full"] * 3]),
    ],
)
def test_a_variant_that_nobody_runs_is_refused_by_name(family, option, value):
    with pytest.raises(UserError, match=option):
        read(family, **{option: value})


def test_which_layers_choose_by_themselves():
    """Named one by one, by a pattern, or every so many, as in transformers."""
    assert with_indexer(read("glm_moe_dsa")) == "FFSSF"
    assert with_indexer(read("glm_moe_dsa", indexer_types=None, index_topk_pattern="FSSFS")) == "FSSFS"
    assert with_indexer(read("glm_moe_dsa", indexer_types=None, index_topk_freq=2)) == "FFSFS"
    later = read("glm_moe_dsa", indexer_types=None, index_topk_freq=4, index_skip_topk_offset=3)
    assert with_indexer(later) == "FFFSS"
    assert with_indexer(read("glm_moe_dsa", indexer_types=None, index_topk_freq=1)) == "FFFFF"
    drafting = {"num_nextn_predict_layers": 1, "indexer_types": ["full", *["shared"] * 4, "full"]}
    assert with_indexer(read("glm_moe_dsa", **drafting)) == "FSSSS"
    assert with_indexer(read("glm_moe_dsa", **drafting, **{MTP: True})) == "F"


def test_layers_that_share_a_choice_are_in_one_stage():
    config = read("glm_moe_dsa")
    assert config.most_stages == 3
    assert {own.start for stages in (2, 3) for own in config.layers_of_stages(stages)} <= {0, 1, 4}
    assert [len(own) for own in config.layers_of_stages(3)] == [1, 3, 1]
    with pytest.raises(UserError, match="--pipeline is 4"):
        divide(4, 4, None, config.most_stages)


def test_positions_of_such_models_are_not_divided_over_ranks():
    config = ModelConfig.from_hf(shape_config("deepseek-v3.2"))
    assert not repeats_cache(config, Division(4))
    with pytest.raises(UserError, match="indexer"):
        by_positions(Division(4), config)


@pytest.mark.parametrize(("kv_type", "of_key"), [("f32", 4 * 128), ("f16", 2 * 128), ("q8", 2 * 128), ("q4", 2 * 128)])
def test_a_position_keeps_an_index_key_beside_its_latent(kv_type, of_key):
    """In float16, or in float32 as the latents."""
    plain, indexed = (ModelConfig.from_hf(shape_config(name)) for name in ("deepseek-r1", "deepseek-v3.2"))
    found, less = (cache_bytes(config, config.partition(1)[0], 1, kv_type) for config in (indexed, plain))
    assert found - less == 61 * 64 * of_key


@pytest.mark.parametrize(
    ("family", "option", "several", "most"),
    [("glm_moe_dsa", "index_topk", 1, 2**31 - 1), ("minimax_m3", "index_topk_blocks", 64, 2**36)],
)
def test_more_than_the_context_holds_is_never_chosen(family, option, several, most, tmp_path):
    """Nor is there room for it; the bits are those of choosing all."""
    known = read(family)
    whole, huge = (read(family, **{option: n}) for n in (-(-known.longest_context // several), most))
    assert huge == whole
    part = huge.partition(1)[0]
    assert workspace_bytes(huge, part, 64) < 2**24
    assert scratch_bytes(huge, part, 64, huge.longest_context, THREADS) < 2**24
    config = json.loads((g.FOLDER / family / "config.json").read_text())
    found = []
    for value in (len(g.golden(family)[0]), most):
        folder = tmp_path / str(value)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**config, option: value}))
        (folder / "model.safetensors").symlink_to(g.FOLDER / family / "model.safetensors")
        model = running.load_file(open_model(str(folder), "f32"), THREADS)
        found.append(running.all_logits(model, [g.golden(family)[0]]))
    assert np.array_equal(*found)


def test_what_an_indexer_works_with_is_planned():
    """Beside small latents, for each thread; and for each of 16 tokens a score of every position, in whole blocks."""
    config = read("glm_moe_dsa", index_n_heads=100, index_head_dim=500)
    part = config.partition(1)[0]
    (each, scores), (less, none) = (config.blocks[layer].attention.scratch(part, 40, 500, THREADS) for layer in (1, 2))
    # 112 rows of queries and weights, 64 keys, a row; 64 scores of 16 heads twice, 2048 counts.
    assert each == 4 * (112 * 512 + 112 + 64 * 512 + 512 + 2 * 64 * 16 + 2048) > less
    assert (scores, none) == (4 * 16 * 512, 0)


def test_the_layer_that_drafts_chooses_by_itself():
    """And has experts as the last layer, though the last one that chooses has none."""
    kinds = ["full", "full", "shared", "shared", "shared"]
    assert with_indexer(read("glm_moe_dsa", indexer_types=kinds)) == "FFSSS"
    drafting = read("glm_moe_dsa", indexer_types=kinds, **{MTP: True})
    assert with_indexer(drafting) == "F"
    assert drafting.blocks[0].mlp == read("glm_moe_dsa").blocks[-1].mlp != read("glm_moe_dsa").blocks[1].mlp


def of_gguf(path: Path, family: str, **changes) -> ModelConfig:
    """The configuration that a golden model's GGUF file gives with other keys of the indexer; None takes one out."""
    g.write_gguf(path, family, g.as_float32)
    header = read_gguf_header(str(path), 0)
    start = f"{g.ARCHITECTURES[read(family).model_type]}.attention.indexer."
    changed = {**header.metadata, **{start + key: value for key, value in changes.items()}}
    kept = {key: value for key, value in changed.items() if value is not None}
    metadata = Metadata(replace(header, metadata=kept), {})
    return ModelConfig.from_hf(hugging_face_config(metadata, [t.name for t in header.tensors], 272))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "FFSSF"),
        ({"types": ["full", "full", "full", "shared", "full"]}, "FFFSF"),
        ({"types": np.array([True, False, False, True, False])}, "FSSFS"),
        ({"types": np.array([1, 0, 1, 0, 0, 1], np.uint32)}, "FSFSS"),
        ({"types": None}, "FFFFF"),
        ({"types": None, "top_k_frequency": 2, "skip_top_k_offset": 2}, "FFSFS"),
        ({"types": None, "top_k_freq": 4, "skip_top_k_offset": 3, "share_for_mtp_iteration": True}, "FFFSS"),
    ],
)
def test_a_gguf_says_which_layers_choose_by_themselves(changes, expected, tmp_path):
    assert with_indexer(of_gguf(tmp_path / "model.gguf", "glm_moe_dsa", **changes)) == expected


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("glm_moe_dsa", {"types": ["full", "half", "shared", "shared", "full"]}, "indexer_types"),
        ("glm_moe_dsa", {"types": np.array([1, 2, 0, 0, 1], np.uint32)}, "indexer_types"),
        ("glm_moe_dsa", {"types": None, "top_k_frequency": "4"}, "index_topk_freq"),
        ("glm_moe_dsa", {"rope_interleave": False}, "indexer_rope_interleave"),
        ("glm_moe_dsa", {"kpool": 4}, r"indexer\.kpool=4"),
        ("deepseek_v32", {"types": np.array([1, 0, 0], np.uint32)}, "indexer_types"),
        ("deepseek_v32", {"types": np.array([0, 0, 0], np.uint32)}, "indexer_types"),
        ("deepseek_v32", {"top_k_frequency": 2}, "index_topk_freq"),
        ("deepseek_v32", {"kpool": 4}, r"indexer\.kpool=4"),
        ("minimax_m3", {"types": np.array([1, 1], np.uint32)}, r"indexer\.types"),
    ],
)
def test_a_gguf_whose_indexer_nobody_runs_is_refused_by_name(family, changes, named, tmp_path):
    with pytest.raises(UserError, match=named):
        of_gguf(tmp_path / "model.gguf", family, **changes)


def test_a_gguf_of_deepseek_may_say_that_all_layers_choose(tmp_path):
    found = of_gguf(tmp_path / "model.gguf", "deepseek_v32", types=["full"] * 3, top_k_frequency=1)
    assert with_indexer(found) == "FFF"


def test_indexers_of_layers_that_follow_another_are_left_out(tmp_path, caplog):
    """Published files of GLM 5.2 and later have one in each layer, and GGUF files do not say which layers share."""
    family, inner = "glm_moe_dsa", "model.layers.{}.self_attn.indexer."
    config = json.loads((g.FOLDER / family / "config.json").read_text())
    config = {key: value for key, value in config.items() if key != "indexer_types"}
    config |= {"index_topk_freq": 4, "index_skip_topk_offset": 3, "max_position_embeddings": 1 << 20}
    tensors = g.family_tensors(family)
    first = {name: tensor for name, tensor in tensors.items() if name.startswith(inner.format(1))}
    for layer in (2, 3, 4):
        tensors |= {name.replace("layers.1.", f"layers.{layer}."): tensor for name, tensor in first.items()}
    idle = tuple(inner.format(layer) for layer in (3, 4))
    for folder, kept in (("whole", tensors), ("usual", {n: t for n, t in tensors.items() if not n.startswith(idle)})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        save_file(kept, tmp_path / folder / "model.safetensors")
        for text in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(g.FOLDER / family / text, tmp_path / folder / text)
    with caplog.at_level("INFO", "mpillama"):
        files = [open_model(str(tmp_path / "whole"), "f32")]
    assert f"10 tensors of indexers of layers that see what another one has chosen ({idle[0]}" in caplog.text
    g.write_gguf(tmp_path / "model.gguf", str(tmp_path / "whole"), g.as_float32)
    files.append(open_model(str(tmp_path / "model.gguf"), "f32"))
    ids = g.golden(family)[0]
    usual = running.all_logits(running.load_file(open_model(str(tmp_path / "usual"), "f32"), THREADS), [ids])
    for file in files:
        assert with_indexer(file.config) == "FFFSS"
        assert np.array_equal(running.all_logits(running.load_file(file, THREADS), [ids]), usual)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "minimax_m3"])
def test_a_folder_in_fp8_gives_the_logits_of_its_values(family, tmp_path):
    """As it is published: with a scale for 128 x 128, but for what indexes have in float32; in any chunks."""
    made, rng, scheme = Written(tmp_path / "fp8"), np.random.default_rng(7), SCHEMES["fp8 blocks"]
    config = json.loads((g.FOLDER / family / "config.json").read_text())
    for name, tensor in g.family_tensors(family).items():
        if IN_FP8.search(name) and not LEFT_ALONE.search(name):
            arrays, made.values[name] = scheme.make(rng, tensor.shape, 0.2)
            made.arrays.update({name.removesuffix(".weight") + ending: array for ending, array in arrays.items()})
        else:
            made.arrays[name], made.values[name] = ("F32", tensor.astype(np.float32)), tensor
    made.write({**config, "quantization_config": scheme.config})
    plain = open_model(str(write_values(tmp_path / "f32", made, config)))
    file, ids = open_model(str(made.folder)), g.golden(family)[0]
    assert {spec.weight_type for spec in file.specs if LEFT_ALONE.search(spec.name)} == {F32}
    model = running.load_file(file, THREADS)
    found = running.all_logits(model, [ids])
    expected = running.all_logits(running.load_file(plain, THREADS), [ids])
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.array_equal(found, running.all_logits(model, running.cut(ids, 5)))
