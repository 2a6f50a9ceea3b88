"""The tokenize and detokenize endpoints, and limits on the amount of text in a request."""

import json
from collections.abc import Sequence
from typing import Any

from mpillama.errors import UserError
from mpillama.openai.bodies import DetokenizeBody, TokenizeBody
from mpillama.openai.messages import Message
from mpillama.server.async_engine import ServerState
from mpillama.server.errors import AsciiJson, Refused, Unprocessable
from mpillama.server.preparing import Pause

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
