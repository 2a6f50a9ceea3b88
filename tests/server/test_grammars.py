"""Grammars that cost much, or cannot be held: nobody else waits for them, and clients are told why."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.conftest import Served, serving
from tests.server.raw import active, until
from tests.server.tooled import write_tooled
from tests.system.mpi.launch import TIMEOUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 120)]

LARGE = {
    "type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(9999)},
    "required": [f"p{i}" for i in range(9999)], "additionalProperties": False,
}  # fmt: skip
"""Takes seconds to build, as often as it is built."""
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 1}
ENDLESS = {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True}
MANY = {"anyOf": [{"type": "object", "properties": {f"{a}{b}": {} for b in range(300)}} for a in range(9)]}
"""Each object can be held, all of them together cannot."""


@pytest.fixture(scope="module", params=[1, 2], ids=["one group", "two groups"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("grammars")
    groups = str(request.param)
    with serving(write_tooled(folder / "tooled.h5"), folder, request.param, "--replicas", groups) as running:
        yield running


def form(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


class Gaps(threading.Thread):
    """Reads streams to their end; the longest wait for an event in any of them, at most what the server computed."""

    def __init__(self, server: Served):
        super().__init__(daemon=True)
        self.server = server
        self.rank = server.launch.ranks()[0]
        self.longest = 0.0
        self.stopped = threading.Event()
        self.begun = threading.Event()

    def run(self) -> None:
        while not self.stopped.is_set():
            with self.server.http() as http, http.stream("POST", "/v1/completions", json=ENDLESS) as answer:
                last = time.monotonic(), sum(self.rank.cpu_times()[:2])
                for _ in answer.iter_lines():
                    now = time.monotonic(), sum(self.rank.cpu_times()[:2])
                    self.longest, last = max(self.longest, min(now[0] - last[0], now[1] - last[1])), now
                    self.begun.set()
                    if self.stopped.is_set():
                        return


def test_nobody_waits_while_a_grammar_is_built(server: Served):
    """Sixteen answers under one: built sixteen times in the engine's thread, it would stop all others for long."""
    readers = [Gaps(server) for _ in range(2)]  # one in each group, if there are two
    for reader in readers:
        reader.start()
    for reader in readers:
        assert reader.begun.wait(TIMEOUT)
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json={**ASK, "n": 16, **form(LARGE)}).raise_for_status().json()
        for reader in readers:
            reader.stopped.set()
        for reader in readers:
            reader.join(TIMEOUT)
        until(lambda: active(http) == 0, "all is over")
    assert len(answer["choices"]) == 16
    assert all(choice["message"]["content"].startswith("{") for choice in answer["choices"])
    assert max(reader.longest for reader in readers) < 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "object", "properties": {f"p{i}": {} for i in range(3000)}}, "3000 optional properties"),
        (MANY, "items"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
    ],
)
def test_what_can_never_be_held_is_422_and_says_why(server: Served, schema: Any, why: str, stream: bool):
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json={**ASK, "stream": stream, **form(schema)})
    assert answer.status_code == 422
    assert why in answer.json()["error"]["message"]
    assert "later" not in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_shows_later_that_it_cannot_be_held_is_422_as_well(server: Served, stream: bool):
    """In a stream, which has begun: as its last event."""
    late = {"type": "array", "minItems": 2, "prefixItems": [{"enum": ["some words of it"]}], "items": MANY}
    with server.http() as http:
        body = {**ASK, "max_tokens": 400, "stream": stream, **form(late)}
        answer = http.post("/v1/chat/completions", json=body)
    if stream:
        assert answer.status_code == 200
        error = json.loads(answer.text.strip().rpartition("data: ")[2])["error"]
    else:
        assert answer.status_code == 422
        error = answer.json()["error"]
    assert "cannot keep to its grammar" in error["message"]
    assert error["code"] == "unprocessable"


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_object", "schema": {"const": "42"}},
        {"type": "json_schema", "json_schema": {"schema": {"const": "42"}}},
    ],
)
def test_a_schema_may_stand_where_other_servers_take_it(server: Served, form: dict[str, Any]):
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json={**ASK, "max_tokens": 64, "response_format": form})
    assert answer.json()["choices"][0]["message"]["content"] == '"42"'


def test_a_tool_with_words_that_cannot_be_held_is_called(server: Served):
    tags = {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "maxItems": 3}
    parameters = {"type": "object", "properties": {"tags": tags}, "required": ["tags"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with server.http() as http:
        body = {**ASK, "max_tokens": 400, "tools": [tool], "tool_choice": "required"}
        response = http.post("/v1/chat/completions", json=body).raise_for_status()
        answer = response.json()
    assert response.headers["x-mpillama-ignored"] == "tools.uniqueItems"
    for call in answer["choices"][0]["message"]["tool_calls"]:
        assert set(json.loads(call["function"]["arguments"])) == {"tags"}


def test_words_that_are_left_out_are_named_in_a_header(server: Served):
    schema = {"type": "array", "items": {"type": "boolean", "title": "t"}, "uniqueItems": True, "maxItems": 2}
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    with server.http() as http:
        chat = http.post("/v1/chat/completions", json={**ASK, **form(schema)}).raise_for_status()
        response = http.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 16, "text": text})
        plain = http.post("/v1/chat/completions", json={**ASK, **form({"type": "boolean"})}).raise_for_status()
    assert response.status_code == 200, response.text
    for answer in (chat, response):
        assert answer.headers["x-mpillama-ignored"] == "response_format.uniqueItems"
    assert "x-mpillama-ignored" not in plain.headers
