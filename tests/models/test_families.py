"""Families are files: nothing else names them, each is tested, and layers of different kinds run in one model."""

import ast
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpillama
from mpillama.comm.communicator import Communicator
from mpillama.errors import UserError
from mpillama.formats.native.writer import pack_tensor
from mpillama.loading.model_file import open_model
from mpillama.models import families
from mpillama.models.config import ModelConfig
from mpillama.models.decoder import Decoder
from mpillama.models.families import FAMILIES, gguf_architectures
from mpillama.models.family import Block
from mpillama.models.mlp import Experts
from mpillama.models.router import Router
from mpillama.models.tensors import TensorSpec, WeightTypes
from mpillama.models.weights import load_weights
from mpillama.quant.types.f32 import F32
from tests import golden_models, running
from tests.conftest import THREADS
from tests.referee import cases

PACKAGE = Path(mpillama.__file__).parent
OWN = Path(families.__file__).parent
SAME_WORDS = {"text": "kinds of tokenizers", "api": "kinds of tool calls", "openai": "kinds of tool calls"}
"""Where families' names are names of something else."""


def words(path: Path) -> Iterator[str]:
    """The texts of a module's code, without its docstrings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_only_its_own_file_names_a_family():
    names = {*FAMILIES, *gguf_architectures()}
    modules = [path for path in PACKAGE.rglob("*.py") if OWN not in path.parents and path.name != "shapes.py"]
    found = {
        str(path.relative_to(PACKAGE)): names & set(words(path))
        for path in modules
        if path.relative_to(PACKAGE).parts[0] not in SAME_WORDS
    }
    assert not {path: named for path, named in found.items() if named}
    assert len(modules) > 50


def test_a_family_is_called_as_its_file():
    assert {path.stem for path in OWN.glob("*.py")} - {"__init__"} == set(FAMILIES)


def test_each_family_has_a_golden_model_and_digests():
    folders = (golden_models.FOLDER / name for name in golden_models.FAMILIES)
    assert {json.loads((folder / "config.json").read_text())["model_type"] for folder in folders} == set(FAMILIES)
    with_digests = [*cases.FAMILIES.values(), *cases.LATER_FAMILIES.values()]
    assert {config["model_type"] for config in with_digests} == set(FAMILIES)


def test_layers_may_be_of_different_kinds():
    """A mixture of one expert, and of more channels that are all zeros, is the MLP that it is made of."""
    file = open_model(str(golden_models.FOLDER / "llama"), "f32")
    plain = running.load_file(file, THREADS)
    first, second = file.config.blocks
    width = second.mlp.intermediate_size
    experts = Experts(2 * width, router=Router(1, 1, renormalise=True))
    mixed = replace(file.config, blocks=(first, Block(second.attention, experts)))
    assert len(mixed.splits) == len(file.config.splits) + 1
    tensors = dict(golden_models.family_tensors("llama"))
    for part in ("gate", "up", "down"):
        own = tensors[f"model.layers.1.mlp.{part}_proj.weight"]
        wide = np.zeros((2 * width, own.shape[1]) if part != "down" else (own.shape[0], 2 * width), np.float32)
        wide[: own.shape[0], : own.shape[1]] = own
        tensors[f"model.layers.1.mlp.experts.0.{part}_proj.weight"] = wide
    tensors["model.layers.1.mlp.gate.weight"] = np.ones((1, mixed.hidden_size), np.float32)
    ids = golden_models.golden("llama")[0]
    expected = running.all_logits(plain, [ids])
    np.testing.assert_allclose(running.all_logits(made(mixed, tensors), [ids]), expected, atol=1e-5)


def made(config: ModelConfig, tensors: golden_models.Tensors) -> Decoder:
    def fill(spec: TensorSpec, units: range, arrays: Sequence[np.ndarray]) -> None:
        for number, name in enumerate(spec.source_names):
            for array, values in zip(arrays, pack_tensor(spec, tensors[name]), strict=True):
                (array[number] if spec.experts else array)[...] = values

    weights = load_weights(config, config.tensors(WeightTypes(F32)), config.partition(1)[0], fill)
    assert weights.bytes_per_step() == weights.bytes - (0 if config.tie_word_embeddings else weights.embed_tokens.bytes)
    return Decoder(config, weights, Communicator.alone(), running.team(THREADS))


def changed(family: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads((golden_models.FOLDER / family / "config.json").read_text()), **changes}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("olmo2", {"clip_qkv": 8.0}),
        ("olmo2", {"sliding_window": 64}),
        ("olmo2", {"hidden_act": "relu"}),
        ("granite", {"attention_multiplier": -1.0}),
        ("granite", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
        ("smollm3", {"no_rope_layers": [1, 0]}),
        ("smollm3", {"no_rope_layers": [1, 2, 1, 1]}),
        ("smollm3", {"partial_rotary_factor": 0.5}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.5}}),
        ("phi3", {"attention_bias": True}),
        ("gemma2", {"hidden_activation": "gelu"}),
        ("gemma2", {"use_bidirectional_attention": True}),
        ("gemma2", {"query_pre_attn_scalar": 0}),
        ("gemma3", {"layer_types": ["sliding_attention"] * 3 + ["chunked_attention"]}),
        ("gemma3", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "mrope_section": [1, 2]}}),
        ("ministral3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta": 3.0}}),
        ("ministral", {"mlp_bias": True}),
        ("llama4", {"layer_types": ["chunked_attention", "sliding_attention"] * 2}),
        ("llama4", {"moe_layers": [1, 4]}),
        ("llama4", {"no_rope_layers": [1, 1, 1]}),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention", "sliding_attention"]}),
        ("qwen3_next", {"linear_conv_kernel_dim": 3}),
        ("qwen3_next", {"linear_num_value_heads": 15}),
        ("qwen3_next", {"attention_bias": True}),
        ("qwen3_next", {"hidden_act": "gelu"}),
        ("qwen3_next", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]}}),
        ("qwen3_5", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.5}}),
        ("qwen3_5_moe", {"norm_topk_prob": False}),
        ("qwen3_5_moe", {"mlp_only_layers": [1]}),
    ],
)
def test_what_nobody_reads_or_knows_is_refused_by_name(family, changes):
    key = next(iter(changes))
    named = [key, *(changes[key] if isinstance(changes[key], dict) else [])]
    with pytest.raises(UserError) as caught:
        ModelConfig.from_hf(changed(family, **changes))
    assert any(name in str(caught.value) for name in named)


def test_windows_of_experts_are_those_of_all_layers():
    """Whatever max_window_layers says, as in transformers."""
    windows = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 48}
    config = ModelConfig.from_hf(changed("qwen3_moe", **windows))
    assert {block.attention.window for block in config.blocks} == {6}
