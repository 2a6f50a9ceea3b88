"""Mixtral: Mistral with experts. In GGUF it is stored as Llama with experts."""

from dataclasses import replace

from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.families.mistral import windows
from mpillama.models.family import Block, Family, Gguf, GgufMetadata, no_such_biases
from mpillama.models.mlp import Experts
from mpillama.models.router import Router


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    attention = GroupedQueryAttention.read(values)
    experts = Experts.read(values, Router.read(values, renormalise=True))
    return tuple(Block(replace(attention, window=window), experts) for window in windows(values))


def gguf_fields(metadata: GgufMetadata) -> Json:
    return {
        "num_local_experts": metadata.size("expert_count"),
        "num_experts_per_tok": metadata.size("expert_used_count"),
    }


FAMILY = Family(
    "mixtral",
    blocks,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
    refusals=no_such_biases("mixtral", "attention_bias", "mlp_bias"),
    renames={
        r"\.block_sparse_moe\.": ".mlp.",
        r"(\.mlp\.experts\.[0-9]+)\.w1\.": r"\1.gate_proj.",
        r"(\.mlp\.experts\.[0-9]+)\.w2\.": r"\1.down_proj.",
        r"(\.mlp\.experts\.[0-9]+)\.w3\.": r"\1.up_proj.",
    },
    gguf=Gguf("llama", experts=True, rotary_pairs=True, fields=gguf_fields),
)
