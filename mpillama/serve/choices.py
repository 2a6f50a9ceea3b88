"""One answer of a request in OpenAI's words: a chat's message, or a completion's text."""

import base64
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mpillama.api.reasoning import Part, ThoughtParser
from mpillama.api.served import ServedChat
from mpillama.api.tool_calls import Delta, ToolCallParser
from mpillama.serve.front import Service
from mpillama.serve.tasks import Progress, Task, TokenLogprob
from mpillama.serve.tasks_of import thought_parser, used_tools
from mpillama.text.tokenizer import Tokenizer

Json = dict[str, Any]


class ChatChoice:
    """The message that answers a conversation; with a `parser`, up to `most_calls` calls of tools are found.

    With `thoughts`, what a reasoning model thinks is told apart from what it says.
    """

    def __init__(
        self, index: int, tokenizer: Tokenizer, parser: ToolCallParser | None, wants_logprobs: bool,
        most_calls: float = math.inf, thoughts: ThoughtParser | None = None,
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

    def begin(self) -> Json:
        """The entry that says who speaks."""
        return self._entry({"role": "assistant", "content": ""}, [])

    def push(self, progress: Progress) -> list[Json]:
        """Take progress; entries of a stream."""
        logprobs = [chat_logprob(self.tokenizer, one) for one in progress.logprobs]
        self._logprobs += logprobs
        fields = [field for part in self._parts(progress) for field in self._fields(part)]
        fields += self._end_of_calls() if progress.finish_reason is not None else []
        entries = [self._entry(delta, logprobs if i == 0 else []) for i, delta in enumerate(fields)]
        if logprobs and not entries:
            entries = [self._entry({"content": ""}, logprobs)]
        if progress.finish_reason is not None:
            called = self._calls and progress.finish_reason == "stop"
            self.finish_reason = "tool_calls" if called else progress.finish_reason
            entries.append({**self._entry({}, []), "finish_reason": self.finish_reason})
        return entries

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of the thought so far."""
        return self.thoughts.tokens if self.thoughts else 0

    def _parts(self, progress: Progress) -> list[Part]:
        if self.thoughts is None:
            return [Part(progress.text)] if progress.text else []
        parts = self.thoughts.push(progress.text, len(progress.token_ids), progress.marks)
        return parts + (self.thoughts.finish() if progress.finish_reason is not None else [])

    def _fields(self, part: Part) -> list[Json]:
        """The fields of `delta` that tell of a part of the answer."""
        if part.is_thought:
            self._reasoning.append(part.text)
            return [_reasoning(part.text)]
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

    def whole(self) -> Json:
        """The entry with the whole message."""
        content = "".join(self._content)
        message: Json = {"role": "assistant", "content": content if content or not self._calls else None}
        if self._reasoning:
            message |= _reasoning("".join(self._reasoning))
        if self._calls:
            message["tool_calls"] = self._calls
        logprobs = {"content": self._logprobs} if self.wants_logprobs else None
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}


def chat_choices(service: Service, body: ServedChat) -> Callable[[int, Task], ChatChoice]:
    """What makes the answer to each of a chat's tasks."""
    tools = used_tools(body)
    names = {tool["function"]["name"] for tool in tools or ()}

    def choice(index: int, task: Task) -> ChatChoice:
        parser = service.tools.parser(names=names) if tools and service.tools else None
        most = 1 if body.parallel_tool_calls is False else math.inf
        thoughts = thought_parser(service, body, task)
        return ChatChoice(index, service.prompter.tokenizer, parser, bool(body.logprobs), most, thoughts)

    return choice


def _reasoning(text: str) -> Json:
    """A thought under both of its names: DeepSeek's, which most clients know, and the one that vLLM has now."""
    return {"reasoning_content": text, "reasoning": text}


class CompletionChoice:
    """The text that continues a prompt."""

    def __init__(self, index: int, tokenizer: Tokenizer, wants_logprobs: bool):
        self.index = index
        self.tokenizer = tokenizer
        self.wants_logprobs = wants_logprobs
        self.finish_reason: str | None = None
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._offset = 0

    reasoning_tokens = None
    """A text has no parts."""

    def begin(self) -> None:
        """A stream of text says nothing first."""

    def push(self, progress: Progress) -> list[Json]:
        """Take progress; entries of a stream."""
        self._text.append(progress.text)
        self._logprobs += progress.logprobs
        self.finish_reason = progress.finish_reason
        if not (progress.text or progress.logprobs or progress.finish_reason):
            return []
        return [self._entry(progress.text, progress.logprobs)]

    def whole(self) -> Json:
        """The entry with the whole text."""
        self._offset = 0
        return self._entry("".join(self._text), self._logprobs)

    def _entry(self, text: str, logprobs: Any) -> Json:
        found = self._tokens(logprobs) if self.wants_logprobs else None
        return {"index": self.index, "text": text, "logprobs": found, "finish_reason": self.finish_reason}

    def _tokens(self, logprobs: list[TokenLogprob]) -> Json:
        """As the older API lists them: columns of equal length."""
        name = self.tokenizer.token_text
        tokens, offsets = [name(one.token) for one in logprobs], []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [{name(token): value for token, value in one.top} for one in logprobs],
            "text_offset": offsets,
        }


def chat_logprob(tokenizer: Tokenizer, found: TokenLogprob) -> Json:
    """A token's log-probability with its alternatives."""
    top = [_logprob(tokenizer, token, value) for token, value in found.top]
    return {**_logprob(tokenizer, found.token, found.logprob), "top_logprobs": top}


def _logprob(tokenizer: Tokenizer, token: int, value: float) -> Json:
    data = tokenizer.token_bytes(token)
    known = None if data is None else list(data)
    return {"token": tokenizer.token_text(token), "logprob": max(value, -9999.0), "bytes": known}


def embedding_entry(index: int, embedding: np.ndarray, base64_wanted: bool) -> Json:
    """An embedding, as numbers or as base64 of float32."""
    vector = embedding.astype("<f4")
    encoded = base64.b64encode(vector.tobytes()).decode() if base64_wanted else vector.tolist()
    return {"object": "embedding", "index": index, "embedding": encoded}
