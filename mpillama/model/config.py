"""The shape and constants of a model, read from a Hugging Face configuration."""

import math
from dataclasses import dataclass, replace
from typing import Any

from mpillama.errors import UserError
from mpillama.model.config_values import ConfigValues, Json
from mpillama.model.families import FAMILIES, Family
from mpillama.model.rope_scaling import RopeScaling, read_rope
from mpillama.quant.weight_type import BLOCK, round_up

MOST_LAYERS = 10_000

"""A damaged file may claim more; listing their tensors would take for ever."""
MOST_EXPERTS, MOST_CHANNELS = 4096, 65536


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's sizes and constants, in Hugging Face's names.

    `lm_head` is false for models that make embeddings and have no head at all.
    With experts, `intermediate_size` is that of one of them. `windows` has the number of positions that each layer
    sees, 0 for all.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    lm_head: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool

    @property
    def padded_hidden_size(self) -> int:
        """hidden_size with zeros up to whole blocks of 32."""
        return round_up(self.hidden_size, BLOCK)

    @property
    def padded_head_dim(self) -> int:
        """head_dim with zeros up to whole blocks of 32, so that every head is a panel of its own."""
        return round_up(self.head_dim, BLOCK)

    @property
    def padded_intermediate_size(self) -> int:
        """intermediate_size with zeros up to whole blocks of 32."""
        return round_up(self.intermediate_size, BLOCK)

    def inverse_frequencies(self) -> list[float]:
        """1 / theta^(2i / head_dim) for each pair of channels, scaled as rope_scaling says."""
        plain = [1.0 / math.pow(self.rope_theta, i / self.head_dim) for i in range(0, self.head_dim, 2)]
        return self.rope_scaling.apply(plain, self.rope_theta) if self.rope_scaling else plain

    @property
    def rope_factor(self) -> float:
        """What the rotated queries and keys are multiplied by."""
        return self.rope_scaling.attention_factor if self.rope_scaling else 1.0

    def first_layers(self, layers: int) -> "ModelConfig":
        """The same model with its first layers only."""
        layers = min(layers, self.num_hidden_layers)
        return replace(self, num_hidden_layers=layers, windows=self.windows[:layers])

    @classmethod
    def from_hf(cls, source: Json) -> "ModelConfig":
        """Read a config.json; UserError names what is missing, unknown or impossible."""
        values = ConfigValues(source)
        model_type = values.expect("model_type", FAMILIES)
        family = FAMILIES[model_type]
        values.expect("hidden_act", ("silu", "swish"), "silu")
        _refuse_other_options(values)
        layers = values.size("num_hidden_layers", limit=MOST_LAYERS)
        context = values.size("max_position_embeddings", family.max_position_embeddings)
        rope_theta, rope_scaling = read_rope(values, context, family.rope_theta)
        biased = family.bias_option and values.flag("attention_bias")
        config = cls(
            model_type=model_type,
            num_hidden_layers=layers,
            vocab_size=values.size("vocab_size"),
            max_position_embeddings=context,
            rms_norm_eps=values.number("rms_norm_eps", family.rms_norm_eps),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=values.flag("tie_word_embeddings"),
            lm_head=values.flag("lm_head", True),
            qkv_bias=family.qkv_bias or biased,
            output_bias=biased,
            mlp_bias=family.bias_option and values.flag("mlp_bias"),
            qk_norm=family.qk_norm,
            windows=_windows(values, family, layers),
            **_heads(values, family),
            **_mlp(values, family),
        )
        config._check()
        return config

    def _check(self) -> None:
        """Refuse sizes that do not fit each other."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"The model's configuration has num_attention_heads={self.num_attention_heads}, no "
                f"multiple of num_key_value_heads={self.num_key_value_heads}: the file is damaged or no Llama model."
            )
        if self.head_dim % 2:
            raise UserError(f"The model's configuration has head_dim={self.head_dim}: it must be even for RoPE.")
        if self.num_experts_per_tok > self.num_experts:
            raise UserError(
                f"The model's configuration has num_experts_per_tok={self.num_experts_per_tok}, but only "
                f"{self.num_experts} experts: the file is damaged."
            )
        try:
            frequencies = self.inverse_frequencies()
        except (ValueError, ArithmeticError):
            frequencies = []
        if len(frequencies) != self.head_dim // 2 or not all(map(math.isfinite, frequencies)):
            raise UserError("The model's configuration has RoPE constants that give no frequencies: it is damaged.")


def _heads(values: ConfigValues, family: Family) -> dict[str, Any]:
    hidden, heads = values.size("hidden_size"), values.size("num_attention_heads")
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": values.size("num_key_value_heads", family.num_key_value_heads or heads),
        "head_dim": values.size("head_dim", family.head_dim or hidden // heads, limit=MOST_CHANNELS),
    }


def _mlp(values: ConfigValues, family: Family) -> dict[str, Any]:
    """The width of the MLP, or of each expert, and how experts are chosen."""
    if not family.experts:
        inner = values.size("intermediate_size")
        return {"intermediate_size": inner, "num_experts": 0, "num_experts_per_tok": 0, "norm_topk_prob": False}
    key = "intermediate_size" if values.get("moe_intermediate_size") is None else "moe_intermediate_size"
    return {
        "intermediate_size": values.size(key),
        # transformers 5 writes num_local_experts for all families, transformers 4 num_experts for Qwen's.
        "num_experts": values.size("num_experts", values.get("num_local_experts"), limit=MOST_EXPERTS),
        "num_experts_per_tok": values.size("num_experts_per_tok"),
        "norm_topk_prob": family.renormalises or values.flag("norm_topk_prob"),
    }


def _refuse_other_options(values: ConfigValues) -> None:
    """Refuse what would be left out silently."""
    if values.get("mlp_only_layers"):
        raise values.refuse("mlp_only_layers", "mpillama runs experts in all layers or in none")
    if values.get("decoder_sparse_step", 1) != 1:
        raise values.refuse("decoder_sparse_step", "mpillama runs experts in all layers or in none")
    if not FAMILIES[values.source["model_type"]].bias_option:
        for key in ("attention_bias", "mlp_bias"):
            if values.get(key):
                raise values.refuse(key, f"a model of type {values.source['model_type']} has no such biases")


def _windows(values: ConfigValues, family: Family, layers: int) -> tuple[int, ...]:
    """Each layer's sliding window, as the classes of the families read it."""
    window = values.source.get("sliding_window", family.sliding_window)  # null is a value: none
    if window is None or (family is FAMILIES["llama"]):
        return (0,) * layers
    kinds = values.get("layer_types")
    if values.source["model_type"].startswith("qwen"):
        if not values.flag("use_sliding_window"):
            return (0,) * layers
        first = values.size("max_window_layers", 28) if kinds is None and values.get("max_window_layers") != 0 else 0
        kinds = kinds or ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    kinds = kinds or ["sliding_attention"] * layers
    known = {"full_attention": 0, "sliding_attention": values.size("sliding_window", window)}
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise values.refuse("layer_types", f"it must name full_attention or sliding_attention for {layers} layers")
    return tuple(known[kind] for kind in kinds)
