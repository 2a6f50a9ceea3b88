"""Every field of transformers' configuration classes that changes the numbers is read, or refused by its name.

tests/golden/config_fields.json has the fields and their defaults (tests/golden/make_golden.py). Each is changed in the
golden configuration of its family: the model must be another one, or none.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from mpillama.errors import UserError
from mpillama.models.config import ModelConfig
from tests import golden_models

FIELDS: dict[str, dict[str, Any]] = json.loads((golden_models.FOLDER / "config_fields.json").read_text())
OF_TRAINING = {
    *("initializer_range", "attention_dropout", "resid_pdrop", "embd_pdrop", "residual_dropout", "router_jitter_noise"),
    *("output_router_logits", "router_aux_loss_coef", "use_cache", "pretraining_tp"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "num_nextn_predict_layers"),
}
"""What leaves the logits alone."""
WITHOUT_EFFECT = {
    ("deepseek_v3", "num_key_value_heads"): "every head has keys and values of its own",
    ("deepseek_v3", "qk_head_dim"): "the class computes it",
    ("deepseek_v3", "head_dim"): "the class computes it",
    **{
        (name, key): "as in deepseek_v3"
        for name in ("deepseek_v32", "glm_moe_dsa")
        for key in ("num_key_value_heads", "qk_head_dim", "head_dim")
    },
    ("hy_v3", "enable_moe_fp32_combine"): "all is added in float32 here",
    ("qwen3_moe", "intermediate_size"): "that of dense layers, which are refused",
    ("qwen3_next", "intermediate_size"): "that of dense layers, which are refused",
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "layer_types": None, "max_window_layers": 1}
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    **{(name, key): WINDOWS for name in ("qwen2", "qwen3") for key in WINDOWS},
    **{(name, key): WINDOWS for name in ("qwen3_moe", "smollm3") for key in WINDOWS if key != "max_window_layers"},
    ("gemma3_text", "_sliding_window_pattern"): {"layer_types": None},
    **{(name, "first_k_dense_replace"): {"mlp_layer_types": None} for name in ("deepseek_v32", "glm_moe_dsa")},
    ("llama4_text", "interleave_moe_layer_step"): {"moe_layers": None},
    ("llama4_text", "no_rope_layer_interval"): {"no_rope_layers": None},
    ("smollm3", "no_rope_layer_interval"): {"no_rope_layers": None},
    ("phi3", "original_max_position_embeddings"): {
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "long_factor": 6 * [2.0],
            "short_factor": 6 * [1.0],
        },
    },
}  # fmt: skip
"""What a field has an effect with only."""
NAMED_BY = {
    "num_hidden_layers": ("layers",), "num_attention_heads": ("heads", "channels"), "n_routed_experts": ("experts",),
    "linear_num_key_heads": ("key heads",), "rope_parameters": ("RoPE",),
    "_sliding_window_pattern": ("sliding_window_pattern",),
}  # fmt: skip
"""The words by which a field is named that another one contradicts."""


def golden_configs() -> dict[str, dict[str, Any]]:
    """The first golden model of each type."""
    found: dict[str, dict[str, Any]] = {}
    for name in golden_models.FAMILIES:
        config = json.loads((Path(golden_models.FOLDER) / name / "config.json").read_text())
        found.setdefault(config["model_type"], config)
    return found


CONFIGS = golden_configs()
CASES = [
    (name, key)
    for name, fields in FIELDS.items()
    for key in fields
    if key not in OF_TRAINING and (name, key) not in WITHOUT_EFFECT
]


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return 1.5 * value or 0.5
    if isinstance(value, list):
        return ["other", *value[1:]] if value and isinstance(value[0], str) else [*value[1:], 0]
    if isinstance(value, dict):
        return {**value, "rope_type": "linear", "factor": 3.25}
    return "other" if isinstance(value, str) else 3


def test_every_family_has_its_fields():
    assert set(FIELDS) == set(CONFIGS) - {"kimi_k2"}  # which has DeepSeek's class
    assert set(WITHOUT_EFFECT) | set(BESIDE) <= {(name, key) for name, fields in FIELDS.items() for key in fields} | {
        ("qwen3_moe", "layer_types")
    }


@pytest.mark.parametrize(("name", "key"), CASES)
def test_a_field_is_read_or_refused(name, key):
    given = {**CONFIGS[name], **BESIDE.get((name, key), {})}
    spelled = "sliding_window_pattern" if key == "_sliding_window_pattern" else key
    value = given.get(spelled) if given.get(spelled) is not None else FIELDS[name][key]
    before, refusal = ModelConfig.from_hf(given), ""
    try:
        after = ModelConfig.from_hf({**given, spelled: changed(value)})
    except UserError as error:
        refusal, after = str(error), None
    assert after != before
    assert after or any(word in refusal for word in (spelled, *NAMED_BY.get(key, ()))), refusal
