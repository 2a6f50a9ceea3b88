"""The model families that the decoder runs, and what each means where its configuration says nothing.

The defaults are those of Hugging Face's configuration classes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What a `model_type` stands for.

    `qkv_bias`: query, key and value always have biases; `bias_option`: `attention_bias` adds them to all four
    projections, and `mlp_bias` to the MLP's; `qk_norm`: RMSNorm on each head of queries and keys; `experts`: a
    mixture of them instead of one MLP; `renormalises`: the chosen experts' shares always add up to 1.
    """

    qkv_bias: bool = False
    bias_option: bool = False
    qk_norm: bool = False
    experts: bool = False
    renormalises: bool = False
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    sliding_window: int | None = None


FAMILIES = {
    "llama": Family(bias_option=True, max_position_embeddings=2048),
    "mistral": Family(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096),
    "mixtral": Family(
        experts=True,
        renormalises=True,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
    ),
    "qwen2": Family(qkv_bias=True, num_key_value_heads=32, sliding_window=4096),
    "qwen3": Family(bias_option=True, qk_norm=True, num_key_value_heads=32, head_dim=128, sliding_window=4096),
    "qwen3_moe": Family(bias_option=True, qk_norm=True, experts=True, num_key_value_heads=4, sliding_window=4096),
}
