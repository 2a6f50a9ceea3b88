"""Seed-OSS of ByteDance: Llama with biases on queries, keys and values."""

from dataclasses import replace

from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config_values import ConfigValues
from mpillama.models.family import GGUF_NAMES, Block, Family, Gguf, layer_count
from mpillama.models.mlp import GatedMlp


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    output_bias = values.flag("attention_out_bias")
    attention = replace(GroupedQueryAttention.read(values), output_bias=output_bias)
    return (Block(attention, GatedMlp.read(values)),) * layer_count(values)


FAMILY = Family(
    "seed_oss",
    blocks,
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": True,
    },
    gguf=Gguf(
        "seed_oss",
        names={**GGUF_NAMES, "post_attention_norm": "post_attention_layernorm"},
        flags={"attention_bias": "attn_q.bias", "attention_out_bias": "attn_output.bias", "mlp_bias": "ffn_up.bias"},
    ),
    pre_tokenizer="seed-coder",
)
