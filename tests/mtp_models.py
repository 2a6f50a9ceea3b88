"""Golden models with a layer that drafts tokens: a layer of their own with other weights, under the makers' names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests import golden_models as g

LAYERS = {"glm4_moe": 2, "deepseek_v3": 2, "glm_moe_dsa": 4, "qwen3_5_moe": 1}
"""The layer of each that is like the one that drafts: with experts, and attention that keeps no state."""
Tensors = dict[str, np.ndarray]


def main_tensors(family: str) -> Tensors:
    """As they are stored, in float32."""
    data = (g.FOLDER / family / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    found = {}
    for name, info in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in info["data_offsets"])
            stored = np.frombuffer(data[begin:end], {"BF16": "<u2", "F32": "<u4"}[info["dtype"]]).astype(np.uint32)
            bits = stored << 16 if info["dtype"] == "BF16" else stored
            found[name] = bits.view(np.float32).reshape(info["shape"])
    return found


def drafting_layer(family: str) -> tuple[Tensors, Tensors]:
    """The decoder layer's tensors by their names within it, and those beside it in DeepSeek's names."""
    tensors, rng = main_tensors(family), np.random.default_rng(3)
    prefix = f"model.layers.{LAYERS[family]}."
    layer = {
        name.removeprefix(prefix): (tensor.astype(np.float32) * rng.uniform(0.8, 1.2, tensor.shape)).astype(
            tensor.dtype
        )
        for name, tensor in sorted(tensors.items())
        if name.startswith(prefix)
    }
    size = tensors["model.norm.weight"].shape[0]

    def random(*shape: int) -> np.ndarray:
        bits = rng.normal(0, 0.3, shape).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return bits.view(np.float32)  # values of bfloat16

    plain = np.float32(0 if family.startswith("qwen") else 1)  # Qwen's norms are stored less 1
    beside = {name: random(size) + plain for name in ("enorm", "hnorm", "shared_head.norm")}
    return layer, {**beside, "eh_proj": random(size, 2 * size)}


QWEN = {
    "enorm": "mtp.pre_fc_norm_embedding.weight",
    "hnorm": "mtp.pre_fc_norm_hidden.weight",
    "shared_head.norm": "mtp.norm.weight",
    "eh_proj": "mtp.fc.weight",
}


def write_folder(folder: Path, family: str) -> Path:
    """A Hugging Face folder of the model and its layer."""
    layer, beside = drafting_layer(family)
    config = settings(family)
    number = config["num_hidden_layers"]
    of_qwen = family.startswith("qwen")
    prefix = "mtp.layers.0." if of_qwen else f"model.layers.{number}."
    names = QWEN if of_qwen else {name: f"{prefix}{name}.weight" for name in beside}
    tensors = {
        **main_tensors(family),
        **{prefix + name: tensor for name, tensor in layer.items()},
        **{names[name]: tensor for name, tensor in beside.items()},
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    more = {"mtp_num_hidden_layers": 1} if of_qwen else {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    _copy_texts(folder, family)
    return folder


def _copy_texts(folder: Path, family: str) -> None:
    """The tokenizer, which the folders of golden models share."""
    for text in (g.FOLDER / family).glob("*.json"):
        if text.name != "config.json":
            (folder / text.name).write_bytes(text.read_bytes())


def write_oracle(folder: Path, family: str, inputs: np.ndarray) -> Path:
    """The layer as a plain model of the family, whose token t has row t of `inputs` [tokens, hidden] as embedding."""
    layer, beside = drafting_layer(family)
    tensors, config = main_tensors(family), settings(family)
    embedding = np.zeros(tensors["model.embed_tokens.weight"].shape, np.float32)
    embedding[: len(inputs)] = inputs
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    folder.mkdir(exist_ok=True)
    outer = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": beside["shared_head.norm"],
        "lm_head.weight": head,
    }
    of_layer = {f"model.layers.0.{name}": tensor for name, tensor in layer.items()}
    save_file({**of_layer, **outer}, folder / "model.safetensors")
    one: dict[str, Any] = {"num_hidden_layers": 1, "tie_word_embeddings": False}
    lists = ("layer_types", "mlp_layer_types", "indexer_types")
    one |= {key: config[key][LAYERS[family] :][:1] for key in lists if key in config}
    one |= {} if "layer_types" in config else {"first_k_dense_replace": 0}
    (folder / "config.json").write_text(json.dumps({**config, **one}))
    return folder


def settings(family: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((g.FOLDER / family / "config.json").read_text())
    return found


def write_gguf(path: Path, folder: Path, family: str) -> Path:
    """The same in GGUF, as llama.cpp's converter writes it: the layer is the last one, with its own tensors beside."""
    layer, beside = drafting_layer(family)
    config = settings(family)
    number = config["num_hidden_layers"]
    folder.mkdir(exist_ok=True)
    whole = {**main_tensors(family), **{f"model.layers.{number}.{name}": tensor for name, tensor in layer.items()}}
    save_file(whole, folder / "model.safetensors")
    more: dict[str, Any] = {"num_hidden_layers": number + 1, "num_nextn_predict_layers": 0}
    lists = ("layer_types", "mlp_layer_types", "indexer_types")
    more |= {key: [*config[key], config[key][LAYERS[family]]] for key in lists if key in config}
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    _copy_texts(folder, family)
    names = {"shared_head.norm": "shared_head_norm"}
    g.write_gguf(
        path, str(folder), g.as_float32, beside={names.get(name, name): tensor for name, tensor in beside.items()}
    )
    return path
