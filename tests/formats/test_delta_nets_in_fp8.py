"""Qwen3-Next and Qwen3.5 in FP8 as they are published: blocks of 128 x 128, and some modules left in bfloat16."""

import json
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from mpillama.loading.model_file import ModelFile, open_model
from mpillama.models.partition import Partition
from mpillama.models.tensors import TensorSpec
from mpillama.models.weights import slice_shapes
from tests import golden_models, running
from tests.models.test_golden import by_expert
from tests.quantised_checkpoints import delta_net_in_fp8, delta_net_tensors, write_values

THREADS = 2
FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
TOKENS = np.random.default_rng(3).integers(2, 200, 70)
BFLOAT16 = ("embed_tokens", "lm_head", "in_proj_a.", "in_proj_b.")
FLOAT32 = ("mlp.gate.", "shared_expert_gate")


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """A golden model's sizes: no head divides a block, queries, keys and values share some."""
    found: dict[str, Any] = json.loads((golden_models.FOLDER / family / "config.json").read_text())
    return {**found, **changes}


def with_usual_heads(family: str) -> dict[str, Any]:
    """Heads as wide as those of the real models, so that o_proj and out_proj are divided by whole groups."""
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    return config_of(family, **heads, head_dim=256, linear_key_head_dim=128, linear_value_head_dim=128, hidden_size=160)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_tensors_are_called_as_transformers_calls_them(family):
    with (golden_models.FOLDER / family / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    expected = delta_net_tensors(config_of(family))
    assert {name: shape for name, shape in found.items() if ".experts." not in name} == {
        name: shape for name, shape in expected.items() if ".experts." not in name
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [config_of, with_usual_heads])
def test_values_and_logits_are_those_of_the_format(config, family, tmp_path):
    """The values on any number of ranks; the logits that they give in float32, the same experts, any chunks."""
    made, plain_config = delta_net_in_fp8(tmp_path / "fp8", config(family))
    model, plain = open_model(str(made.folder)), open_model(str(write_values(tmp_path / "f32", made, plain_config)))
    check_types(model, usual=config is with_usual_heads)
    with closing(model.reader(lambda count: None)) as reader, closing(plain.reader(lambda count: None)) as plain_reader:
        for part in (part for size in (1, 2, 3) for part in model.config.partition(size)):
            for spec, expected in zip(model.specs, plain.specs, strict=True):
                values, exact = numbers(reader, spec, part), numbers(plain_reader, expected, part)
                assert np.all(np.abs(values - exact) <= np.abs(exact) * 2.0**-22), spec.name
    loaded, reference = (running.load_file(file, THREADS) for file in (model, plain))
    found, exact = running.all_logits(loaded, [TOKENS]), running.all_logits(reference, [TOKENS])
    assert np.abs(found - exact).max() <= 1e-4 * np.abs(exact).max()
    for size in (1, 7):
        assert np.array_equal(running.all_logits(loaded, running.cut(TOKENS, size)), found)
    if family != "qwen3_5":
        chosen, wanted = (running.chosen_experts(one, TOKENS) for one in (loaded, reference))
        assert np.array_equal(chosen, wanted)


def check_types(model: ModelFile, usual: bool) -> None:
    for spec in (spec for spec in model.specs if not spec.vector):
        kind = "bf16" if any(part in spec.name for part in BFLOAT16) else "fp8"
        if any(part in spec.name for part in FLOAT32) or (not usual and ("o_proj" in spec.name or "out_" in spec.name)):
            kind = "f32"
        assert spec.weight_type.name == kind, spec.name


def numbers(reader: Any, spec: TensorSpec, part: Partition) -> np.ndarray:
    """A rank's slice in float32."""
    arrays = [np.full(shape, 77, dtype) for dtype, shape in slice_shapes(spec, part)]
    reader.read(spec, spec.units_of(part), arrays)
    if spec.vector:
        return arrays[0]
    parts = by_expert(arrays, spec) or [arrays]
    return np.concatenate([spec.weight_type.unpack(part) if part[0].size else np.zeros((0, 0)) for part in parts])
