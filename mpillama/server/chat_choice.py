"""A choice of a chat completion, and the entries of an embeddings response."""

import base64
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpillama.openai.answer_parts import Part, PartParser
from mpillama.openai.served import ServedChat
from mpillama.openai.tool_calls import Delta, ToolCallParser
from mpillama.server.async_engine import ServerState
from mpillama.server.engine_requests import Output, ServerRequest
from mpillama.server.requests import thought_parser, used_tools
from mpillama.server.tokenizing import LOWEST, NamedToken, TokenNames, alternatives, prompt_logprobs
from mpillama.text.tokenizer import Tokenizer

Json = dict[str, Any]


class ChatChoice:
    """The message that answers a conversation; with a `parser`, up to `most_calls` calls of tools are found.

    With `thoughts`, what a reasoning model thinks is told apart from what it says.
    """

    def __init__(
        self, index: int, tokenizer: Tokenizer, parser: ToolCallParser | None, wants_logprobs: bool,
        most_calls: float = math.inf, thoughts: PartParser | None = None, request: ServerRequest | None = None,
    ):  # fmt: skip
        self.most_calls = most_calls
        self.thoughts = thoughts
        self.index = index
        self.tokenizer = tokenizer
        self.parser = parser
        self.wants_logprobs = wants_logprobs
        self.finish_reason: str | None = None
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[Json] = []
        self._logprobs: list[Json] = []
        self._names = TokenNames(tokenizer, bool(request and request.keep_special), continued_text(request))
        self._prompt_wished = request.sampling.prompt_logprobs if request else None
        self._prompt: list[Json | None] | None = None

    def begin(self) -> Json:
        return self._entry({"role": "assistant", "content": ""}, [])

    def push(self, output: Output) -> list[Json]:
        if self._prompt_wished is not None and self._prompt is None:
            self._prompt = prompt_logprobs(self.tokenizer, output.prompt_logprobs, self._prompt_wished)
        named = self._names.push(output.logprobs, output.text, output.finished)
        logprobs = [chat_logprob(self.tokenizer, one) for one in named]
        self._logprobs += logprobs
        fields = [field for part in self._parts(output) for field in self._fields(part)]
        fields += self._end_of_calls() if output.finished else []
        entries = [self._entry(delta, logprobs if i == 0 else []) for i, delta in enumerate(fields)]
        if logprobs and not entries:
            entries = [self._entry({"content": ""}, logprobs)]
        if output.finished:
            called = self._calls and output.finish_reason == "stop"
            self.finish_reason = "tool_calls" if called else output.finish_reason
            entries.append({**self._entry({}, []), "finish_reason": self.finish_reason})
        return entries

    @property
    def reasoning_tokens(self) -> int:
        return self.thoughts.tokens if self.thoughts else 0

    def _parts(self, output: Output) -> list[Part]:
        if self.thoughts is None:
            return [Part(output.text)] if output.text else []
        parts = self.thoughts.push(output.text, len(output.token_ids), output.marks)
        return parts + (self.thoughts.finish() if output.finished else [])

    def _fields(self, part: Part) -> list[Json]:
        """The fields of `delta` that tell of a part of the answer."""
        if part.is_thought:
            self._reasoning.append(part.text)
            return [_reasoning(part.text)]
        if part.call is not None:
            return self._kept(self.parser.take(part.call) if self.parser else [Delta(part.call.arguments)])
        return self._kept([Delta(part.text)] if self.parser is None else self.parser.push(part.text))

    def _end_of_calls(self) -> list[Json]:
        return self._kept(self.parser.finish()) if self.parser else []

    def _kept(self, found: list[Delta]) -> list[Json]:
        deltas = [delta for delta in found if delta.call is None or delta.call.index < self.most_calls]
        self._keep(deltas)
        return [delta.fields() for delta in deltas]

    def _keep(self, deltas: list[Delta]) -> None:
        self._content += [delta.content for delta in deltas]
        for call in [delta.call for delta in deltas if delta.call]:
            if call.id:
                function = {"name": call.name, "arguments": call.arguments}
                self._calls.append({"id": call.id, "type": "function", "function": function})
            else:
                self._calls[call.index]["function"]["arguments"] += call.arguments

    def _entry(self, delta: Json, logprobs: list[Json]) -> Json:
        found = {"content": logprobs} if self.wants_logprobs and logprobs else None
        return {"index": self.index, "delta": delta, "logprobs": found, "finish_reason": None}

    @property
    def writes_prompt(self) -> bool:
        """Whether the next push takes long, since the prompt may be."""
        return self._prompt_wished is not None and self._prompt is None

    def beside(self) -> Json:
        """What a response says beside its choices, as vLLM does: the prompt is that of all of them."""
        return {} if self._prompt is None else {"prompt_logprobs": self._prompt}

    def whole(self) -> Json:
        content = "".join(self._content)
        message: Json = {"role": "assistant", "content": content if content or not self._calls else None}
        if self._reasoning:
            message |= _reasoning("".join(self._reasoning))
        if self._calls:
            message["tool_calls"] = self._calls
        logprobs = {"content": self._logprobs} if self.wants_logprobs else None
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}


def continued_text(request: ServerRequest | None) -> Sequence[int]:
    """The tokens whose text the answer goes on with."""
    return request.prompt_ids if request and request.continues else ()


def chat_choices(state: ServerState, body: ServedChat) -> Callable[[int, ServerRequest], ChatChoice]:
    """What makes the answer to each of a chat's requests."""
    tools = used_tools(body)
    names = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools or ()}

    def choice(index: int, request: ServerRequest) -> ChatChoice:
        parser = state.tools.parser(names=names) if tools and state.tools else None
        most = 1 if body.parallel_tool_calls is False else math.inf
        thoughts = thought_parser(state, body, request)
        return ChatChoice(index, state.prompter.tokenizer, parser, bool(body.logprobs), most, thoughts, request)

    return choice


def _reasoning(text: str) -> Json:
    """A thought under both of its names: DeepSeek's, which most clients know, and the one that vLLM has now."""
    return {"reasoning_content": text, "reasoning": text}


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


def shortened(embedding: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first numbers of an embedding, of length 1 again."""
    if dimensions is None:
        return embedding
    part = embedding[:dimensions]
    length = float(np.linalg.norm(part))
    return part / length if length else part


def embedding_entry(index: int, embedding: np.ndarray, base64_wanted: bool) -> Json:
    """An embedding, as numbers or as base64 of float32."""
    vector = embedding.astype("<f4")
    encoded = base64.b64encode(vector.tobytes()).decode() if base64_wanted else vector.tolist()
    return {"object": "embedding", "index": index, "embedding": encoded}
