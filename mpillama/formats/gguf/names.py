"""GGUF's names of tensors in Hugging Face's."""

import re
from collections.abc import Iterator
from dataclasses import replace

from mpillama.formats.checkpoint import StoredTensor
from mpillama.formats.foreign import split_experts
from mpillama.models.family import Gguf

ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"
IGNORED = "attn_rot_embd"
"""Rotary frequencies in old files, which follow from the metadata."""

OUTER = {EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", OUTPUT: "lm_head.weight"}
EXPERTS = {
    "ffn_gate_exps": ("gate_proj",),
    "ffn_up_exps": ("up_proj",),
    "ffn_down_exps": ("down_proj",),
    "ffn_gate_up_exps": ("gate_proj", "up_proj"),
}
ROTATED = ("attn_q", "attn_k")
"""What may stand in rotary pairs."""


def canonical(path: str, tensor: StoredTensor, gguf: Gguf, head_dim: int) -> Iterator[StoredTensor]:
    """The tensor under Hugging Face's name, stacked experts one by one; an unknown name stays as it is."""
    layer = re.fullmatch(r"blk\.([0-9]{1,6})\.(\w+)(?:\.([0-9]{1,6}))?\.(weight|bias)", tensor.name, re.ASCII)
    if layer is None:
        yield replace(tensor, name=OUTER.get(tensor.name, tensor.name))
        return
    prefix, kind, expert, ending = f"model.layers.{int(layer[1])}.", layer[2], layer[3], layer[4]
    if kind in EXPERTS and not expert and ending == "weight":
        yield from split_experts(path, prefix + "mlp.experts.", tensor, EXPERTS[kind])
    elif expert and kind in ("ffn_gate", "ffn_up", "ffn_down"):
        name = f"{prefix}mlp.experts.{int(expert)}.{kind.removeprefix('ffn_')}_proj.{ending}"
        yield replace(tensor, name=name)
    elif kind in gguf.names and not expert:
        pairs = head_dim if gguf.rotary_pairs and kind in ROTATED else 0
        yield replace(tensor, name=f"{prefix}{gguf.names[kind]}.{ending}", interleaved=pairs)
    elif kind != IGNORED:
        yield tensor
