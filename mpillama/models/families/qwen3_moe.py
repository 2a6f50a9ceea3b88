"""Qwen 3 with experts in every layer."""

from dataclasses import replace

from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.family import Block, Dllama, Family, Gguf, GgufMetadata, layer_count, no_such_biases
from mpillama.models.mlp import Experts


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    attention, experts = GroupedQueryAttention.read(values, qk_norm=True), Experts.read(values)
    window = values.given("sliding_window") if values.flag("use_sliding_window") else None  # of all layers, if any
    window = 0 if window is None else values.size("sliding_window")
    return (Block(replace(attention, window=window), experts),) * layer_count(values)


def gguf_fields(metadata: GgufMetadata) -> Json:
    norm = metadata.get("expert_weights_norm")
    return {
        "num_experts": metadata.size("expert_count"),
        "num_experts_per_tok": metadata.size("expert_used_count"),
        "moe_intermediate_size": metadata.size("expert_feed_forward_length"),
        "norm_topk_prob": True if norm is None else bool(norm),
    }


FAMILY = Family(
    "qwen3_moe",
    blocks,
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    refusals=no_such_biases("qwen3_moe", "mlp_bias"),
    gguf=Gguf("qwen3moe", experts=True, fields=gguf_fields),
    dllama=Dllama(0xABCD02, experts=True, head_norms=True),
    pre_tokenizer="qwen2",
)
