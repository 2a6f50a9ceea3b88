"""Models whose layers choose the positions that they see: what is read, refused, and kept together."""

import json
import re

import numpy as np
import pytest

from mpillama.errors import UserError
from mpillama.loading.model_file import open_model
from mpillama.loading.shares import by_positions, divide, repeats_cache
from mpillama.models.cache import cache_bytes
from mpillama.models.config import MTP, ModelConfig
from mpillama.models.partition import Division
from mpillama.models.shapes import shape_config
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


def test_the_layer_that_drafts_chooses_by_itself():
    kinds = ["full", "full", "shared", "shared", "shared"]
    assert with_indexer(read("glm_moe_dsa", indexer_types=kinds)) == "FFSSS"
    assert with_indexer(read("glm_moe_dsa", indexer_types=kinds, **{MTP: True})) == "F"


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
