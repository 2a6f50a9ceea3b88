"""Qwen 3: Qwen 2 with norms of queries and keys in the place of biases."""

from dataclasses import replace

from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config_values import ConfigValues
from mpillama.models.families.qwen2 import windows
from mpillama.models.family import Block, Dllama, Family, Gguf, no_such_biases
from mpillama.models.mlp import GatedMlp


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    attention, mlp = GroupedQueryAttention.read(values, qk_norm=True), GatedMlp.read(values)
    return tuple(Block(replace(attention, window=window), mlp) for window in windows(values))


FAMILY = Family(
    "qwen3",
    blocks,
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    refusals=no_such_biases("qwen3", "mlp_bias"),
    gguf=Gguf("qwen3"),
    dllama=Dllama(0xABCD01, head_norms=True),
    pre_tokenizer="qwen2",
)
