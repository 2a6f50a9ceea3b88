"""Granite 3 of IBM: Llama with factors of its own for the embedding, attention, residual stream and logits."""

from dataclasses import replace

import numpy as np

from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.family import Block, Family, Gguf, GgufMetadata, OuterFactors, layer_count
from mpillama.models.mlp import GatedMlp

GGUF_FACTORS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    scale = float(np.float32(values.number("attention_multiplier")))  # which is what GGUF files hold
    attention = replace(GroupedQueryAttention.read(values), scale=scale)
    residual = values.number("residual_multiplier")
    return (Block(attention, GatedMlp.read(values), residual_factor=residual),) * layer_count(values)


def factors(values: ConfigValues) -> OuterFactors:
    return OuterFactors(values.number("embedding_multiplier"), values.number("logits_scaling"))


def gguf_fields(metadata: GgufMetadata) -> Json:
    """A factor that is left out is 1, that of attention the usual one."""
    found = {name: metadata.get(key) for name, key in GGUF_FACTORS.items()}
    usual = {"attention_multiplier": metadata.head_dim**-0.5}
    return usual | {name: metadata.number(GGUF_FACTORS[name]) for name, value in found.items() if value}


FAMILY = Family(
    "granite",
    blocks,
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    factors=factors,
    gguf=Gguf("granite", rotary_pairs=True, fields=gguf_fields),
    pre_tokenizer="refact",
)
