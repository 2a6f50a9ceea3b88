"""The one list of sampling fields.

Command-line options, bodies of the API, the chat page's settings, `batch`'s check of what it continues, and `LLM` take
theirs from here.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mpillama.errors import UserError


@dataclass(frozen=True)
class Number:
    """Which numbers are allowed: from `ge` or above `gt`, up to `le` or below `lt`."""

    kind: type[int] | type[float]
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, self.kind if self.kind is int else int | float):
            return False
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    @property
    def limits(self) -> dict[str, Any]:
        """By the names that pydantic gives them."""
        limits = {"ge": self.ge, "gt": self.gt, "le": self.le, "lt": self.lt}
        return {name: limit for name, limit in limits.items() if limit is not None}


@dataclass(frozen=True)
class About:
    """What is known of a field beside its default.

    `values` are those that it may have. `option` is the help of the command-line option (None: there is none), in which
    `when_none` describes the default None; where `values` are not a Number the option takes several texts, each made a
    value by `read`. `asked` are the values that a request may have. `hint` is what the chat page says of it (None: it
    is not among the page's settings).
    """

    values: Number | Callable[[Any], bool]
    range: str
    option: str | None = None
    metavar: str | None = None
    read: Callable[[str], Any] = str
    when_none: str | None = None
    asked: Number | None = None
    hint: str | None = None

    def is_valid(self, value: Any, default: Any) -> bool:
        """Whether the field may have a value."""
        if value is None:
            return default is None or self.when_none is not None
        return value in self.values if isinstance(self.values, Number) else self.values(value)


def _param(default: Any, values: Number | Callable[[Any], bool], range_: str, **about: Any) -> Any:
    """A field; `about` are the others of About."""
    metadata = {"about": About(values, range_, **about)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


COUNT, SHARE, PENALTY = Number(int, ge=0), Number(float, ge=0, le=1), Number(float, ge=-2, le=2)


def _is_bias(value: Any) -> bool:
    return all(isinstance(bias, int | float) and math.isfinite(bias) for bias in value.values())


def _read_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise UserError(f"--logit-bias {text!r} is not of the form ID=BIAS, for example 42=-1.5.") from error


def _is_texts(value: Any) -> bool:
    return all(isinstance(text, str) and text for text in ([value] if isinstance(value, str) else value))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How an answer is sampled, and when it ends; the names are vLLM's, the defaults those of the command line.

    A token is chosen by `logit_bias`, penalties, `temperature`, `top_k`, `top_p` and `min_p`, in this order. The
    same `seed` gives the same answer on any number of ranks; None draws a new one.

    An answer ends after `max_tokens` tokens (None: at the end of the context; 0: the prompt is computed, nothing is
    sampled), before the first of the `stop` strings, or at an end-of-text token unless `ignore_eos`.

    `n` answers are sampled for a prompt, all but the first with seeds derived from `seed`. `logprobs` is the number of
    most likely tokens to report for each token of the answer, beside the token itself; `prompt_logprobs` does so for
    the prompt. None reports nothing.

    UserError for a value outside its range.
    """

    n: int = _param(1, Number(int, ge=1), "a whole number, 1 or more")
    max_tokens: int | None = _param(
        256, COUNT, "a whole number, 0 or more",
        option="limit of the answer, in tokens", metavar="TOKENS", when_none="what the context holds",
        asked=Number(int, ge=1), hint="Length of an answer",
    )  # fmt: skip
    temperature: float = _param(
        0.8, Number(float, ge=0, lt=math.inf), "0 (greedy) or more",
        option="randomness; 0 always takes the most likely token", metavar="T",
        asked=Number(float, ge=0, le=2), hint="0 takes the most likely token",
    )  # fmt: skip
    top_k: int = _param(
        0, COUNT, "a whole number, 0 (off) or more",
        option="keep the K most likely tokens, 0 for all", metavar="K",
        asked=Number(int, ge=0), hint="Number of tokens kept",
    )  # fmt: skip
    top_p: float = _param(
        0.95, Number(float, gt=0, le=1), "above 0, up to 1 (off)",
        option="keep the most likely tokens up to this total probability", metavar="P",
        asked=Number(float, gt=0, le=1), hint="Total probability kept",
    )  # fmt: skip
    min_p: float = _param(
        0.0, SHARE, "0 (off) to 1",
        option="drop tokens less likely than this share of the most likely one", metavar="P",
        asked=SHARE, hint="Relative to the most likely",
    )  # fmt: skip
    repetition_penalty: float = _param(
        1.0, Number(float, gt=0, lt=math.inf), "above 0; 1 is off",
        option="divide the logits of tokens already in prompt or answer", metavar="X",
        asked=Number(float, ge=0.01, le=100), hint="1 is none",
    )  # fmt: skip
    presence_penalty: float = _param(
        0.0, PENALTY, "-2 to 2; 0 is off",
        option="subtract from the logits of tokens already in the answer", metavar="X", asked=PENALTY, hint="0 is none",
    )  # fmt: skip
    frequency_penalty: float = _param(
        0.0, PENALTY, "-2 to 2; 0 is off",
        option="subtract from logits, once for each time in the answer", metavar="X", asked=PENALTY, hint="0 is none",
    )  # fmt: skip
    logit_bias: Mapping[int, float] = _param(
        {}, _is_bias, "finite numbers by token id",
        option="add to the logits of these tokens, before anything else: ID=BIAS ...", metavar="ID=BIAS",
        read=_read_bias,
    )  # fmt: skip
    seed: int | None = _param(
        None, COUNT, "a whole number, 0 or more",
        option="the same seed gives the same text", metavar="N", when_none="a new one, reported",
        asked=Number(int, ge=0, le=2**53 - 1), hint="The same seed, the same answer",
    )  # fmt: skip
    stop: str | Sequence[str] = _param(
        (), _is_texts, "texts, none of them empty", option="stop before any of these texts", metavar="TEXT"
    )
    ignore_eos: bool = _param(False, lambda value: isinstance(value, bool), "true or false")
    logprobs: int | None = _param(None, COUNT, "a whole number, 0 or more")
    prompt_logprobs: int | None = _param(None, COUNT, "a whole number, 0 or more")

    def __post_init__(self) -> None:
        for name, about in self.about().items():
            value = getattr(self, name)
            if not about.is_valid(value, self.__dataclass_fields__[name].default):
                raise UserError(f"{name} is {value}, but must be {about.range}; correct this sampling option.")

    @classmethod
    def about(cls) -> dict[str, About]:
        """What is known of each field, by its name."""
        return {each.name: each.metadata["about"] for each in fields(cls)}

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, also where a single one was given as a text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def penalises(self) -> bool:
        """Whether scores depend on the tokens so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def room_for(self, sampled: int, context_left: int) -> int:
        """How many tokens may follow `sampled` ones, with room for `context_left` more in the context."""
        return context_left if self.max_tokens is None else min(context_left, self.max_tokens - sampled)


def new_seed() -> int:
    """A random seed below 2^53, exact in any JSON reader."""
    return int.from_bytes(os.urandom(7)) >> 3
