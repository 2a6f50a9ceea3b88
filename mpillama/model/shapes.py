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


def _llama3(hidden: int, inner: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return {**LLAMA3, **sizes, **other}


SMALL_ROPE = {**LLAMA3_ROPE, "factor": 32.0}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True, rope_scaling=SMALL_ROPE),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, tie_word_embeddings=True, rope_scaling=SMALL_ROPE),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64),
    "llama-3.1-405b": _llama3(16384, 53248, 126, 128),
}


def shape_config(name: str) -> dict[str, Any]:
    """The configuration of a named shape; UserError lists the names."""
    if name not in SHAPES:
        raise UserError(f"--shape {name} is not known: choose one of {', '.join(SHAPES)}.")
    return SHAPES[name]
