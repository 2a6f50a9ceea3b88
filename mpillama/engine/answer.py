"""An answer as it grows token by token: its text, and when it ends."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from mpillama.errors import UserError
from mpillama.models.candidates import largest
from mpillama.text.sampling_params import SamplingParams
from mpillama.text.tokenizer import Tokenizer


class StopStrings:
    """Watches streamed text for stop strings; the one completed first wins, and the longest of those.

    The result does not depend on how the text is cut into pushes. UserError for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise UserError(
                "A stop string is empty and would stop before the first token; remove it or write its text."
            )
        self._stops = tuple(stops)
        self._held = ""
        self._reached = False

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to print now, and whether a stop string was reached (then and ever after)."""
        if self._reached:
            return "", True
        text = self._held + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        self._reached = bool(matches)
        safe = min(matches)[1] if matches else len(text) - self._possible_start(text)
        self._held = "" if matches else text[safe:]
        return text[:safe], self._reached

    def finish(self) -> str:
        """The text still held back when the generation ends without a stop string."""
        rest, self._held = self._held, ""
        return rest

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string may begin."""
        longest = min(max(map(len, self._stops), default=0) - 1, len(text))
        ends = (size for size in range(longest, 0, -1) if self._begins_a_stop(text[-size:]))
        return next(ends, 0)

    def _begins_a_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


@dataclass(frozen=True)
class Mark:
    """A token that divides an answer into parts: the how many-th of its tokens, and where its text is.

    A special token has no text (`start` is `end`); its place is kept all the same.
    """

    index: int
    token: int
    start: int
    end: int


@dataclass
class Answer:
    """Tokens and text so far; finish_reason is None while it grows.

    Then "stop" (an end-of-text token or a stop string), "length" (max_tokens or the context's end), or what an engine
    sets.
    """

    tokenizer: Tokenizer
    params: SamplingParams
    keep_special: bool = False
    marking: Collection[int] = ()
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    marks: list[Mark] = field(default_factory=list)
    """The tokens among `marking`; their places count in the text as decoded, some of which may be held back still."""
    after: Sequence[int] = ()
    """The tokens whose text this one continues; without them it begins as a text does, without a space in front."""

    def __post_init__(self) -> None:
        self._stream = self.tokenizer.stream(skip_special=not self.keep_special, after=self.after)
        self._stop = StopStrings(self.params.stops)
        self._decoded = 0

    def push(self, token: int, room: int) -> str:
        """Take a sampled token and return the text that is safe to print.

        `room`: how many more tokens the context holds after this one; at 0 the answer ends.
        """
        self.token_ids.append(token)
        if token in self.tokenizer.eos_token_ids and not self.params.ignore_eos:
            return self.finish("stop")
        decoded = self._stream.push(token)
        self._decoded += len(decoded)
        if token in self.marking:
            self.marks.append(self._mark(token, decoded))
        piece, stopped = self._stop.push(decoded)
        self.text += piece
        if stopped:
            self.finish_reason = "stop"
        elif self.params.room_for(len(self.token_ids), room) <= 0:
            piece += self.finish("length")
        return piece

    def _mark(self, token: int, decoded: str) -> Mark:
        name = self.tokenizer.token(token) or ""
        # A character that the token left unfinished may come before it.
        length = len(name) if name and decoded.endswith(name) else 0
        return Mark(len(self.token_ids) - 1, token, self._decoded - length, self._decoded)

    def finish(self, reason: str) -> str:
        """End the answer and return the text that was held back."""
        rest, stopped = self._stop.push(self._stream.finish())
        rest += "" if stopped else self._stop.finish()
        self.text += rest
        self.finish_reason = "stop" if stopped else reason
        return rest


# -- logprobs ---------------------------------------------------------------------------------------------------------


FEWEST = 16
"""To look for fewer of the likeliest tokens than this takes longer."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-probability, the likeliest tokens with theirs, and its place among all of them, from 1 on."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    rank: int


class LogprobRecorder:
    """Notes each token's log-probability, and those of so many `alternatives`."""

    def __init__(self, alternatives: int):
        self.alternatives = alternatives
        self._noted: list[TokenLogprob] = []

    def __call__(self, logits: np.ndarray, token: int) -> None:
        """A token was chosen from float32 [vocab_size] logits, or stands in the prompt where they were computed."""
        best = largest(logits, max(self.alternatives, FEWEST))[: self.alternatives].tolist()
        total = log_sum(logits)
        top = [(one, float(logits[one]) - total) for one in best]
        rank = int(np.count_nonzero(logits > logits[token])) + 1
        self._noted.append(TokenLogprob(token, float(logits[token]) - total, top, rank))

    def take(self) -> list[TokenLogprob]:
        """What was noted since the last call."""
        noted, self._noted = self._noted, []
        return noted


def recorder(alternatives: int | None) -> LogprobRecorder | None:
    """What notes log-probabilities where they are asked for."""
    return None if alternatives is None else LogprobRecorder(alternatives)


def noted(callback: object) -> list[TokenLogprob] | None:
    """What the recorder among a request's callbacks has noted since the last call; None without one."""
    return callback.take() if isinstance(callback, LogprobRecorder) else None


def log_sum(logits: np.ndarray) -> float:
    """The logarithm of the sum of exponentials, in float64."""
    highest = float(logits.max())
    wide = logits.astype(np.float64)
    wide -= highest
    return highest + math.log(float(np.exp(wide, out=wide).sum()))
