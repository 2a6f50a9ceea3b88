"""Names of an answer's tokens, and their log-probabilities as the API tells them; joined, the names are the text."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpillama.engine.answer import TokenLogprob
from mpillama.text.tokenizer import REPLACEMENT, Tokenizer

Json = dict[str, Any]
LOWEST = -9999.0
"""What OpenAI's API says for a token that is all but impossible; JSON knows no infinity."""


@dataclass(frozen=True)
class NamedToken:
    """A token, what it adds to the text, and where that begins and ends in it.

    Parts of characters are named by their bytes; they begin where their character does. A token that `begins_text` may
    have lost the space in front of it.
    """

    token: int
    name: str
    start: int
    end: int
    is_part: bool = False
    begins_text: bool = False
    found: TokenLogprob | None = None

    def cut(self, end: int) -> "NamedToken":
        """What is left of it in a text of `end` characters."""
        if self.is_part and self.start < end:
            return self
        return replace(self, name=self.name[: max(0, end - self.start)], start=min(self.start, end))

    def of(self, found: TokenLogprob) -> "NamedToken":
        return replace(self, found=found)


class TokenNames:
    """Names the tokens of a text that grows; a token that the text does not show has an empty name.

    So have control tokens, and those of a stop string. `after` are the tokens before the text, which has `start`
    characters already. Names are given with their text: both are held back where a stop string may have begun.
    """

    def __init__(self, tokenizer: Tokenizer, keep_special: bool, after: Sequence[int] = (), start: int = 0):
        self._tokenizer = tokenizer
        self._keep_special = keep_special
        self._stream = tokenizer.stream(skip_special=not keep_special, after=after)
        self._decoded = self._visible = start
        self._text: list[str] = []
        self._held: deque[NamedToken] = deque()

    def push(self, found: Iterable[TokenLogprob], text: str, is_finished: bool) -> list[NamedToken]:
        """Take tokens, and text that can be seen from now on; those whose text that is."""
        self._held.extend(self.name(one.token).of(one) for one in found)
        self._visible += len(text)
        ready = []
        while self._held and (is_finished or self._held[0].end <= self._visible):
            ready.append(self._held.popleft())
        return [one.cut(self._visible) for one in ready] if is_finished else ready

    def name(self, token: int) -> NamedToken:
        """The next token, as if no text were held back."""
        start, fresh = self._decoded, self._stream.push(token)
        self._decoded += len(fresh)
        self._text.append(fresh)
        if not self._tokenizer.token(token, skip_special=not self._keep_special):
            return NamedToken(token, "", self._decoded, self._decoded)
        name = self._tokenizer.token_text(token)
        if self._tokenizer.is_part(token):
            return NamedToken(token, name, start, self._decoded, is_part=True)
        if not fresh.endswith(name) and REPLACEMENT not in name:
            # The decoder drops the space at the beginning of a text.
            return NamedToken(token, fresh, start, self._decoded, begins_text=True)
        return NamedToken(token, name, self._decoded - len(name), self._decoded)

    @property
    def text(self) -> str:
        """What the tokens have added so far."""
        return "".join(self._text)

    def finish(self) -> str:
        """What the text ends with if its last character is not whole."""
        return self._stream.finish()


def alternatives(tokenizer: Tokenizer, token: NamedToken) -> list[tuple[int, str, float]]:
    """Id, name and log-probability of the likeliest tokens in the place of one, named as it is."""
    top = token.found.top if token.found else []
    named = [(other, tokenizer.token_text(other), max(value, LOWEST)) for other, value in top]
    return [(i, n.removeprefix(" "), v) for i, n, v in named] if token.begins_text else named


def prompt_logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogprob], most: int) -> list[Json | None]:
    """The log-probabilities of a prompt in vLLM's form: for each token itself and the likeliest ones, by their ids."""
    return [None, *(_by_id(tokenizer, one, most) for one in found)]


def _by_id(tokenizer: Tokenizer, found: TokenLogprob, most: int) -> Json:
    ranked = [(found.token, found.logprob, found.rank)]
    ranked += [(token, value, rank) for rank, (token, value) in enumerate(found.top[:most], 1) if token != found.token]
    return {
        str(token): {"logprob": max(value, LOWEST), "rank": rank, "decoded_token": tokenizer.token_text(token)}
        for token, value, rank in ranked
    }


def chat_logprob(tokenizer: Tokenizer, token: NamedToken) -> Json:
    """A token's log-probability with its alternatives."""
    assert token.found is not None
    data = tokenizer.token_bytes(token.token) if token.is_part else token.name.encode()
    own = _logprob(token.name, data if token.name else b"", token.found.logprob)
    top = [
        _logprob(name, tokenizer.token_bytes(other) if tokenizer.is_part(other) else name.encode(), value)
        for other, name, value in alternatives(tokenizer, token)
    ]
    return {**own, "top_logprobs": top}


def _logprob(name: str, data: bytes | None, value: float) -> Json:
    return {"token": name, "logprob": max(value, LOWEST), "bytes": None if data is None else list(data)}
