"""The tokenize and detokenize endpoints, and limits on the amount of text in a request."""

import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpillama.engine.answer import TokenLogprob
from mpillama.errors import UserError
from mpillama.openai.messages import Message
from mpillama.openai.served import DetokenizeBody, TokenizeBody
from mpillama.server.async_engine import ServerState
from mpillama.server.errors import AsciiJson, Refused, Unprocessable
from mpillama.server.preparing import Pause
from mpillama.text.tokenizer import REPLACEMENT, Tokenizer

MOST_BYTES = 1 << 20
BYTES_OF_TOKEN = 16
"""More than any text averages, so a prompt that fits the context is never refused."""
LONGEST_TOKEN = 256
"""Characters that a token has at most."""
BYTES_OF_MESSAGE = 16
"""Overhead of a message besides its fields."""
IDS_OF_BYTES = 4
"""Bytes of text that cost as much as one id."""


def most_bytes(state: ServerState) -> int:
    return max(MOST_BYTES, BYTES_OF_TOKEN * state.max_model_len)


def check_text(state: ServerState, text: str, place: str) -> None:
    """Refused if `text` is too large to tokenize."""
    check_bytes(state, size(text), place)


def check_bytes(state: ServerState, count: int, place: str) -> None:
    """Refused if so many bytes are too many to tokenize."""
    if count > most_bytes(state):
        reason = f"{count} bytes of text are more than the {most_bytes(state)} that this server tokenizes at once"
        raise Refused(400, f"{place}: {reason}: divide them", place, "context_length_exceeded")


def check_prompt_text(state: ServerState, count: int, place: str) -> None:
    """Refused if a prompt of so many bytes cannot fit the context."""
    check_bytes(state, count, place)
    if count > state.max_model_len * LONGEST_TOKEN:
        reason = f"{count} bytes are more than the context's {state.max_model_len} tokens can be"
        raise Refused(400, f"{place}: {reason}", place, "context_length_exceeded")


def check_ids(state: ServerState, count: int, place: str) -> None:
    """Refused if so many ids are too many to detokenize."""
    most = max(state.max_model_len, most_bytes(state) // IDS_OF_BYTES)
    if count > most:
        raise Refused(400, f"{place}: {count} ids are more than {most}: divide them", place)


def size(text: str) -> int:
    """Size in bytes; in characters if that alone exceeds every limit."""
    return len(text) if len(text) > MOST_BYTES * BYTES_OF_TOKEN else len(text.encode(errors="surrogatepass"))


def size_of_chat(messages: Sequence[Message], *others: Any) -> int:
    """Bytes passed to the chat template; `others` (tools, variables) count as JSON."""
    told = sum(BYTES_OF_MESSAGE + _size_of_json(message.for_template()) for message in messages)
    return told + sum(_size_of_json(other) for other in others if other)


def _size_of_json(value: Any) -> int:
    return size(json.dumps(value, ensure_ascii=False))


def tokenized(state: ServerState, body: TokenizeBody, pause: Pause) -> AsciiJson:
    """The ids of a text, or of a conversation as the model sees it."""
    place = "content" if body.messages is None else "messages"
    try:
        ids = _ids(state, body)
    except UserError as error:
        raise Unprocessable(str(error), place) from error
    pause()
    found = {"tokens": ids, "count": len(ids), "max_model_len": state.max_model_len}
    if body.with_pieces:
        pieces = {token: state.prompter.tokenizer.token_text(token) for token in set(ids)}
        found["pieces"] = [pieces[token] for token in ids]
    return AsciiJson(found)


def _ids(state: ServerState, body: TokenizeBody) -> list[int]:
    if body.messages is None:
        text = body.content or body.prompt or ""
        check_text(state, text, "content")
        return state.prompter.tokenizer.encode(text, add_bos=body.add_special_tokens)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    check_bytes(state, size_of_chat(body.messages, tools, body.template_variables), "messages")
    return state.prompter.chat_ids(body.messages, tools or None, body)


def detokenized(state: ServerState, body: DetokenizeBody) -> AsciiJson:
    check_ids(state, len(body.tokens), "tokens")
    if max(body.tokens, default=0) >= state.prompter.vocab_size:
        raise Refused(400, f"tokens: ids are below {state.prompter.vocab_size}", "tokens")
    text = state.prompter.tokenizer.decode(body.tokens, False)
    return AsciiJson({"content": text, "prompt": text})


# -- Names of an answer's tokens in log-probabilities; joined they are its text ---------------------------------------


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
