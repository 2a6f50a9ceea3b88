"""Configurations of the families with routers of DeepSeek V3's kind: what is read, and what is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mpillama.errors import UserError
from mpillama.loading.model_file import open_model
from mpillama.models.config import ModelConfig
from mpillama.models.mlp import Experts
from mpillama.models.router import Router
from mpillama.models.shapes import SHAPES
from mpillama.models.tensors import WeightTypes
from mpillama.quant.types.f32 import F32
from tests import golden_models as g
from tests import running
from tests.conftest import THREADS


def read(family: str, **options) -> ModelConfig:
    config = json.loads((g.FOLDER / family / "config.json").read_text())
    return ModelConfig.from_hf({**config, **options})


@pytest.mark.parametrize(
    ("family", "option", "value"),
    [
        ("glm4_moe", "hidden_act", "gelu"),
        ("glm4_moe", "mlp_bias", True),
        ("glm4_moe", "scoring_func", "softmax"),
        ("glm4_moe", "n_group", 3),
        ("glm4_moe", "n_group", 10),
        ("glm4_moe", "topk_group", 6),
        ("glm4_moe", "topk_group", 1),
        ("glm4_moe", "num_experts_per_tok", 11),
        ("glm4_moe", "mlp_layer_types", ["dense", "sparse"]),
        ("hy_v3", "mlp_layer_types", ["dense", "sparse", "other"]),
        ("hy_v3", "attention_bias", True),
        ("hy_v3", "route_norm", False),
        ("hy_v3", "qk_norm", False),
        ("hy_v3", "moe_router_use_sigmoid", False),
        ("minimax_m2", "scoring_func", "softmax"),
        ("minimax_m2", "use_qk_norm", False),
        ("minimax_m2", "qk_norm_type", "per_head"),
        ("minimax_m2", "use_routing_bias", False),
        ("minimax_m2", "shared_intermediate_size", 64),
        ("minimax_m2", "rotary_dim", 256),
        ("gpt_oss", "hidden_act", "gelu"),
        ("gpt_oss", "scoring_func", "sigmoid"),
        ("gpt_oss", "swiglu_limit", 0),
        ("gpt_oss", "layer_types", ["full_attention", "chunked_attention", "full_attention"]),
    ],
)
def test_a_variant_that_nobody_runs_is_refused_by_name(family, option, value):
    without = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} if option == "rotary_dim" else {}
    with pytest.raises(UserError, match=option):
        read(family, **without, **{option: value})


def test_layers_are_dense_before_those_with_experts():
    config = ModelConfig.from_hf(SHAPES["glm-4.6"])
    assert [isinstance(block.mlp, Experts) for block in config.blocks] == [False] * 3 + [True] * 89
    config = read("hy_v3", mlp_layer_types=["sparse", "dense", "sparse"])
    assert [isinstance(block.mlp, Experts) for block in config.blocks] == [True, False, True]


def test_routers_are_as_published():
    names = ("glm-4.6", "minimax-m2", "hy3", "gpt-oss-120b")
    routers = {name: ModelConfig.from_hf(SHAPES[name]).blocks[-1].mlp.router for name in names}
    sigmoids = {"chosen": 8, "scores": "sigmoid", "renormalise": True, "correction": True}
    assert routers == {
        "glm-4.6": Router(160, epsilon=1e-20, scaling=2.5, **sigmoids),
        "minimax-m2": Router(256, **sigmoids),
        "hy3": Router(192, epsilon=1e-20, scaling=2.826, **sigmoids),
        "gpt-oss-120b": Router(128, 4, scores="logits", renormalise=True, bias=True),
    }


def test_the_channels_that_rope_turns():
    """As a share of a head, or as published files of MiniMax give them."""
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    configs = [ModelConfig.from_hf(SHAPES["glm-4.6"]), ModelConfig.from_hf(SHAPES["minimax-m2"])]
    configs += [read("minimax_m2", **plain), read("minimax_m2", **plain, rotary_dim=None)]
    assert [config.blocks[0].attention.rotary_channels for config in configs] == [64, 64, 8, 12]


def test_windows_of_every_other_layer():
    """Also where the configuration leaves the kinds of layers and YaRN's constants out."""
    config = ModelConfig.from_hf(SHAPES["gpt-oss-20b"])
    assert [block.attention.window for block in config.blocks[:4]] == [128, 0, 128, 0]
    plain = {key: value for key, value in SHAPES["gpt-oss-20b"].items() if key not in ("rope_scaling", "swiglu_limit")}
    assert ModelConfig.from_hf(plain) == config


# -- gpt-oss as it is published: experts in MXFP4 ---------------------------------------------------------------------

E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def write_gpt_oss(folder: Path, as_published: bool) -> None:
    """A gpt-oss of whole blocks of 32: experts in blocks and scales, or their values as transformers has them."""
    config = json.loads((g.FOLDER / "gpt_oss" / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "layer_types": None}
    rng, tensors = np.random.default_rng(9), {}
    for spec in ModelConfig.from_hf(config).tensors(WeightTypes(F32)):
        if ".experts." not in spec.name:
            scale = 0.2 if len(spec.source_shape) > 1 else 1.0
            values = (scale * rng.standard_normal(spec.source_shape)).astype(np.float32)
            tensors[spec.name.replace(".mlp.gate.", ".mlp.router.")] = values
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        for name, rows, columns in (("gate_up_proj", 192, 64), ("down_proj", 64, 96)):
            blocks = rng.integers(0, 256, (9, rows, columns // 32, 16), np.uint8)
            scales = rng.integers(122, 126, (9, rows, columns // 32), np.uint8)
            tensors[f"{prefix}{name}_bias"] = rng.standard_normal((9, rows)).astype(np.float32)
            if as_published:
                tensors |= {f"{prefix}{name}_blocks": blocks, f"{prefix}{name}_scales": scales}
            else:
                codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(9, rows, columns // 32, 32)
                values = E2M1[codes] * np.exp2(scales[..., None].astype(np.float32) - 127)
                turned = values.reshape(9, rows, columns).swapaxes(1, 2)
                tensors[prefix + name] = np.ascontiguousarray(turned, np.float32)
    folder.mkdir()
    published = {"quantization_config": {"quant_method": "mxfp4"}} if as_published else {}
    (folder / "config.json").write_text(json.dumps({**config, **published}))
    save_file(tensors, folder / "model.safetensors")


def test_experts_in_blocks_have_the_values_of_those_in_floats(tmp_path):
    """Bit for bit as float32; and as they are stored the file's own numbers are kept."""
    ids = g.golden("gpt_oss")[0]
    for name, as_published in (("blocks", True), ("floats", False)):
        write_gpt_oss(tmp_path / name, as_published)
    found, expected = (
        running.all_logits(running.load_file(open_model(str(tmp_path / name), "f32"), THREADS), [ids])
        for name in ("blocks", "floats")
    )
    assert np.array_equal(found, expected)
    kept = open_model(str(tmp_path / "blocks"))
    assert {kept.weight_types.of(s.name).name for s in kept.specs if s.experts and not s.vector} == {"mxfp4"}
    near = running.all_logits(running.load_file(kept, THREADS), [ids])
    # A token whose router hesitates may choose otherwise by activations in int8.
    assert np.median(np.abs(near - expected)) < 0.01 * np.abs(expected).max()
