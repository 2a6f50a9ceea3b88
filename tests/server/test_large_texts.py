"""Texts that are too large, slow or many: refused at once, given up with their client, and no memory stays."""

import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.server.conftest import Served, serving
from tests.server.raw import Wire, post, until
from tests.server.tooled import write_tooled
from tests.system.mpi.launch import TIMEOUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 120)]

MOST_BYTES = 1 << 20
"""Of mpillama/server/tokenizing, for a short context."""
LARGE = 15_000_000
KEPT = 60 << 20
"""What may be more in memory afterwards; the largest text takes 300 MB."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("large")
    with serving(write_tooled(folder / "tooled.h5"), folder, 1, "--max-tokens", "4") as running:
        yield running


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, **fields}


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


def requests(count: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """A text of so many characters in every place from which it would be tokenized."""
    text = "a" * count
    said = [{"role": "user", "content": text}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "ab " * 10}] * (count // 30)}]
    called = {"id": "c", "type": "function", "function": {"name": "f", "arguments": text}}
    return {
        "tokenize": ("/tokenize", {"content": text}),
        "tokenize prompt": ("/tokenize", {"prompt": text}),
        "tokenize messages": ("/tokenize", {"messages": said}),
        "tokenize tools": ("/tokenize", {"messages": chat()["messages"], **tool(description=text)}),
        "detokenize": ("/detokenize", {"tokens": [5] * min(count, 1_000_000)}),
        "embeddings": ("/v1/embeddings", {"input": text}),
        "embeddings of several": ("/v1/embeddings", {"input": ["x", text]}),
        "completion": ("/v1/completions", {"prompt": text, "max_tokens": 1}),
        "completion with ids": ("/v1/completions", {"prompt": [5, text], "max_tokens": 1}),
        "chat": ("/v1/chat/completions", chat(messages=said)),
        "chat in parts": ("/v1/chat/completions", chat(messages=parts)),
        "chat of many": ("/v1/chat/completions", chat(messages=[{"role": "user", "content": ""}] * (count // 32))),
        "chat's call": ("/v1/chat/completions", chat(messages=[{"role": "assistant", "tool_calls": [called]}])),
        "chat's variables": ("/v1/chat/completions", chat(chat_template_kwargs={"x": text})),
        "tool's description": ("/v1/chat/completions", chat(**tool(description=text))),
        "tool's schema": ("/v1/chat/completions", chat(**tool(parameters={"description": text}))),
        "responses": ("/v1/responses", {"input": text, "max_output_tokens": 16}),
        "responses' instructions": ("/v1/responses", {"input": "x", "instructions": text, "max_output_tokens": 16}),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "count"), [*((name, 3_000_000) for name in requests(0)), ("tokenize", LARGE), ("embeddings", LARGE)]
)
def test_what_is_too_large_is_refused_before_it_is_tokenized(server: Served, name: str, count: int):
    """It would take a hundred seconds and gigabytes."""
    path, body = requests(count)[name]
    with server.http() as http:
        begin = time.monotonic()
        answer = http.post(path, json=body)
        seconds = time.monotonic() - begin
    assert answer.status_code == 400, answer.text
    assert "more than" in answer.json()["error"]["message"]
    assert seconds < 30


def test_a_schema_that_is_too_large_is_refused_before_it_is_built(server: Served):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["x" * 3_000_000]}}}
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json=chat(response_format=form))
    assert answer.status_code == 422
    assert "too large" in answer.json()["error"]["message"]


def test_large_texts_of_just_the_limit_leave_no_memory_behind(server: Served):
    rank = server.launch.ranks()[0]
    with server.http() as http:
        ask = lambda: http.post("/tokenize", json={"content": "aB3 x,y\n" * (MOST_BYTES // 8)})  # noqa: E731
        assert ask().json()["count"] > MOST_BYTES // 8
        before = rank.memory_info().rss
        for _ in range(3):
            ask().raise_for_status()
        assert rank.memory_info().rss < before + KEPT


def test_pieces_of_a_long_text_are_those_of_its_tokens(server: Served):
    with server.http() as http:
        found = http.post("/tokenize", json={"content": "llama b " * 5000, "with_pieces": True}).json()
        ids = http.post("/tokenize", json={"content": "llama b " * 5000}).json()["tokens"]
    assert found["tokens"] == ids
    assert len(found["pieces"]) == found["count"] == len(ids)
    assert "".join(found["pieces"]).endswith("llama b llama b ")


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def is_busy(process: psutil.Process) -> bool:
    before = cpu_seconds(process)
    time.sleep(0.5)
    return cpu_seconds(process) > before + 0.05


def test_small_requests_go_on_while_large_ones_are_tokenized(server: Served):
    """More of them than there are threads; their clients go away, and what had not begun is not done at all."""
    request = post("/tokenize", {"content": "a" * (MOST_BYTES - 100)})
    rank = server.launch.ranks()[0]
    alone = []
    for _ in range(3):
        begin = cpu_seconds(rank)
        with Wire(server.url, seconds=60) as wire:
            assert wire.ask(request)
        alone.append(cpu_seconds(rank) - begin)
    wires = [Wire(server.url, seconds=60) for _ in range(12)]
    begin = cpu_seconds(rank)
    try:
        for wire in wires:
            wire.send(request)
        until(lambda: is_busy(rank), "they are being tokenized")
        with server.http() as http:
            assert http.post("/tokenize", json={"content": "x"}).status_code == 200
            assert http.get("/health").status_code == 200
            assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    finally:
        for wire in wires:
            wire.close()
    until(lambda: not is_busy(rank), "the work of those that left is over", TIMEOUT)
    assert cpu_seconds(rank) - begin < 7 * max(alone)
