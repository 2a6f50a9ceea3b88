"""Mistral 7B and its successors: Llama with sliding windows. In GGUF they are stored as Llama."""

from dataclasses import replace

from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config_values import ConfigValues
from mpillama.models.family import Block, Family, layer_count, layer_windows, no_such_biases
from mpillama.models.mlp import GatedMlp


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    attention, mlp = GroupedQueryAttention.read(values), GatedMlp.read(values)
    return tuple(Block(replace(attention, window=window), mlp) for window in windows(values))


def windows(values: ConfigValues) -> list[int]:
    """All layers slide unless layer_types says otherwise."""
    return layer_windows(values, ["sliding_attention"] * layer_count(values))


FAMILY = Family(
    "mistral",
    blocks,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    refusals=no_such_biases("mistral", "attention_bias", "mlp_bias"),
    within=("mistral3",),
)
