"""GGUF's names of tensors in Hugging Face's."""

import re
from collections.abc import Iterator
from dataclasses import replace

from mpillama.files.checkpoint import StoredTensor
from mpillama.files.foreign import split_experts

ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"
IGNORED = "attn_rot_embd"
"""Rotary frequencies in old files, which follow from the metadata."""

OUTER = {EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", OUTPUT: "lm_head.weight"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EXPERTS = {
    "ffn_gate_exps": ("gate_proj",),
    "ffn_up_exps": ("up_proj",),
    "ffn_down_exps": ("down_proj",),
    "ffn_gate_up_exps": ("gate_proj", "up_proj"),
}
ROTATED = ("attn_q", "attn_k")
"""What stands in rotary pairs in files of architecture llama."""


def canonical(path: str, tensor: StoredTensor, rotary_pairs: int) -> Iterator[StoredTensor]:
    """The tensor under Hugging Face's name, stacked experts one by one; an unknown name stays as it is.

    `rotary_pairs` is head_dim where the architecture's queries and keys stand in rotary pairs, else 0.
    """
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
    elif kind in INNER and not expert:
        pairs = rotary_pairs if kind in ROTATED else 0
        yield replace(tensor, name=f"{prefix}{INNER[kind]}.{ending}", interleaved=pairs)
    elif kind != IGNORED:
        yield tensor
