"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini of Microsoft: Llama with fused matrices, and RoPE for a part of each head."""

from dataclasses import replace
from typing import Any

from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.family import (
    GGUF_NAMES,
    Block,
    Family,
    Fused,
    Gguf,
    GgufMetadata,
    layer_count,
    layer_windows,
    no_such_biases,
)
from mpillama.models.mlp import GatedMlp
from mpillama.models.rope import ORIGINAL, Rope, read_partial_rope, rope_fields, rotary_channels


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


def rope(values: ConfigValues, context: int) -> Rope:
    """Its first configurations call LongRoPE su, or yarn."""
    fields = dict(rope_fields(values).source)
    kind = "rope_type" if fields.get("rope_type") else "type"
    if fields.get(kind) in ("su", "yarn"):
        source = {**values.source, "rope_scaling": {**fields, kind: "longrope"}}
        values = ConfigValues(source, values.defaults)
    return read_partial_rope(values, context)


def gguf_fields(metadata: GgufMetadata) -> Json:
    """LongRoPE, if there are tensors with its factors."""
    factors = metadata.rope_factors
    if not factors:
        return {}
    original = metadata.size("rope.scaling.original_context_length")
    scaling: dict[str, Any] = {"rope_type": "longrope", **factors}
    if metadata.get("rope.scaling.attn_factor") is not None:
        scaling["attention_factor"] = float(metadata.number("rope.scaling.attn_factor"))
    return {"rope_scaling": scaling, ORIGINAL: original}


FAMILY = Family(
    "phi3",
    blocks,
    defaults={"max_position_embeddings": 4096, ORIGINAL: 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    refusals=no_such_biases("phi3", "attention_bias", "mlp_bias"),
    fused=fused,
    rope=rope,
    gguf=Gguf(
        "phi3",
        names={**GGUF_NAMES, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        flags={},
        fields=gguf_fields,
        partial_rope=True,
        rope_keys=("scaling.original_context_length", "scaling.attn_factor"),
    ),
    tokens_strip=True,
)
