"""The one list of sampling fields: command-line options, bodies of the API, and `LLM` take theirs from here."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mpillama.errors import UserError

Check = Callable[[Any], bool]


def _param(default: Any, is_valid: Check, range_: str, option: str | None = None, metavar: str | None = None) -> Any:
    """A field with its range as a check and in words; `option` is the help of the command-line option, if it is one."""
    metadata = {"is_valid": is_valid, "range": range_, "option": option, "metavar": metavar}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def _number(is_valid: Callable[[float], bool]) -> Check:
    return lambda value: isinstance(value, int | float) and is_valid(value)


def _whole(least: int) -> Check:
    return lambda value: isinstance(value, int) and value >= least


def _whole_or_none(least: int) -> Check:
    return lambda value: value is None or _whole(least)(value)


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

    n: int = _param(1, _whole(1), "a whole number, 1 or more")
    max_tokens: int | None = _param(
        256, _whole_or_none(0), "a whole number, 0 or more", "most tokens to generate", "TOKENS"
    )
    temperature: float = _param(
        0.8,
        _number(lambda v: 0 <= v < math.inf),
        "0 (greedy) or more",
        "randomness; 0 always takes the likeliest token",
        "T",
    )
    top_k: int = _param(0, _whole(0), "a whole number, 0 (off) or more", "keep the K likeliest tokens, 0 for all", "K")
    top_p: float = _param(
        0.95,
        _number(lambda v: 0 < v <= 1),
        "above 0, up to 1 (off)",
        "keep the likeliest tokens up to this probability together",
        "P",
    )
    min_p: float = _param(
        0.0, _number(lambda v: 0 <= v <= 1), "0 (off) to 1", "drop tokens below this share of the likeliest one", "P"
    )
    repetition_penalty: float = _param(
        1.0, _number(lambda v: 0 < v < math.inf), "above 0; 1 is off", "divide the logits of tokens seen before", "X"
    )
    presence_penalty: float = _param(
        0.0, _number(lambda v: -2 <= v <= 2), "-2 to 2; 0 is off", "subtract once from tokens generated before", "X"
    )
    frequency_penalty: float = _param(
        0.0, _number(lambda v: -2 <= v <= 2), "-2 to 2; 0 is off", "subtract for each time a token was generated", "X"
    )
    logit_bias: Mapping[int, float] = _param(
        {},
        lambda v: all(map(_number(math.isfinite), v.values())),
        "finite numbers by token id",
        "add to the logits of tokens before anything else: ID=BIAS ...",
        "ID=BIAS",
    )
    seed: int | None = _param(
        None, _whole_or_none(0), "a whole number, 0 or more", "the same seed gives the same text", "N"
    )
    stop: str | Sequence[str] = _param(
        (), lambda v: all(isinstance(text, str) for text in v), "texts", "end before any of these texts", "TEXT"
    )
    ignore_eos: bool = _param(False, lambda v: isinstance(v, bool), "true or false")
    logprobs: int | None = _param(None, _whole_or_none(0), "a whole number, 0 or more")
    prompt_logprobs: int | None = _param(None, _whole_or_none(0), "a whole number, 0 or more")

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not each.metadata["is_valid"](value):
                raise UserError(
                    f"{each.name} is {value}, but must be {each.metadata['range']}; correct this sampling option."
                )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, also where a single one was given as a text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def room_for(self, sampled: int, context_left: int) -> int:
        """How many tokens may follow `sampled` ones, with room for `context_left` more in the context."""
        return context_left if self.max_tokens is None else min(context_left, self.max_tokens - sampled)
