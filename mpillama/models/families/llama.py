"""Llama 1 to 3 of Meta, and the many models that are stored as one."""

from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config_values import ConfigValues
from mpillama.models.family import Block, Dllama, Family, Gguf, layer_count
from mpillama.models.mlp import GatedMlp


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    return (Block(GroupedQueryAttention.read(values), GatedMlp.read(values)),) * layer_count(values)


FAMILY = Family(
    "llama",
    blocks,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    gguf=Gguf("llama", rotary_pairs=True),
    dllama=Dllama(0xABCD00, rotary_pairs=True, scaled_rope=True),
)
