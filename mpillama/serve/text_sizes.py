"""How much text a request may bring: refused by its size before anything is done with it."""

import json
from collections.abc import Sequence
from typing import Any

from mpillama.api.messages import Message
from mpillama.serve.async_engine import ServerState
from mpillama.serve.errors import Refused

MOST_BYTES = 1 << 20
BYTES_OF_TOKEN = 16
"""More than any text has on average, so that what fills the context is never refused."""
LONGEST_TOKEN = 256
"""Characters that a token has at most."""
BYTES_OF_MESSAGE = 16
"""What a message costs beside its fields."""
IDS_OF_BYTES = 4
"""Bytes of text, for each of which an id costs as much."""


def most_bytes(state: ServerState) -> int:
    """Of a text, for every path."""
    return max(MOST_BYTES, BYTES_OF_TOKEN * state.max_model_len)


def check_text(state: ServerState, text: str, place: str) -> None:
    """Refused if `text` is too large to be tokenized."""
    check_bytes(state, size(text), place)


def check_bytes(state: ServerState, count: int, place: str) -> None:
    """Refused if so many bytes are too many to be tokenized."""
    if count > most_bytes(state):
        reason = f"{count} bytes of text are more than the {most_bytes(state)} that this server tokenizes at once"
        raise Refused(400, f"{place}: {reason}: divide them", place, "context_length_exceeded")


def check_prompt_text(state: ServerState, count: int, place: str) -> None:
    """Refused if so many bytes are too many for a prompt, whatever they say."""
    check_bytes(state, count, place)
    if count > state.max_model_len * LONGEST_TOKEN:
        reason = f"{count} bytes are more than the context's {state.max_model_len} tokens can be"
        raise Refused(400, f"{place}: {reason}", place, "context_length_exceeded")


def check_ids(state: ServerState, count: int, place: str) -> None:
    """Refused if so many ids are too many to become a text."""
    most = max(state.max_model_len, most_bytes(state) // IDS_OF_BYTES)
    if count > most:
        raise Refused(400, f"{place}: {count} ids are more than {most}: divide them", place)


def size(text: str) -> int:
    """Bytes, or characters if these are too many already."""
    return len(text) if len(text) > MOST_BYTES * BYTES_OF_TOKEN else len(text.encode(errors="surrogatepass"))


def size_of_chat(messages: Sequence[Message], *others: Any) -> int:
    """Bytes that a chat template is given: `others` are tools and variables, as JSON."""
    told = sum(BYTES_OF_MESSAGE + _size_of_json(message.for_template()) for message in messages)
    return told + sum(_size_of_json(other) for other in others if other)


def _size_of_json(value: Any) -> int:
    return size(json.dumps(value, ensure_ascii=False))
