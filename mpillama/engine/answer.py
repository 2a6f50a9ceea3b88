"""An answer as it grows token by token: its text, and when it ends."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from mpillama.text.sampling_params import SamplingParams
from mpillama.text.stop import StopStrings
from mpillama.text.tokenizer import Tokenizer


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
