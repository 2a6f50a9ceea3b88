"""Gemma 2 of Google: norms before and after, GELU, bent scores and logits, and windows in every other layer."""

import math
from dataclasses import replace

import numpy as np

from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.family import (
    GGUF_NAMES,
    Block,
    Family,
    Gguf,
    GgufMetadata,
    OuterFactors,
    Refusal,
    layer_count,
    layer_windows,
    no_such_biases,
)
from mpillama.models.mlp import GatedMlp, read_activation

LAYERS_OF_27B = 46
SOFT_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layer_count(values))]
    attention, mlp = read_attention(values), read_mlp(values)
    return tuple(block_of(replace(attention, window=window), mlp) for window in layer_windows(values, kinds))


def block_of(attention: GroupedQueryAttention, mlp: GatedMlp) -> Block:
    """With norms before and after both halves."""
    return Block(
        attention,
        mlp,
        mlp_norm="pre_feedforward_layernorm.weight",
        attention_post_norm="post_attention_layernorm.weight",
        mlp_post_norm="post_feedforward_layernorm.weight",
    )


def read_attention(values: ConfigValues, *, qk_norm: bool = False) -> GroupedQueryAttention:
    scale, cap = values.number("query_pre_attn_scalar") ** -0.5, soft_cap(values, "attn_logit_softcapping")
    return replace(GroupedQueryAttention.read(values, qk_norm=qk_norm), scale=scale, soft_cap=cap)


def read_mlp(values: ConfigValues) -> GatedMlp:
    return GatedMlp(values.size("intermediate_size"), activation=read_activation(values, "hidden_activation"))


def soft_cap(values: ConfigValues, key: str) -> float:
    """0 for null, which is a value here."""
    return 0.0 if values.given(key) is None else values.number(key)


def factors(values: ConfigValues) -> OuterFactors:
    """Where its weights are bfloat16, transformers rounds the first of them to that, too."""
    embedding = float(np.float32(math.sqrt(values.size("hidden_size"))))
    return OuterFactors(embedding, logits_cap=soft_cap(values, "final_logit_softcapping"))


def gguf_fields(metadata: GgufMetadata) -> Json:
    return {"query_pre_attn_scalar": gguf_scalar(metadata, LAYERS_OF_27B), **gguf_soft_caps(metadata)}


def gguf_scalar(metadata: GgufMetadata, layers_of_largest: int) -> int:
    """What no file says: the width of a head, but in the largest model hidden_size / heads."""
    largest = metadata.size("block_count") == layers_of_largest
    return metadata.size("embedding_length") // metadata.size("attention.head_count") if largest else metadata.head_dim


def gguf_soft_caps(metadata: GgufMetadata) -> Json:
    """None where a file has none."""
    return {name: metadata.number(key) if metadata.get(key) else None for name, key in SOFT_CAPS.items()}


NAMES = {
    **GGUF_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
REFUSALS = (
    *no_such_biases("gemma", "mlp_bias"),
    Refusal("use_bidirectional_attention", "mpillama runs models that look back only"),
)
DEFAULTS: Json = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
FAMILY = Family(
    "gemma2",
    blocks,
    defaults=DEFAULTS,
    refusals=REFUSALS,
    factors=factors,
    from_one=r"norm\.weight$",
    gguf=Gguf("gemma2", names=NAMES, fields=gguf_fields),
)
