"""A Llama in float64 NumPy: plain dense matrices, one sequence, no cache, written from the papers and not from ours."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Rounding = Callable[[Array], Array]
"""What happens to the inputs [tokens, chunks, width] of a matrix; a chunk is a head, or all there is."""


def exact(x: Array) -> Array:
    """Leave the activations as they are."""
    return x


def q8_0_activations(x: Array) -> Array:
    """Round blocks of 32 channels to multiples of their largest magnitude / 127; chunks are padded on their own."""
    *lead, width = x.shape
    padded = np.zeros((*lead, -(-width // 32) * 32))
    padded[..., :width] = x
    blocks = padded.reshape(*lead, -1, 32)
    step = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    rounded = np.rint(np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0)) * step
    return rounded.reshape(padded.shape)[..., :width]


def float16(x: Array) -> Array:
    """Round to float16, as a cache of that type does."""
    return x.astype(np.float16).astype(np.float64)


class ReferenceLlama:
    """The decoder as https://arxiv.org/abs/2302.13971 has it; tensors in Hugging Face's names and shapes."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Array],
        rounding: Rounding = exact,
        cache_rounding: Rounding = exact,
    ):
        self.config = config
        self.tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
        self.rounding, self.cache_rounding = rounding, cache_rounding
        self.heads = config["num_attention_heads"]
        self.kv_heads = config["num_key_value_heads"]
        self.head_dim = config["head_dim"]

    def logits(self, token_ids: Array) -> Array:
        """Logits of every token of a sequence: [tokens, vocab_size]."""
        head = "model.embed_tokens.weight" if self.config["tie_word_embeddings"] else "lm_head.weight"
        return self.linear(head, self.hidden_states(token_ids))

    def hidden_states(self, token_ids: Array) -> Array:
        """What the last norm makes of every token: [tokens, hidden_size]."""
        x = self.tensors["model.embed_tokens.weight"][token_ids]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x = x + self.attention(prefix, self.norm(prefix + "input_layernorm.weight", x))
            x = x + self.mlp(prefix, self.norm(prefix + "post_attention_layernorm.weight", x))
        return self.norm("model.norm.weight", x)

    def linear(self, name: str, x: Array, chunks: int = 1) -> Array:
        """x W^T, with the inputs rounded chunk by chunk."""
        rounded = self.rounding(x.reshape(len(x), chunks, -1)).reshape(x.shape)
        return rounded @ self.tensors[name].T

    def norm(self, name: str, x: Array) -> Array:
        """RMSNorm."""
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.config["rms_norm_eps"]) * self.tensors[name]

    def attention(self, prefix: str, h: Array) -> Array:
        """Causal grouped-query attention."""
        q, k, v = (
            self.linear(f"{prefix}self_attn.{name}_proj.weight", h).reshape(len(h), -1, self.head_dim) for name in "qkv"
        )
        q, k, v = self.rotate(q), self.cache_rounding(self.rotate(k)), self.cache_rounding(v)
        kv = self.kv_head_of_heads()
        scores = np.einsum("thd,shd->hts", q, k[:, kv]) / math.sqrt(self.head_dim)
        scores = np.where(self.visible(len(h)), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out = np.einsum("hts,shd->thd", weights, v[:, kv])
        return self.linear(f"{prefix}self_attn.o_proj.weight", out.reshape(len(h), -1), self.heads)

    def kv_head_of_heads(self) -> Array:
        """The KV head of each query head: consecutive query heads share one."""
        return np.repeat(np.arange(self.kv_heads), self.heads // self.kv_heads)

    def visible(self, tokens: int) -> Array:
        """Which positions (columns) a token (row) sees."""
        return np.tril(np.ones((tokens, tokens), bool))

    def inverse_frequencies(self) -> Array:
        """One for each pair of channels."""
        plain = self.config["rope_theta"] ** -(np.arange(0, self.head_dim, 2) / self.head_dim)
        scaling = self.config.get("rope_scaling")
        return plain if scaling is None else llama3_frequencies(plain, scaling)

    def rotate(self, x: Array) -> Array:
        """RoPE on [tokens, heads, head_dim]: channel i turns with channel i + head_dim / 2, as complex numbers."""
        angles = np.arange(len(x))[:, None] * self.inverse_frequencies()
        half = self.head_dim // 2
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def mlp(self, prefix: str, h: Array) -> Array:
        """SwiGLU."""
        gate, up = (self.linear(f"{prefix}mlp.{name}_proj.weight", h) for name in ("gate", "up"))
        return self.linear(f"{prefix}mlp.down_proj.weight", gate / (1 + np.exp(-gate)) * up)


def llama3_frequencies(plain: Array, scaling: Mapping[str, Any]) -> Array:
    """Llama 3.1's rule, told by how many turns a frequency makes within the original context.

    More than `high_freq_factor` turns: as it was; less than `low_freq_factor`: divided; between: mixed linearly.
    """
    turns = scaling["original_max_position_embeddings"] * plain / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (kept + (1 - kept) / scaling["factor"])
