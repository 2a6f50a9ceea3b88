"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini of Microsoft: Llama with fused matrices, and RoPE for a part of each head."""

from dataclasses import replace

from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config_values import ConfigValues
from mpillama.models.family import GGUF_NAMES, Block, Family, Fused, Gguf, layer_count, layer_windows, no_such_biases
from mpillama.models.mlp import GatedMlp
from mpillama.models.rope import read_partial_rope, rotary_channels


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    attention, mlp = GroupedQueryAttention.read(values), GatedMlp.read(values)
    attention = replace(attention, turned=rotary_channels(values, attention.head_dim))
    windows = layer_windows(values, ["sliding_attention"] * layer_count(values))
    return tuple(Block(replace(attention, window=window), mlp) for window in windows)


def fused(values: ConfigValues) -> Fused:
    attention, inner = GroupedQueryAttention.read(values), values.size("intermediate_size")
    queries, keys = (heads * attention.head_dim for heads in (attention.heads, attention.kv_heads))
    return {
        "self_attn.qkv_proj": (("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)),
        "mlp.gate_up_proj": (("mlp.gate_proj", inner), ("mlp.up_proj", inner)),
    }


FAMILY = Family(
    "phi3",
    blocks,
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    refusals=no_such_biases("phi3", "attention_bias", "mlp_bias"),
    fused=fused,
    rope=read_partial_rope,
    gguf=Gguf(
        "phi3",
        names={**GGUF_NAMES, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        flags={},
        partial_rope=True,
        rope_keys=("scaling.original_context_length",),
    ),
)
