"""The shape and constants of a model, read from a Hugging Face configuration."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpillama.errors import UserError
from mpillama.layout.weight_types import BLOCK, round_up

Json = Mapping[str, Any]
MOST_LAYERS = 10_000
"""A damaged file may claim more; listing their tensors would take for ever."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the low frequencies (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def apply(self, inverse_frequency: float) -> float:
        """Scale one inverse frequency: long wavelengths by 1 / factor, a smooth ramp between."""
        wavelength = 2 * math.pi / inverse_frequency
        low = self.original_max_position_embeddings / self.low_freq_factor
        high = self.original_max_position_embeddings / self.high_freq_factor
        if wavelength < high:
            return inverse_frequency
        if wavelength > low:
            return inverse_frequency / self.factor
        ramp = self.original_max_position_embeddings / wavelength - self.low_freq_factor
        smooth = ramp / (self.high_freq_factor - self.low_freq_factor)
        return (1 - smooth) * inverse_frequency / self.factor + smooth * inverse_frequency


@dataclass(frozen=True)
class ModelConfig:
    """A Llama decoder's sizes and constants, in Hugging Face's names."""

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
        return [self.rope_scaling.apply(f) for f in plain] if self.rope_scaling else plain

    @classmethod
    def from_hf(cls, source: Json) -> "ModelConfig":
        """Read a config.json; UserError names what is missing, unknown or impossible."""
        reader = _Reader(source)
        reader.expect("model_type", ("llama",))
        reader.expect("hidden_act", ("silu",), "silu")
        reader.refuse_biases()
        hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        config = cls(
            model_type=source["model_type"],
            hidden_size=hidden,
            intermediate_size=reader.size("intermediate_size"),
            num_hidden_layers=reader.size("num_hidden_layers", limit=MOST_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=reader.size("num_key_value_heads", heads),
            head_dim=reader.size("head_dim", hidden // heads),
            vocab_size=reader.size("vocab_size"),
            max_position_embeddings=reader.size("max_position_embeddings", 2048),
            rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
            rope_theta=reader.rope_theta(),
            rope_scaling=reader.rope_scaling(),
            tie_word_embeddings=bool(source.get("tie_word_embeddings", False)),
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


class _Reader:
    """Takes checked values out of a configuration."""

    def __init__(self, source: Json):
        self.source = source
        # transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling.
        self.rope: Json = source.get("rope_parameters") or source.get("rope_scaling") or {}

    def expect(self, key: str, known: tuple[str, ...], default: str | None = None) -> None:
        """Refuse a value that is not among the known ones."""
        value = self.source.get(key) or default
        if value not in known:
            raise UserError(
                f"The model's configuration has {key}={value!r}: mpillama {_version()} runs {', '.join(known)} only."
            )

    def refuse_biases(self) -> None:
        """Refuse what would be left out silently."""
        for key in ("attention_bias", "mlp_bias"):
            if self.source.get(key):
                raise UserError(
                    f"The model's configuration has {key}={self.source[key]!r}: mpillama {_version()} has no biases."
                )

    def number(self, key: str, default: float | None = None, source: Json | None = None) -> float:
        """A positive finite number."""
        value = (self.source if source is None else source).get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"The model's configuration has {key}={value!r}: it must be a positive number.")
        return float(value)

    def size(self, key: str, default: int | None = None, source: Json | None = None, limit: int = 2**40) -> int:
        """A positive whole number below `limit`."""
        value = self.number(key, default, source)
        if value != int(value) or value >= limit:
            raise UserError(f"The model's configuration has {key}={value!r}: it must be a whole number below {limit}.")
        return int(value)

    def rope_theta(self) -> float:
        """The base of the rotary frequencies."""
        return self.number("rope_theta", 10000.0, self.rope if "rope_theta" in self.rope else self.source)

    def rope_scaling(self) -> RopeScaling | None:
        """The scaling of the rotary frequencies, None for plain RoPE."""
        kind = self.rope.get("rope_type") or self.rope.get("type") or "default"
        if kind == "default":
            return None
        if kind != "llama3":
            raise UserError(
                f"The model's configuration has rope_type={kind!r}: mpillama {_version()} runs default, llama3."
            )
        return RopeScaling(
            self.number("factor", source=self.rope),
            self.number("low_freq_factor", source=self.rope),
            self.number("high_freq_factor", source=self.rope),
            self.size("original_max_position_embeddings", source=self.rope),
        )


def _version() -> str:
    from mpillama import __version__

    return __version__
