"""Responses that clients may go on from, in memory: the longest unused ones go first."""

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mpillama.serve.errors import Refused
from mpillama.serve.responses_events import new_id

Json = dict[str, Any]
MOST_BYTES = 64 << 20
OVERHEAD = 1024
"""Bytes of a kept response besides its text, about."""


@dataclass(frozen=True)
class Kept:
    """A response and what it answered, as JSON; of what came before it only the name."""

    response: bytes
    input: tuple[bytes, ...]
    output: dict[str, bytes]
    previous: str | None

    @property
    def size(self) -> int:
        """Bytes."""
        return OVERHEAD + len(self.response) + sum(map(len, [*self.input, *self.output.values()]))

    def whole(self) -> Json:
        """The response as it was given."""
        return {**json.loads(self.response), "output": [json.loads(item) for item in self.output.values()]}


class ResponseStore:
    """Up to `most_bytes` of responses."""

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.most_bytes = most_bytes
        self.bytes = 0
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._items: dict[str, bytes] = {}

    def put(self, response: Json, items: tuple[bytes, ...]) -> None:
        """Keep a response that answers `items`; what is too large alone is not kept."""
        output = {item["id"]: _dump(item) for item in response["output"]}
        rest = {name: value for name, value in response.items() if name != "output"}
        kept = Kept(_dump(rest), items, output, response["previous_response_id"])
        self.bytes += kept.size
        self._kept[response["id"]] = kept
        self._items |= output
        while self.bytes > self.most_bytes:
            self._drop(next(iter(self._kept)))

    def get(self, name: str) -> Kept:
        """A kept response; Refused (404) if there is none."""
        if name not in self._kept:
            raise Refused(404, f"the response {name[:80]!r} is not kept here (any more)", "response_id")
        self._kept.move_to_end(name)
        return self._kept[name]

    def delete(self, name: str) -> None:
        """Forget a response; Refused (404) if there is none."""
        self.get(name)
        self._drop(name)

    def item(self, name: str) -> bytes | None:
        """An item of a kept response's output."""
        return self._items.get(name)

    def chain(self, name: str | None) -> list[Kept]:
        """A response and all before it, the first one first; Refused (404) if one is gone."""
        return list(self._backwards(name))[::-1]

    def _backwards(self, name: str | None) -> Iterator[Kept]:
        while name is not None:
            if name not in self._kept:
                place, code = "previous_response_id", "previous_response_not_found"
                raise Refused(404, f"{place}: {name[:80]!r} is not kept here (any more); send all items", place, code)
            self._kept.move_to_end(name)
            kept = self._kept[name]
            yield kept
            name = kept.previous

    def _drop(self, name: str) -> None:
        kept = self._kept.pop(name)
        self.bytes -= kept.size
        for item in kept.output:
            del self._items[item]


def kept_items(items: Sequence[Any]) -> tuple[bytes, ...]:
    """Items of a request (see mpillama/api/responses) as they are kept: each with a name, given or made up."""
    return tuple(_dump({**item.model_dump(exclude_none=True), "id": item.id or _name(item.type)}) for item in items)


def _name(kind: str | None) -> str:
    return new_id({"function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}.get(kind or "", "msg"))


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
