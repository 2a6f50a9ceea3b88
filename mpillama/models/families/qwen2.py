"""Qwen 2 and 2.5: Llama with biases on queries, keys and values, and windows that may be switched on."""

from dataclasses import replace

from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config_values import ConfigValues
from mpillama.models.family import Block, Family, Gguf, layer_count, layer_windows, no_such_biases
from mpillama.models.mlp import GatedMlp


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    attention, mlp = GroupedQueryAttention.read(values, qkv_bias=True), GatedMlp.read(values)
    return tuple(Block(replace(attention, window=window), mlp) for window in windows(values))


def windows(values: ConfigValues) -> list[int]:
    """None unless `use_sliding_window`; then those of layer_types, or the layers from `max_window_layers` on."""
    layers = layer_count(values)
    if not values.flag("use_sliding_window"):
        return [0] * layers
    first = 0 if values.get("max_window_layers") == 0 else values.size("max_window_layers", 28)
    return layer_windows(values, ["full_attention" if i < first else "sliding_attention" for i in range(layers)])


FAMILY = Family(
    "qwen2",
    blocks,
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    refusals=no_such_biases("qwen2", "attention_bias", "mlp_bias"),
    gguf=Gguf("qwen2", flags={}),
    pre_tokenizer="qwen2",
)
