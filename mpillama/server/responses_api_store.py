"""Responses that clients may go on from, in memory: the longest unused ones go first."""

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mpillama.server.errors import Refused
from mpillama.server.responses_api_events import new_id

Json = dict[str, Any]
Name = tuple[str, str]
"""Of a response or an item: whose it is, and its id."""

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
        return OVERHEAD + len(self.response) + sum(map(len, [*self.input, *self.output.values()]))

    def whole(self) -> Json:
        return {**json.loads(self.response), "output": [json.loads(item) for item in self.output.values()]}


class ResponseStore:
    """Up to `most_bytes` of responses; each is found by its `owner` only."""

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.most_bytes = most_bytes
        self.bytes = 0
        self._kept: OrderedDict[Name, Kept] = OrderedDict()
        self._items: dict[Name, bytes] = {}

    def put(self, owner: str, response: Json, items: tuple[bytes, ...]) -> None:
        """Keep a response that answers `items`; what is too large alone is not kept."""
        output = {item["id"]: _dump(item) for item in response["output"]}
        rest = {name: value for name, value in response.items() if name != "output"}
        kept = Kept(_dump(rest), items, output, response["previous_response_id"])
        self.bytes += kept.size
        self._kept[owner, response["id"]] = kept
        self._items |= {(owner, item): data for item, data in output.items()}
        while self.bytes > self.most_bytes:
            self._drop(next(iter(self._kept)))

    def get(self, owner: str, name: str) -> Kept:
        """A kept response; Refused (404) if there is none."""
        if (owner, name) not in self._kept:
            raise Refused(404, f"the response {name[:80]!r} is not kept here (any more)", "response_id")
        self._kept.move_to_end((owner, name))
        return self._kept[owner, name]

    def delete(self, owner: str, name: str) -> None:
        """Forget a response; Refused (404) if there is none."""
        self.get(owner, name)
        self._drop((owner, name))

    def item(self, owner: str, name: str) -> bytes | None:
        """An item of a kept response's output."""
        return self._items.get((owner, name))

    def chain(self, owner: str, name: str | None) -> list[Kept]:
        """A response and all before it, the first one first; Refused (404) if one is gone."""
        return list(self._backwards(owner, name))[::-1]

    def _backwards(self, owner: str, name: str | None) -> Iterator[Kept]:
        while name is not None:
            if (owner, name) not in self._kept:
                place, code = "previous_response_id", "previous_response_not_found"
                raise Refused(404, f"{place}: {name[:80]!r} is not kept here (any more); send all items", place, code)
            self._kept.move_to_end((owner, name))
            kept = self._kept[owner, name]
            yield kept
            name = kept.previous

    def _drop(self, name: Name) -> None:
        kept = self._kept.pop(name)
        self.bytes -= kept.size
        for item in kept.output:
            del self._items[name[0], item]


def kept_items(items: Sequence[Any]) -> tuple[bytes, ...]:
    """Items of a request (see mpillama/openai/responses) as they are kept: each with a name, given or made up."""
    return tuple(_dump({**item.model_dump(exclude_none=True), "id": item.id or _name(item.type)}) for item in items)


def _name(kind: str | None) -> str:
    return new_id({"function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}.get(kind or "", "msg"))


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
