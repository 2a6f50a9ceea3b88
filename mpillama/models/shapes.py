"""Configurations of well-known models, for planning and measuring without a file (from their published config.json)."""

from typing import Any

from mpillama.errors import UserError

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3_ROPE,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}


QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "head_dim": 128,
    "num_key_value_heads": 8,
}
EXPERTS = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_key_value_heads": 4,
}
MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": None,
}
MIXTRAL = {"model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}


def _sizes(base: dict[str, Any], hidden: int, inner: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    return {
        **base,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **other,
    }


PHI = {
    "model_type": "phi3",
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 250000.0,
    "num_key_value_heads": 10,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 1024,
}
OLMO2 = {
    "model_type": "olmo2",
    "vocab_size": 100352,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
}
GRANITE = {
    "model_type": "granite",
    "vocab_size": 49159,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e7,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 16.0,
}
SMOLLM3 = {"model_type": "smollm3", "vocab_size": 128256, "max_position_embeddings": 65536, "rope_theta": 5e6}
MISTRAL_SMALL = {**MISTRAL, "vocab_size": 131072, "max_position_embeddings": 131072, "rope_theta": 1e9}

SMALL_ROPE = {**LLAMA3_ROPE, "factor": 32.0}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _sizes(LLAMA3, 2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True, rope_scaling=SMALL_ROPE),
    "llama-3.2-3b": _sizes(LLAMA3, 3072, 8192, 28, 24, tie_word_embeddings=True, rope_scaling=SMALL_ROPE),
    "llama-3.1-8b": _sizes(LLAMA3, 4096, 14336, 32, 32),
    "llama-3.1-70b": _sizes(LLAMA3, 8192, 28672, 80, 64),
    "llama-3.1-405b": _sizes(LLAMA3, 16384, 53248, 126, 128),
    "mistral-7b": _sizes(MISTRAL, 4096, 14336, 32, 32),
    "mixtral-8x7b": _sizes({**MISTRAL, **MIXTRAL}, 4096, 14336, 32, 32),
    "mistral-small-24b": _sizes(MISTRAL_SMALL, 5120, 32768, 40, 32),
    "ministral-3-8b": _sizes({"model_type": "ministral3", "vocab_size": 131072}, 4096, 14336, 34, 32),
    "phi-4": _sizes(PHI, 5120, 17920, 40, 40),
    "gemma-2-9b": _sizes({"model_type": "gemma2"}, 3584, 14336, 42, 16, num_key_value_heads=8),
    "gemma-2-27b": _sizes(
        {"model_type": "gemma2"}, 4608, 36864, 46, 32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144
    ),
    "gemma-3-4b": _sizes(GEMMA3, 2560, 10240, 34, 8),
    "gemma-3-27b": _sizes(GEMMA3, 5376, 21504, 62, 32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168),
    "olmo-2-7b": _sizes(OLMO2, 4096, 11008, 32, 32),
    "olmo-2-32b": _sizes(OLMO2, 5120, 27648, 64, 40, num_key_value_heads=8),
    "granite-3.3-8b": _sizes(GRANITE, 4096, 12800, 40, 32),
    "smollm3-3b": _sizes(SMOLLM3, 2048, 11008, 36, 16),
    "qwen3-0.6b": _sizes(QWEN3, 1024, 3072, 28, 16, tie_word_embeddings=True),
    "qwen3-8b": _sizes(QWEN3, 4096, 12288, 36, 32),
    "qwen3-32b": _sizes(QWEN3, 5120, 25600, 64, 64),
    "qwen3-30b-a3b": _sizes({**QWEN3, **EXPERTS, "model_type": "qwen3_moe"}, 2048, 6144, 48, 32),
    "qwen3-235b-a22b": _sizes(
        {**QWEN3, **EXPERTS, "model_type": "qwen3_moe", "moe_intermediate_size": 1536}, 4096, 12288, 94, 64
    ),
}


def shape_config(name: str) -> dict[str, Any]:
    """The configuration of a named shape; UserError lists the names."""
    if name not in SHAPES:
        raise UserError(f"--shape {name} is not known: choose one of {', '.join(SHAPES)}.")
    return SHAPES[name]
