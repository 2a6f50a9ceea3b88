"""The events of a streamed response, made of the pieces of a chat's answer; together they are the response."""

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass
class TextItem:
    """A message, or what the model thought: an item with one part, whose text grows."""

    index: int
    is_thought: bool
    id: str = ""
    text: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = new_id("rs" if self.is_thought else "msg")
        self.name = "reasoning_text" if self.is_thought else "output_text"
        self.place: Json = {"item_id": self.id, "output_index": self.index, "content_index": 0}

    def begin(self) -> Iterator[Json]:
        yield {"type": "response.output_item.added", "output_index": self.index, "item": self._item("in_progress", [])}
        yield {"type": "response.content_part.added", **self.place, "part": self._part("", [])}

    def push(self, text: str, logprobs: list[Json]) -> Iterator[Json]:
        self.text.append(text)
        self.logprobs += logprobs
        more = {} if self.is_thought else {"logprobs": logprobs}
        if text or logprobs:
            yield {"type": f"response.{self.name}.delta", **self.place, "delta": text, **more}

    def end(self, status: str) -> Iterator[Json]:
        text, item = "".join(self.text), self.whole(status)
        more = {} if self.is_thought else {"logprobs": self.logprobs}
        yield {"type": f"response.{self.name}.done", **self.place, "text": text, **more}
        yield {"type": "response.content_part.done", **self.place, "part": item["content"][0]}
        yield {"type": "response.output_item.done", "output_index": self.index, "item": item}

    def whole(self, status: str) -> Json:
        """The item with all of its text."""
        return self._item(status, [self._part("".join(self.text), self.logprobs)])

    def _part(self, text: str, logprobs: list[Json]) -> Json:
        part: Json = {"type": self.name, "text": text}
        return part if self.is_thought else {**part, "annotations": [], "logprobs": list(logprobs)}

    def _item(self, status: str, content: list[Json]) -> Json:
        if self.is_thought:
            return {"id": self.id, "type": "reasoning", "summary": [], "content": content, "status": status}
        return {"id": self.id, "type": "message", "role": "assistant", "content": content, "status": status}


@dataclass
class CallItem:
    """A call of a function, whose arguments grow."""

    index: int
    call_id: str
    name: str
    id: str = ""
    arguments: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = new_id("fc")
        self.place: Json = {"item_id": self.id, "output_index": self.index}

    def begin(self) -> Iterator[Json]:
        yield {"type": "response.output_item.added", "output_index": self.index, "item": self.whole("in_progress")}

    def push(self, arguments: str) -> Iterator[Json]:
        self.arguments.append(arguments)
        yield {"type": "response.function_call_arguments.delta", **self.place, "delta": arguments}

    def end(self, status: str) -> Iterator[Json]:
        item = self.whole(status)
        done = {"name": self.name, "arguments": item["arguments"]}
        yield {"type": "response.function_call_arguments.done", **self.place, **done}
        yield {"type": "response.output_item.done", "output_index": self.index, "item": item}

    def whole(self, status: str) -> Json:
        """The item with all of its arguments."""
        given = {"call_id": self.call_id, "name": self.name, "arguments": "".join(self.arguments)}
        return {"id": self.id, "type": "function_call", **given, "status": status}


class ResponseWriter:
    """Takes the `choices` entries of a chat's stream and gives out events; `response` is what they have told."""

    def __init__(self, response: Json) -> None:
        self.response = {**response, "status": "in_progress", "output": []}
        self.begun = False
        self._sequence = 0
        self._item: TextItem | CallItem | None = None
        self._logprobs: list[Json] = []
        """Of tokens that are part of a character, or of a call, as long as that is open."""

    def begin(self) -> Iterator[Json]:
        """The response is under way; nothing more of that after the first time."""
        if self.begun:
            return
        self.begun = True
        yield self._numbered({"type": "response.created", "response": self._snapshot()})
        yield self._numbered({"type": "response.in_progress", "response": self._snapshot()})

    def push(self, entry: Json) -> Iterator[Json]:
        """What a piece of the answer adds."""
        delta = entry["delta"]
        if thought := delta.get("reasoning_content"):
            yield from self._add_text(thought, is_thought=True)
        self._logprobs += (entry["logprobs"] or {}).get("content") or ()
        if content := delta.get("content"):
            yield from self._add_text(content, is_thought=False)
        for call in delta.get("tool_calls") or ():
            yield from self._add_call(call)

    def end(self, finish_reason: str, usage: Json) -> Iterator[Json]:
        """The answer is over: complete, or cut at its limit."""
        is_cut = finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        answered = isinstance(self._item, CallItem) or (isinstance(self._item, TextItem) and not self._item.is_thought)
        if not answered and not is_cut:
            yield from self._begin(TextItem(self._index, is_thought=False))  # an empty answer is a message, too
        yield from self._close(status)
        self.response |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "completed_at": None if is_cut else int(time.time()),
            "usage": usage,
        }
        yield self._numbered({"type": f"response.{status}", "response": self._snapshot()})

    def fail(self, message: str, code: str) -> Iterator[Json]:
        if self._item is not None:
            self.response["output"].append(self._item.whole("incomplete"))
        self.response |= {"status": "failed", "error": {"code": code, "message": message}}
        yield self._numbered({"type": "response.failed", "response": self._snapshot()})

    @property
    def _index(self) -> int:
        return len(self.response["output"]) + (self._item is not None)

    def _add_text(self, text: str, is_thought: bool) -> Iterator[Json]:
        if not isinstance(self._item, TextItem) or self._item.is_thought != is_thought:
            yield from self._begin(TextItem(self._index, is_thought))
        assert isinstance(self._item, TextItem)
        logprobs, self._logprobs = ([], self._logprobs) if is_thought else (self._logprobs, [])
        yield from map(self._numbered, self._item.push(text, logprobs))

    def _add_call(self, call: Json) -> Iterator[Json]:
        function = call["function"]
        self._logprobs = []
        if "id" in call:
            yield from self._begin(CallItem(self._index, call["id"], function["name"]))
        assert isinstance(self._item, CallItem)
        yield from map(self._numbered, self._item.push(function["arguments"]))

    def _begin(self, item: TextItem | CallItem) -> Iterator[Json]:
        yield from self._close("completed")
        self._item = item
        yield from map(self._numbered, item.begin())

    def _close(self, status: str) -> Iterator[Json]:
        if self._item is None:
            return
        if isinstance(self._item, TextItem) and not self._item.is_thought and self._logprobs:
            yield from map(self._numbered, self._item.push("", self._logprobs))
        self._logprobs = []
        yield from map(self._numbered, self._item.end(status))
        self.response["output"].append(self._item.whole(status))
        self._item = None

    def _numbered(self, event: Json) -> Json:
        number, self._sequence = self._sequence, self._sequence + 1
        return {**event, "sequence_number": number}

    def _snapshot(self) -> Json:
        return {**self.response, "output": list(self.response["output"])}


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
