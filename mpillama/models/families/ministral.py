"""Ministral 8B: Mistral with windows in some layers."""

from mpillama.models.families.mistral import blocks
from mpillama.models.family import Family, no_such_biases

FAMILY = Family(
    "ministral",
    blocks,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    refusals=no_such_biases("ministral", "attention_bias", "mlp_bias"),
)
