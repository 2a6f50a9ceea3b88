"""Turn a checkpoint folder in Hugging Face's form into the demo's model file."""

import json
from pathlib import Path

from safetensors.numpy import load_file

from mpillama.formats.native.writer import write_model
from mpillama.quant.types.q8_0 import Q8_0


def export(checkpoint: Path, path: Path) -> None:
    """Write config.json, model.safetensors, tokenizer and chat template of `checkpoint` as a q8_0 model file."""
    tensors = load_file(checkpoint / "model.safetensors")
    tokenizer_config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    texts = {
        "tokenizer.json": (checkpoint / "tokenizer.json").read_bytes(),
        "generation_config.json": (checkpoint / "generation_config.json").read_bytes(),
        "tokenizer_config.json": (checkpoint / "tokenizer_config.json").read_bytes(),
        "chat_template.jinja": tokenizer_config["chat_template"].encode(),
    }
    config = json.loads((checkpoint / "config.json").read_text())
    write_model(str(path), config, Q8_0, tensors.__getitem__, texts)
