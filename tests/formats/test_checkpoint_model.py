"""Checkpoints that do not fit their configuration are refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mpillama.errors import UserError
from mpillama.loading.model_file import open_model
from tests import tiny_models as models

CONFIG = {**models.PLAIN, "tie_word_embeddings": False}


def write(folder: Path, changes: dict[str, np.ndarray | None], config: dict[str, Any]) -> str:
    tensors = {**models.random_tensors(CONFIG), **changes}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "config", "words"),
    [
        ({"model.norm.weight": None}, {}, ["'model.norm.weight'", "missing"]),
        ({"model.layers.0.self_attn.q_norm.weight": np.ones(4, np.float32)}, {}, ["q_norm", "not part of"]),
        ({"model.norm.weight": np.ones(4, np.float32)}, {}, ["model.norm.weight", "[4]", "[64]"]),
        ({}, {"num_hidden_layers": 3}, ["model.layers.2.", "missing"]),
        ({}, {"num_hidden_layers": 1}, ["model.layers.1.", "not part of"]),
        ({}, {"model_type": "gemma"}, ["model_type='gemma'"]),
        ({}, {"rope_scaling": {"rope_type": "proportional"}}, ["proportional"]),
        ({}, {"hidden_act": "gelu"}, ["gelu"]),
        ({}, {"quantization_config": {"quant_method": "aqlm"}}, ["aqlm"]),
        ({}, {"quantization_config": {"quant_method": "bitsandbytes"}}, ["bitsandbytes"]),
    ],
)
def test_what_does_not_fit(tmp_path, changes, config, words):
    with pytest.raises(UserError) as caught:
        open_model(write(tmp_path, changes, config))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_as_stored_keeps_each_tensors_type(tmp_path):
    half = models.random_tensors(CONFIG)["lm_head.weight"].astype(np.float16)
    types = open_model(write(tmp_path, {"lm_head.weight": half}, {})).weight_types
    assert types.of("lm_head.weight").name == "f16"
    assert types.of("model.layers.0.mlp.up_proj.weight").name == "f32"
