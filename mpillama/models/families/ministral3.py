"""Ministral 3, alone or within a Mistral 3: Mistral with YaRN and queries that grow with their position.

Mistral Small 3.1 and 3.2 are Mistral 3s, too, whose language model is a plain Mistral.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.families.mistral import blocks
from mpillama.models.family import Family, Gguf, GgufMetadata, no_such_biases
from mpillama.models.rope import ORIGINAL, QueryFactors, Rope, read_rope, rope_fields

BETA = "llama_4_scaling_beta"
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    ORIGINAL: 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    BETA: 0.1,
}


def rope(values: ConfigValues, context: int) -> Rope:
    """YaRN, and the factors of queries; the field max_position_embeddings within is that of the model."""
    found, fields = read_rope(values, context, (BETA, "max_position_embeddings")), rope_fields(values)
    holder = fields if fields.get(BETA) else values
    if not holder.get(BETA):
        return found
    beta = float(np.float32(holder.number(BETA)))  # which is what GGUF files hold
    return replace(found, query_factors=QueryFactors(beta, fields.size(ORIGINAL, context)))


def gguf_fields(metadata: GgufMetadata) -> Json:
    key = "attention.temperature_scale"
    plain = {"rope_parameters": {"rope_type": "default"}}  # unless the metadata say another rule
    return plain | ({BETA: metadata.number(key)} if metadata.get(key) else {})


FAMILY = Family(
    "ministral3",
    blocks,
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_parameters": YARN,
    },
    refusals=no_such_biases("ministral3", "attention_bias", "mlp_bias"),
    within=("mistral3",),
    rope=rope,
    gguf=Gguf("mistral3", rotary_pairs=True, fields=gguf_fields),
    pre_tokenizer="tekken",
)
