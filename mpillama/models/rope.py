"""Rotary position embeddings: the frequencies, and how they are stretched for long contexts.

The rules are those of Hugging Face's modeling_rope_utils: linear (https://kaiokendev.github.io/context), llama3
(https://ai.meta.com/blog/meta-llama-3-1) and YaRN (https://arxiv.org/abs/2309.00071).
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from mpillama.errors import UserError
from mpillama.models.config_values import ConfigValues, Json


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


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE: a divisor for each frequency, one set within the original context, another beyond it.

    A run takes one of them for all positions, as its context says: bits must not depend on how far a text has come.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    attention_factor: float
    original_max_position_embeddings: int
    beyond: bool = False

    def apply(self, frequencies: list[float], theta: float) -> list[float]:
        """Divide one by one."""
        return [f / factor for f, factor in zip(frequencies, self.long if self.beyond else self.short, strict=True)]


def yarn_attention_factor(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """The factor for queries and keys that YaRN's paper finds, in DeepSeek's general form."""
    if mscale and mscale_all_dim:
        return _magnitude(factor, mscale) / _magnitude(factor, mscale_all_dim)
    return _magnitude(factor, 1.0)


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class RopeRule:
    """How a rule is read from its fields; `fields` are those that it reads, or that are known to change nothing."""

    read: Callable[[ConfigValues, int], RopeScaling | None]
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class QueryFactors:
    """Queries grow with their position p: times 1 + beta * ln(1 + floor((p + shift) / length))."""

    beta: float
    length: float
    shift: int = 0

    def at(self, position: int) -> float:
        return 1.0 + self.beta * math.log(1.0 + (position + self.shift) // self.length)


@dataclass(frozen=True)
class Rope:
    """Base of the frequencies, the rule that scales them (None for plain RoPE), and factors of queries."""

    theta: float
    scaling: RopeScaling | None
    query_factors: QueryFactors | None = None

    def inverse_frequencies(self, channels: int) -> list[float]:
        """1 / theta^(2i / channels) for each pair of channels, scaled."""
        plain = [1.0 / math.pow(self.theta, i / channels) for i in range(0, channels, 2)]
        return self.scaling.apply(plain, self.theta) if self.scaling else plain

    def for_context(self, context: int) -> "Rope":
        """The RoPE of a run whose sequences may be so long."""
        scaling = self.scaling
        if not isinstance(scaling, LongRopeScaling):
            return self
        return replace(self, scaling=replace(scaling, beyond=context > scaling.original_max_position_embeddings))

    def usual_context(self, longest: int) -> int:
        """How far a run may go that does not ask for more."""
        original = (
            self.scaling.original_max_position_embeddings if isinstance(self.scaling, LongRopeScaling) else longest
        )
        return min(longest, original)

    @property
    def factor(self) -> float:
        """What the rotated queries and keys are multiplied by."""
        return self.scaling.attention_factor if self.scaling else 1.0


@dataclass(frozen=True)
class Rotation:
    """A RoPE, and how many channels of a head it turns."""

    rope: Rope
    channels: int

    def inverse_frequencies(self) -> list[float]:
        """The angle of each pair of channels at position 1."""
        return self.rope.inverse_frequencies(self.channels)


def read_rope(values: ConfigValues, context: int, also: Sequence[str] = ()) -> Rope:
    """What a configuration says of RoPE.

    As in transformers 5, a rope_scaling that is not empty stands in the place of rope_parameters, and a field that the
    rule leaves out is looked for beside it. `context` is the model's max_position_embeddings; `also` are fields that
    the family itself reads. UserError for an unknown rule, impossible constants, and a field that nobody reads.
    """
    known = (*OUTER_FIELDS, *also)
    _refuse_unread({k: v for k, v in values.source.items() if SPEAKS_OF_ROPE.search(k) and k not in known})
    rope = rope_fields(values)
    kind = "type" if rope.get("rope_type") is None and rope.get("type") else "rope_type"
    rule = RULES[rope.expect(kind, RULES, "default", shown=SHOWN)]
    _refuse_unread({k: v for k, v in rope.source.items() if k not in (*INNER_FIELDS, *rule.fields, *also)})
    theta = rope if rope.get("rope_theta") is not None else values
    return Rope(theta.number("rope_theta"), rule.read(_with_original(rope, values, rule), context))


PARTIAL = "partial_rotary_factor"


def read_partial_rope(values: ConfigValues, context: int) -> Rope:
    """As read_rope, for a family whose attention reads rotary_channels."""
    return read_rope(values, context, (PARTIAL,))


def rotary_channels(values: ConfigValues, head_dim: int) -> int:
    """How many channels of a head RoPE turns, as partial_rotary_factor says."""
    rope = rope_fields(values)
    factor = (rope if rope.get(PARTIAL) is not None else values).number(PARTIAL, 1.0)
    channels = int(head_dim * factor)
    if channels > head_dim or channels % 2:
        raise UserError(
            f"The model's configuration has {PARTIAL}={factor!r}: RoPE would turn {channels} of {head_dim} channels, "
            "and must turn an even number of them."
        )
    return channels


def softmax_factor(values: ConfigValues) -> float:
    """What DeepSeek multiplies scores by where RoPE is scaled: the square of the magnitude of `mscale_all_dim`."""
    rope = rope_fields(values)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    scale = rope.number("mscale_all_dim") if rope.get("mscale_all_dim") else 0.0
    return _magnitude(rope.number("factor"), scale) ** 2 if scale and kind != "default" else 1.0


def rope_fields(values: ConfigValues) -> ConfigValues:
    """What stands in rope_scaling or, without one, in rope_parameters."""
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    fields = values.get(key) or {}
    if not isinstance(fields, dict):
        raise values.refuse(key, "it must be a JSON object, or left out for plain RoPE")
    return ConfigValues(fields)


def _with_original(rope: ConfigValues, values: ConfigValues, rule: RopeRule) -> ConfigValues:
    """The fields with the original context where it stands outside, which then is the one that counts."""
    original = values.get(ORIGINAL)
    return (
        rope if original is None or ORIGINAL not in rule.fields else ConfigValues({**rope.source, ORIGINAL: original})
    )


def _refuse_unread(unread: Json) -> None:
    """Refuse fields that nobody reads and that would change the angles; off, empty and a factor of one do not."""
    for key, value in unread.items():
        is_one = not isinstance(value, bool) and value == 1
        if not (is_one or value is None or value is False or value in ("", [], {})):
            raise ConfigValues(unread).refuse(key, "mpillama does not know this field of RoPE and cannot leave it out")


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
    original = values.size("original_max_position_embeddings", context)
    factor = values.number("factor", context / original)
    scales = [values.number(key) if values.get(key) else 0.0 for key in ("mscale", "mscale_all_dim")]
    return YarnScaling(
        factor,
        original,
        values.number("beta_fast", 32.0),
        values.number("beta_slow", 1.0),
        values.number("attention_factor", yarn_attention_factor(factor, *scales)),
        values.flag("truncate", True),
    )


def _longrope(values: ConfigValues, context: int) -> RopeScaling:
    original = values.size(ORIGINAL, context)
    factor = values.number("factor", context / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (tuple(float(np.float32(f)) for f in values.numbers(key)) for key in ("short_factor", "long_factor"))
    return LongRopeScaling(short, long, values.number("attention_factor", usual), original)


FACTORS = "factors"
"""Our own name for the divisors that GGUF has in a tensor; no file of others has it."""
ORIGINAL = "original_max_position_embeddings"
RULES: dict[str, RopeRule] = {
    "default": RopeRule(lambda values, context: None),
    "linear": RopeRule(_linear, ("factor",)),
    "llama3": RopeRule(_llama3, ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)),
    "yarn": RopeRule(
        _yarn,
        ("factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": RopeRule(_longrope, ("factor", "short_factor", "long_factor", "attention_factor", ORIGINAL)),
    FACTORS: RopeRule(_factors, ("factors",)),
}
SHOWN = tuple(name for name in RULES if name != FACTORS)
INNER_FIELDS = ("rope_type", "type", "rope_theta", "finetuned")
"""Fields of any rule; `finetuned` tells how the model was made."""
SPEAKS_OF_ROPE = re.compile("rope|rotary|yarn")
OUTER_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta")
