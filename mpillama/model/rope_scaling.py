"""How the rotary frequencies are stretched for long contexts.

The rules are those of Hugging Face's modeling_rope_utils: linear (https://kaiokendev.github.io/context), llama3
(https://ai.meta.com/blog/meta-llama-3-1) and YaRN (https://arxiv.org/abs/2309.00071).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mpillama.model.config_values import ConfigValues


class RopeScaling(Protocol):
    """A rule for the frequencies, and a factor for the rotated queries and keys."""

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""

    def apply(self, frequencies: list[float], theta: float) -> list[float]:
        """Return the scaled inverse frequencies, one for each pair of channels."""


@dataclass(frozen=True)
class LinearScaling:
    """Every position divided by `factor`."""

    factor: float
    attention_factor: float = 1.0

    def apply(self, frequencies: list[float], theta: float) -> list[float]:
        """Divide all alike."""
        return [f / self.factor for f in frequencies]


@dataclass(frozen=True)
class FactorScaling:
    """Each frequency divided by a factor of its own, as GGUF files spell the rule of Llama 3.1."""

    factors: tuple[float, ...]
    attention_factor: float = 1.0

    def apply(self, frequencies: list[float], theta: float) -> list[float]:
        """Divide one by one."""
        return [f / factor for f, factor in zip(frequencies, self.factors, strict=True)]


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the low frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    attention_factor: float = 1.0

    def apply(self, frequencies: list[float], theta: float) -> list[float]:
        """Long wavelengths by 1 / factor, short ones not at all, a smooth ramp between."""
        return [self._scale(f) for f in frequencies]

    def _scale(self, frequency: float) -> float:
        wavelength = 2 * math.pi / frequency
        low = self.original_max_position_embeddings / self.low_freq_factor
        high = self.original_max_position_embeddings / self.high_freq_factor
        if wavelength < high:
            return frequency
        if wavelength > low:
            return frequency / self.factor
        ramp = self.original_max_position_embeddings / wavelength - self.low_freq_factor
        smooth = ramp / (self.high_freq_factor - self.low_freq_factor)
        return (1 - smooth) * frequency / self.factor + smooth * frequency


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: between the pairs that turn `beta_fast` and `beta_slow` times in the original context, a linear ramp."""

    factor: float
    original_max_position_embeddings: float
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool = True

    def apply(self, frequencies: list[float], theta: float) -> list[float]:
        """Fast pairs stay, slow ones are divided by the factor."""
        pairs = len(frequencies)
        low, high = self._pair(self.beta_fast, pairs, theta), self._pair(self.beta_slow, pairs, theta)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        high = high + 0.001 if low == high else high
        slow = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(pairs)]
        return [f / self.factor * s + f * (1 - s) for f, s in zip(frequencies, slow, strict=True)]

    def _pair(self, turns: float, pairs: int, theta: float) -> float:
        """The pair, counted from 0, that turns so many times within the original context."""
        return pairs * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)


def yarn_attention_factor(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """The factor for queries and keys that YaRN's paper finds, in DeepSeek's general form."""
    if mscale and mscale_all_dim:
        return _magnitude(factor, mscale) / _magnitude(factor, mscale_all_dim)
    return _magnitude(factor, 1.0)


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def read_rope_scaling(values: ConfigValues, context: int) -> RopeScaling | None:
    """The rule that a configuration's rope_parameters or rope_scaling name; None for plain RoPE.

    `context` is the model's max_position_embeddings. UserError for an unknown rule or impossible constants.
    """
    if "rope_type" not in values.source and "type" in values.source:  # as transformers wrote it before 4.43
        values = ConfigValues({**values.source, "rope_type": values.source["type"]})
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise values.refuse("partial_rotary_factor", "mpillama turns all channels of a head")
    return READERS[values.expect("rope_type", READERS, "default")](values, context)


def _linear(values: ConfigValues, context: int) -> RopeScaling:
    return LinearScaling(values.number("factor"))


def _factors(values: ConfigValues, context: int) -> RopeScaling:
    return FactorScaling(values.numbers("factors"))


def _llama3(values: ConfigValues, context: int) -> RopeScaling:
    return Llama3Scaling(
        values.number("factor"),
        values.number("low_freq_factor"),
        values.number("high_freq_factor"),
        values.size("original_max_position_embeddings"),
    )


def _yarn(values: ConfigValues, context: int) -> RopeScaling:
    factor = values.number("factor")
    known = yarn_attention_factor(factor, values.get("mscale", 0), values.get("mscale_all_dim", 0))
    return YarnScaling(
        factor,
        values.size("original_max_position_embeddings", context),
        values.number("beta_fast", 32.0),
        values.number("beta_slow", 1.0),
        values.number("attention_factor", known),
        values.flag("truncate", True),
    )


READERS: dict[str, Callable[[ConfigValues, int], RopeScaling | None]] = {
    "default": lambda values, context: None,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "factors": _factors,
}
