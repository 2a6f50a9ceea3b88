"""Who may ask, how much, and how long it may take: each rule by itself, on a server that runs."""

import gzip
import json
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from mpillama.cli.options import ServeOptions
from mpillama.errors import UserError
from tests.server.conftest import PACED, Served, serving
from tests.server.raw import Answer, Wire, active, figure, head, post, until
from tests.system.mpi.launch import PROGRAM, SCRIPTS, TIMEOUT, run, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 60)]

CONNECTIONS = 6
BODY_BYTES = 1_000_000
BODY_SECONDS = 5
WRITE_SECONDS = 1
MOST_TOKENS = 8000
ENDLESS = {"prompt": "Once", "max_tokens": MOST_TOKENS, "ignore_eos": True, "stream": True, "temperature": 1}
SHORT = {"prompt": "Once", "max_tokens": 2, "temperature": 0}
LONG_NAME = "m" * 8000
"""Is in each piece of a stream, so that the system's buffers are full soon."""
SECRET = "xylophone-of-the-llama"
ORIGIN = "https://page.test"


@pytest.fixture(scope="module")
def strict(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Room for one answer, few requests, small bodies, little patience; no key."""
    folder = tmp_path_factory.mktemp("strict")
    options = (
        "--queue", "0", "--sequences", "1", "--connections", CONNECTIONS, "--body-limit", BODY_BYTES, "--body-timeout",
        BODY_SECONDS, "--write-timeout", WRITE_SECONDS, "--log-dir", folder / "log", "--log-level", "debug",
        "--model-name", LONG_NAME,
    )  # fmt: skip
    with serving(toy, folder, 1, *map(str, options), program=PACED) as server:
        yield server


@pytest.fixture(scope="module")
def keyed(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One answer at a time, others wait; a key that the server made, a page of another origin, prompts in the log."""
    folder = tmp_path_factory.mktemp("keyed")
    options = ("--api-key", "auto", "--cors", ORIGIN, "--sequences", "1", "--log-dir", folder / "log", "--log-prompts")
    with serving(toy, folder, 1, *map(str, options), program=PACED) as server:
        yield server


@pytest.fixture
def idle(strict: Served) -> Iterator[Served]:
    """The strict server before anything else is asked of it."""
    with strict.http() as http:
        until(lambda: is_idle(http), "the server is idle")
        yield strict
        until(lambda: is_idle(http), "the server is idle again")
        assert http.post("/v1/completions", json=SHORT).status_code == 200


def is_idle(http: httpx.Client) -> bool:
    answer = http.get("/metrics")
    return answer.status_code == 200 and "\nmpillama_active_tasks 0.0\n" in answer.text


def wait_for_room(http: httpx.Client, tasks: int) -> None:
    until(lambda: active(http) == tasks, f"{tasks} answers are under way")


@contextmanager
def cut_short(http: httpx.Client) -> Iterator[None]:
    """What is asked for within ends long before it is whole."""
    before = figure(http, "mpillama_steps_total")
    yield
    assert figure(http, "mpillama_steps_total") - before < MOST_TOKENS / 2


def authorized(server: Served) -> bytes:
    return f"Authorization: Bearer {server.key}".encode()


# -- before it listens -----------------------------------------------------------------------------------------------


@pytest.fixture
def check() -> Callable[[ServeOptions], Any]:
    """What the command checks before MPI starts."""
    from mpillama.cli.serve import check

    return check


def refused(*options: str, env: dict[str, str] | None = None) -> str:
    """The one sentence with which the command ends, status 2."""
    result = run(1, *PROGRAM, "serve", *options, env=env)
    assert result.status == 2, result.stderr
    assert result.stdout == ""
    assert re.fullmatch(r"mpillama: [^\n]+\.\n", result.stderr), result.stderr
    return result.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "cluster.test"])
def test_an_address_that_others_reach_needs_a_key_or_no_auth(host: str, check, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("MPILLAMA_API_KEY", raising=False)
    file = str(tmp_path / "r.json")
    with pytest.raises(UserError, match="--no-auth"):
        check(ServeOptions(host=host, rendezvous=file))
    assert check(ServeOptions(host=host, rendezvous=file, no_auth=True)).key is None
    assert check(ServeOptions(host=host, rendezvous=file, api_key="k")).key == "k"
    monkeypatch.setenv("MPILLAMA_API_KEY", "from-environment")
    assert check(ServeOptions(host=host, rendezvous=file)).key == "from-environment"


def test_the_command_refuses_such_an_address_in_one_sentence():
    assert "--host 0.0.0.0 is reached from other machines" in refused("--host", "0.0.0.0")


@pytest.mark.parametrize("key", ["two words", "schlüssel", "tab\t"])
def test_a_key_that_no_header_can_carry_is_refused(key: str, check, tmp_path: Path):
    with pytest.raises(UserError, match="printable ASCII"):
        check(ServeOptions(api_key=key, rendezvous=str(tmp_path / "r.json")))


def test_an_empty_key_file_is_no_key(check, tmp_path: Path):
    (tmp_path / "key").write_text("\n")
    with pytest.raises(UserError, match="key"):
        check(ServeOptions(api_key_file=str(tmp_path / "key"), rendezvous=str(tmp_path / "r.json")))
    with pytest.raises(UserError, match="cannot be read"):
        check(ServeOptions(api_key_file=str(tmp_path / "none"), rendezvous=str(tmp_path / "r.json")))


def test_a_port_in_use_is_told_in_one_sentence(toy: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: cannot be listened to" in refused("--model", str(toy), "--port", port)


def test_an_address_of_another_machine_is_told_in_one_sentence(toy: Path):
    words = ("--model", str(toy), "--port", "0", "--host", "192.0.2.1", "--no-auth")
    assert "--host 192.0.2.1" in refused(*words)
    assert "--port 70000" in refused("--model", str(toy), "--port", "70000")


# -- the key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        None, "Bearer", "Bearer ", "Bearer wrong", "Basic {key}", "{key}", "Bearer{key}", "Bearer {key}x",
        "Bearer {key} {key}", "Bearer \xff", "bearer, {key}",
    ],
)  # fmt: skip
def test_without_the_right_key_there_is_no_answer(keyed: Served, line: str | None):
    lines = [] if line is None else [f"Authorization: {line.format(key=keyed.key)}".encode("latin-1")]
    for request in (head("GET", "/v1/models", *lines), head("GET", "/metrics", *lines), head("GET", "/nope", *lines),
                    post("/v1/completions", SHORT, *lines), post("/tokenize", {"content": "x"}, *lines)):  # fmt: skip
        with Wire(keyed.url) as wire:
            answer = wire.ask(request)
            assert answer
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.error["code"] == "invalid_api_key"
            assert keyed.key
            assert keyed.key.encode() not in answer.body


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_right_key_opens(keyed: Served, scheme: str):
    for path in ("/v1/models", "/metrics"):
        answer = httpx.get(keyed.url + path, headers={"Authorization": f"{scheme} {keyed.key}"}, trust_env=False)
        assert answer.status_code == 200
    assert keyed.client.models.list().data[0].id == "toy-q8_0"


def test_page_and_health_need_no_key(keyed: Served):
    for path in ("/", "/health", "/openapi.json"):
        assert httpx.get(keyed.url + path, trust_env=False).status_code == 200, path


def test_no_spelling_of_a_path_goes_around_the_key(keyed: Served):
    for path in ("/page/../v1/models", "/page/%2e%2e/v1/models", "/page/..%2fv1/models", "//v1/models", "/page/",
                 "/v1/models/", "/health/../v1/models", "/;/v1/models", "/page//v1/models"):  # fmt: skip
        with Wire(keyed.url) as wire:
            answer = wire.ask(head("GET", path))
            assert answer
            assert answer.status in (401, 404), path
            assert b"max_model_len" not in answer.body


def test_a_key_that_was_made_is_only_in_the_rendezvous_file(keyed: Served):
    found = json.loads(keyed.rendezvous.read_text())
    assert len(found["key"]) >= 24
    assert found["key"] == keyed.key
    assert stat.S_IMODE(keyed.rendezvous.stat().st_mode) == 0o600
    assert keyed.rendezvous.stat().st_uid == os.getuid()
    assert found["key"] not in keyed.launch.stderr()
    for log in (keyed.rendezvous.parent / "log").iterdir():
        assert found["key"] not in log.read_text()
    assert found["key"] not in " ".join(word for p in keyed.launch.processes() for word in p.cmdline())


# -- bodies ----------------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused_by_its_length(idle: Served):
    """Before any of it is sent."""
    with Wire(idle.url) as wire:
        lines = (b"Content-Type: application/json", b"Content-Length: %d" % (BODY_BYTES + 1))
        answer = wire.ask(head("POST", "/v1/completions", *lines))
        assert answer
        assert answer.status == 413
        assert answer.error["code"] == "request_too_large"


def test_a_body_of_just_the_limit_is_taken(idle: Served):
    body = json.dumps(SHORT).encode()
    with Wire(idle.url) as wire:
        answer = wire.ask(post("/v1/completions", body + b" " * (BODY_BYTES - len(body))))
        assert answer
        assert answer.status == 200


def test_a_body_that_is_too_large_is_refused_by_its_chunks(idle: Served):
    with Wire(idle.url) as wire:
        wire.send(head("POST", "/v1/completions", b"Content-Type: application/json", b"Transfer-Encoding: chunked"))
        for _ in range(11):
            wire.send(b"186a0\r\n" + b" " * 100_000 + b"\r\n")
        answer = wire.answer()
        assert answer
        assert answer.status == 413


def test_open_bodies_together_have_a_limit(idle: Served):
    """Sixteen of the largest; they are given up in time, and then others are taken again."""
    lines = (b"Content-Type: application/json", b"Content-Length: %d" % BODY_BYTES)
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(idle.url)) for _ in range(17)]
        for wire in wires:
            wire.send(head("POST", "/v1/completions", *lines) + b" " * (BODY_BYTES - 1))
        statuses = [answer.status for wire in wires if (answer := wire.answer())]
    assert statuses.count(429) >= 1
    assert set(statuses) <= {408, 429}
    with Wire(idle.url) as wire:
        answer = wire.ask(post("/v1/completions", SHORT))
        assert answer
        assert answer.status == 200


@pytest.mark.parametrize("trickle", [False, True])
def test_a_body_that_never_ends_is_given_up(idle: Served, trickle: bool):
    with Wire(idle.url, seconds=0.2) as wire:
        lines = (b"Content-Type: application/json", b"Content-Length: 5000")
        wire.send(head("POST", "/v1/completions", *lines) + b"{")
        begin, answer = time.monotonic(), None
        while answer is None and time.monotonic() < begin + BODY_SECONDS + 60:
            if trickle:
                wire.send(b" ")
            try:
                answer = wire.answer()
            except TimeoutError:
                continue
        assert answer
        assert answer.status == 408
        assert answer.error["code"] == "timeout"
        assert BODY_SECONDS - 0.5 < time.monotonic() - begin < BODY_SECONDS + 60


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""])
def test_a_body_of_another_type_is_refused(idle: Served, kind: str | None):
    """What a form of another site can send without asking first (CORS) must not be taken."""
    headers = {} if kind is None else {"Content-Type": kind}
    with idle.http() as http:
        answer = http.post("/v1/completions", content=json.dumps(SHORT), headers=headers)
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_media_type"


# -- other ways to ask -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/models/none", "/nowhere", "/v1/completions"],
)
def test_head_is_answered_as_get_without_a_body(idle: Served, path: str):
    with idle.http() as http:
        whole, only_head = http.get(path), http.head(path)
    assert only_head.status_code == whole.status_code
    assert only_head.content == b""
    assert only_head.headers["content-type"] == whole.headers["content-type"]
    if path != "/metrics":  # counts the requests
        assert only_head.headers["content-length"] == str(len(whole.content)) == whole.headers["content-length"]


def test_head_leaves_the_connection_as_it_was(idle: Served):
    with Wire(idle.url) as wire:
        wire.send(head("HEAD", "/health") + head("HEAD", "/nowhere") + head("GET", "/health", b"Connection: close"))
        everything = b"".join(iter(wire.receive, b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", everything) == [b"200", b"404", b"200"]
    assert everything.count(b'"status"') == 1


def test_head_needs_the_key_as_well(keyed: Served):
    assert httpx.head(f"{keyed.url}/v1/models", trust_env=False).status_code == 401
    with keyed.http() as http:
        assert http.head("/v1/models").status_code == 200


def test_a_gzip_body_is_unpacked(idle: Served):
    packed = gzip.compress(json.dumps(SHORT).encode())
    with idle.http() as http:
        expected = http.post("/v1/completions", json=SHORT).json()["choices"]
        for name in ("gzip", "GZIP", "x-gzip"):
            headers = {"Content-Type": "application/json", "Content-Encoding": name}
            assert http.post("/v1/completions", content=packed, headers=headers).json()["choices"] == expected
            pieces = iter([packed[i : i + 1] for i in range(len(packed))])
            assert http.post("/v1/completions", content=pieces, headers=headers).json()["choices"] == expected
        plain = {"Content-Type": "application/json", "Content-Encoding": "identity"}
        assert http.post("/v1/completions", content=json.dumps(SHORT), headers=plain).json()["choices"] == expected


@pytest.mark.parametrize(
    ("name", "change", "status"),
    [
        ("gzip", lambda packed: packed[:-1], 400),
        ("gzip", lambda packed: packed[:5], 400),
        ("gzip", lambda packed: packed + b"x", 400),
        ("gzip", lambda packed: packed + packed, 400),
        ("gzip", gzip.decompress, 400),
        ("gzip", lambda packed: b"", 400),
        ("br", lambda packed: packed, 415),
        ("deflate", lambda packed: packed, 415),
        ("gzip, gzip", lambda packed: packed, 415),
    ],
)
def test_what_is_packed_in_another_way_is_refused(idle: Served, name: str, change: Any, status: int):
    body = change(gzip.compress(json.dumps(SHORT).encode()))
    headers = {"Content-Type": "application/json", "Content-Encoding": name}
    with idle.http() as http:
        answer = http.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert status == 400 or "gzip" in answer.json()["error"]["message"]


@pytest.mark.parametrize("level", [1, 9])
def test_a_bomb_is_not_unpacked_further_than_the_limit(idle: Served, level: int):
    """A thousand times as large as it was sent: refused by what it would become, in little memory and time."""
    bomb = gzip.compress(b" " * (300 * BODY_BYTES), level)
    assert len(bomb) < 3 * BODY_BYTES
    rank = idle.launch.ranks()[0]
    before = rank.memory_info().rss
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    with idle.http() as http:
        for _ in range(5):
            answer = http.post("/v1/completions", content=iter([bomb[: BODY_BYTES // 2]]), headers=headers)
            assert answer.status_code == 413
    assert rank.memory_info().rss - before < 20 * BODY_BYTES


@pytest.mark.parametrize("length", [0, 5, 10 * BODY_BYTES])
def test_a_body_with_two_lengths_is_answered_and_its_connection_ends(idle: Served, length: int):
    """The chunks count, and what follows is not looked at (RFC 9112, 6.3)."""
    body = json.dumps(SHORT).encode()
    lines = (b"Content-Type: application/json", b"Content-Length: %d" % length, b"Transfer-Encoding: chunked")
    request = head("POST", "/v1/completions", *lines) + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    with Wire(idle.url) as wire:
        wire.send(request + head("GET", "/health"))
        answer = wire.answer()
        assert answer
        assert answer.status == 200, answer.body
        assert json.loads(answer.body)["choices"]
        assert answer.headers["connection"] == "close"
        assert wire.receive() == b""


# -- too much at once ------------------------------------------------------------------------------------------------


def assert_later(answer: Answer | None) -> None:
    """429, and when to come again."""
    assert answer
    assert answer.status == 429
    assert answer.error["code"] == "queue_full"
    assert int(answer.headers["retry-after"]) >= 1


def test_a_full_queue_is_told_with_retry_after(idle: Served):
    with Wire(idle.url) as running, idle.http() as http:
        running.send(post("/v1/completions", ENDLESS))
        for path, body in (
            ("/v1/completions", SHORT),
            ("/v1/completions", {**SHORT, "stream": True}),
            ("/v1/embeddings", {"input": "x"}),
        ):
            running.catch_up()  # or it is dropped, and there is room
            with Wire(idle.url) as wire:
                assert_later(wire.ask(post(path, body)))
        assert http.get("/health").status_code == 200


def test_more_answers_than_there_is_ever_room_for_are_no_matter_of_time(idle: Served):
    """To try again would not help."""
    with Wire(idle.url) as wire:
        for path, body in (
            ("/v1/completions", {**SHORT, "n": 2}),
            ("/v1/embeddings", {"input": ["a", "b"]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 2}),
        ):
            answer = wire.ask(post(path, body))
            assert answer
            assert answer.status == 400, path


def status_of_models(served: Served) -> int:
    with Wire(served.url) as wire:
        answer = wire.ask(head("GET", "/v1/models"))
    assert answer
    return answer.status


def test_too_many_open_requests_are_told_with_retry_after(idle: Served):
    wires = [Wire(idle.url) for _ in range(CONNECTIONS)]
    try:
        for wire in wires:
            wire.send(head("POST", "/tokenize", b"Content-Type: application/json", b"Content-Length: 9"))
        until(lambda: status_of_models(idle) == 429, "all are open")
        with Wire(idle.url) as wire:
            assert_later(wire.ask(head("GET", "/v1/models")))
        with Wire(idle.url) as wire:
            answer = wire.ask(head("GET", "/health"))
            assert answer
            assert answer.status == 200, "it has a place of its own"
    finally:
        for wire in wires:
            wire.close()


# -- clients that go away or do not read -----------------------------------------------------------------------------


def test_a_client_that_never_reads_its_stream_is_dropped(idle: Served):
    """When the system's buffers are full, which takes some MB."""
    with Wire(idle.url, receive_buffer=4096) as wire, idle.http() as http:
        wire.send(post("/v1/completions", ENDLESS))
        wait_for_room(http, 1)
        until(lambda: active(http) == 0, "the stream is dropped", 120)
        received = 0
        while data := wire.receive():
            received += len(data)
        assert received < 20_000_000


def test_a_client_that_never_reads_its_answer_is_dropped(idle: Served):
    """Also when the answer is complete and nobody waits for it any more: its bytes must not stay for ever."""
    process = idle.launch.ranks()[0]
    files = process.num_fds()
    request = post("/tokenize", {"content": "ab " * 330_000, "with_pieces": True})
    assert len(request) < BODY_BYTES
    wires = [Wire(idle.url, receive_buffer=4096) for _ in range(3)]
    try:
        for wire in wires:
            wire.send(request)
        until(lambda: process.num_fds() > files, "the connections are there")
        until(lambda: process.num_fds() <= files, "the connections are dropped", 120)
    finally:
        for wire in wires:
            wire.close()


@pytest.mark.parametrize("bye", [Wire.close, Wire.reset, Wire.end_input])
@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_ends_when_its_client_goes_away(idle: Served, bye: Any, streams: bool):
    with idle.http() as http, cut_short(http):
        wire = Wire(idle.url)
        wire.send(post("/v1/completions", {**ENDLESS, "stream": streams}))
        wait_for_room(http, 1)
        if streams:
            assert wire.receive()
        until(lambda: figure(http, "mpillama_running") == 1, "it is computed")
        bye(wire)
        until(lambda: active(http) == 0, "its task is gone")
        until(lambda: figure(http, "mpillama_running") == 0, "the engine has forgotten it")
        wire.close()


@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_that_waits_is_forgotten_when_its_client_goes_away(keyed: Served, streams: bool):
    """Before its first token: another one is computed."""
    with keyed.http() as http, cut_short(http):
        wait_for_room(http, 0)
        with Wire(keyed.url) as first, Wire(keyed.url) as second:
            first.send(post("/v1/completions", ENDLESS, authorized(keyed)))
            assert first.receive()
            second.send(post("/v1/completions", {**ENDLESS, "stream": streams}, authorized(keyed)))
            wait_for_room(http, 2)
            second.close()
            until(lambda: active(http) == 1, "the one that waits is forgotten")
            assert first.receive()
        until(lambda: active(http) == 0, "both are gone")


def test_several_answers_of_one_request_end_together(keyed: Served):
    with keyed.http() as http, Wire(keyed.url) as wire, cut_short(http):
        wait_for_room(http, 0)
        wire.send(post("/v1/completions", {**ENDLESS, "n": 4}, authorized(keyed)))
        assert wire.receive()
        until(lambda: active(http) == 4, "all are asked for")
        wire.reset()
        until(lambda: active(http) == 0, "all are gone")


# -- browsers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["elsewhere.test", "elsewhere.test:{port}", "127.0.0.1.elsewhere.test", "localhost.", ""]
)
def test_a_name_that_was_made_to_point_here_is_refused(idle: Served, name: str):
    """DNS rebinding: a page of another site must not get at a server without a key."""
    host = f"Host: {name.format(port=httpx.URL(idle.url).port)}\r\n".encode()
    for path in ("/v1/models", "/", "/metrics"):
        with Wire(idle.url) as wire:
            answer = wire.ask(f"GET {path} HTTP/1.1\r\n".encode() + host + b"\r\n")
            assert answer
            assert answer.status == 421
            assert answer.error["code"] == "wrong_host"


def test_the_server_s_own_names_are_known(idle: Served):
    port = httpx.URL(idle.url).port
    for name in (
        "localhost",
        "LOCALHOST",
        f"localhost:{port}",
        f"127.0.0.1:{port}",
        "127.0.0.1",
        "[::1]",
        f"[::1]:{port}",
    ):
        with Wire(idle.url) as wire:
            answer = wire.ask(f"GET /v1/models HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
            assert answer
            assert answer.status == 200, name


def test_with_a_key_any_name_will_do(keyed: Served):
    headers = {"Host": "elsewhere.test", "Authorization": f"Bearer {keyed.key}"}
    assert httpx.get(f"{keyed.url}/v1/models", headers=headers, trust_env=False).status_code == 200


def cross_origin(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control")}


def test_pages_of_other_origins_get_nothing_by_default(idle: Served):
    with idle.http() as http:
        asks = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
        preflight = http.options("/v1/completions", headers=asks)
        assert preflight.status_code == 405
        assert not cross_origin(preflight)
        for answer in (http.get("/health", headers=asks), http.post("/v1/completions", json=SHORT, headers=asks)):
            assert answer.status_code == 200
            assert not cross_origin(answer)


def test_a_page_of_the_allowed_origin_may_ask(keyed: Served):
    with keyed.http() as http:
        preflight = http.options("/v1/completions", headers={"Origin": ORIGIN, "Access-Control-Request-Method": "POST"})
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        wanted = "authorization,content-type,x-stainless-lang,x-stainless-retry-count,openai-organization"
        asks = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wanted}
        for path in ("/v1/chat/completions", "/health", "/nowhere"):
            preflight = http.options(path, headers=asks)
            assert preflight.status_code == 204
            assert preflight.headers["access-control-allow-headers"] == wanted
            assert "HEAD" in preflight.headers["access-control-allow-methods"]
            assert set(preflight.headers.get_list("vary", split_commas=True)) == {
                "Origin",
                "Access-Control-Request-Headers",
            }
        assert "access-control-allow-credentials" not in preflight.headers
        for answer in (
            http.post("/v1/completions", json=SHORT, headers={"Origin": ORIGIN}),
            http.post("/v1/completions", json={}, headers={"Origin": ORIGIN}),
            http.get("/v1/models", headers={"Origin": ORIGIN, "Authorization": "Bearer wrong"}),
        ):
            assert answer.headers["access-control-allow-origin"] == ORIGIN
            assert answer.headers["vary"] == "Origin"
            assert "x-mpillama-ignored" in answer.headers["access-control-expose-headers"].lower()


@pytest.mark.parametrize(
    "origin", ["https://other.test", "http://page.test", "https://page.test.evil", "null", "*", ""]
)
def test_a_page_of_another_origin_may_not(keyed: Served, origin: str):
    with keyed.http() as http:
        wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-stainless-os"}
        asks = {"Origin": origin, **wanted}
        assert not cross_origin(http.options("/v1/completions", headers=asks))
        assert not cross_origin(http.post("/v1/completions", json=SHORT, headers=asks))


def test_every_answer_has_the_security_headers(idle: Served):
    requests = {
        200: head("GET", "/"),
        400: post("/v1/completions", b"{"),
        404: head("GET", "/nowhere"),
        405: head("PUT", "/"),
        413: head("POST", "/tokenize", b"Content-Type: application/json", b"Content-Length: 999999999"),
        415: head("POST", "/tokenize", b"Content-Length: 0"),
        421: head("GET", "/").replace(b"localhost", b"elsewhere"),
        422: post("/tokenize", b'{"content": "\\ud800"}'),
    }
    streamed = post("/v1/completions", {**SHORT, "stream": True})
    for status, request in [*requests.items(), (200, streamed), (200, head("GET", "/metrics"))]:
        with Wire(idle.url) as wire:
            answer = wire.ask(request)
            assert answer
            assert answer.status == status
            found = answer.headers
            assert found["x-content-type-options"] == "nosniff"
            assert found["x-frame-options"] == "DENY"
            assert found["referrer-policy"] == "no-referrer"
            policy = found["content-security-policy"]
            for rule in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "form-action 'none'"):
                assert rule in policy
            assert "unsafe" not in policy
            assert "server" not in found


# -- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl command to make a certificate with")
    folder = tmp_path_factory.mktemp("certificate")
    found = folder / "certificate.pem", folder / "key.pem"
    words = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
             "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-out", found[0],
    "-keyout", found[1])  # fmt: skip
    subprocess.run([openssl, *map(str, words)], check=True, capture_output=True, timeout=60)
    return found


def test_https_with_a_key_from_a_file(certificate: tuple[Path, Path], toy: Path, tmp_path: Path):
    """Answers, streams, and neither plain HTTP nor garbage harms."""
    (tmp_path / "key").write_text("first-line\nsecond line\n")
    words = ("--tls-certificate", certificate[0], "--tls-key", certificate[1], "--api-key-file", tmp_path / "key")
    with serving(toy, tmp_path, 1, *map(str, words), program=PACED) as server:
        assert server.url.startswith("https://127.0.0.1:")
        assert server.key == "first-line"
        trusted = ssl.create_default_context(cafile=str(certificate[0]))
        headers = {"Authorization": "Bearer first-line"}
        plain = server.url.replace("https", "http")
        for garbage in (head("GET", "/health"), b"\x16\x03\x01\x00\x05hello", b"\0" * 500, b""):
            with Wire(plain) as wire:
                wire.send(garbage)
                wire.end_input()
                assert b"200" not in wire.receive()
        with httpx.Client(base_url=server.url, verify=trusted, trust_env=False, timeout=60, headers=headers) as http:
            assert http.post("/v1/completions", json=SHORT).status_code == 200
            with cut_short(http):
                with http.stream("POST", "/v1/completions", json=ENDLESS) as answer:
                    assert next(answer.iter_lines()).startswith("data: ")
                until(lambda: active(http) == 0, "the stream that was left is over")
            assert http.get("/health", headers={"Authorization": ""}).status_code == 200
            assert http.get("/metrics", headers={"Authorization": "Bearer second line"}).status_code == 401
        assert "Traceback" not in server.launch.stderr()


def test_what_is_no_certificate_is_told_in_one_sentence(toy: Path, tmp_path: Path):
    (tmp_path / "bad.pem").write_text("no certificate")
    bad, none = str(tmp_path / "bad.pem"), str(tmp_path / "none.pem")
    words = ("--model", str(toy), "--port", "0")
    assert "PEM" in refused(*words, "--tls-certificate", bad, "--tls-key", bad)
    assert "there is no such file" in refused(*words, "--tls-certificate", none, "--tls-key", bad)
    assert "give both" in refused(*words, "--tls-certificate", bad)


# -- logs ------------------------------------------------------------------------------------------------------------


def logged(server: Served) -> str:
    return "".join(log.read_text(errors="replace") for log in (server.rendezvous.parent / "log").iterdir())


def ask_with_secrets(server: Served) -> None:
    """In every field that holds a text, well formed or not."""
    texts: list[tuple[str, Any]] = [
        ("/v1/completions", {**SHORT, "prompt": SECRET}),
        ("/v1/completions", {**SHORT, "prompt": SECRET, "stream": True}),
        ("/v1/completions", {**SHORT, "prompt": SECRET, "temperature": 9}),
        ("/v1/completions", {**SHORT, "prompt": "x", SECRET: 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": SECRET}]}),
        ("/v1/embeddings", {"input": SECRET}),
        ("/tokenize", {"content": SECRET}),
    ]
    with server.http() as http:
        for path, body in texts:
            until(lambda: active(http) == 0, "there is room")
            assert http.post(path, json=body).status_code in (200, 400)
        assert http.post("/tokenize", content=f'{{"content": "{SECRET}', headers={"Content-Type": "application/json"})
        assert http.get(f"/v1/models/{SECRET}").status_code == 404


def test_prompts_are_not_in_the_logs(idle: Served):
    """Not even at the level debug."""
    ask_with_secrets(idle)
    assert len(logged(idle)) > 100
    assert SECRET not in logged(idle)
    assert SECRET not in idle.launch.stderr()


def test_prompts_are_in_the_logs_if_that_is_wanted(keyed: Served):
    ask_with_secrets(keyed)
    until(lambda: SECRET in logged(keyed), "the log has the prompt")
    assert SECRET not in keyed.launch.stderr()


def test_prompts_in_the_log_are_one_line_each_whatever_is_in_them(keyed: Served):
    body = json.dumps({**SHORT, "prompt": "x\n2026-01-01 forged \r\x1b[31m", "user": "\ud800"})
    with keyed.http() as http:
        answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200, answer.text
    until(lambda: "forged" in logged(keyed), "the log has the prompt")
    assert "\x1b" not in logged(keyed)
    assert not [line for line in logged(keyed).splitlines() if line.startswith("2026-01-01 forged")]


# -- before the model is there ---------------------------------------------------------------------------------------


def test_while_the_model_is_loaded_answers_say_come_again(toy: Path, tmp_path: Path):
    """Loading is made slow: 503 with Retry-After, the page is there already; then all is well."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    script = (SCRIPTS / "sabotage.py", "none", "load", "0", tmp_path, "serve", "--model", toy, "--port", port)
    file = tmp_path / "server.json"
    with (
        started(1, *script, "--rendezvous", file) as launch,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http,
    ):
        until((tmp_path / "load-0").exists, "it loads", TIMEOUT)
        assert not file.exists()
        answers = [
            http.post("/v1/completions", json=SHORT),
            http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]}),
            http.post("/v1/embeddings", json={"input": "x"}),
            http.post("/tokenize", json={"content": "x"}),
            http.get("/v1/models"),
        ]
        health, page, metrics = http.get("/health"), http.get("/"), http.get("/metrics")
        assert not file.exists(), "the model was loaded too early for this test"
        for answer in answers:
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "unavailable"
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        assert int(health.headers["retry-after"]) >= 1
        assert (page.status_code, metrics.status_code) == (200, 200)
        until(file.exists, "it is loaded", TIMEOUT)
        assert http.get("/health").json()["status"] == "ok"
        assert http.post("/v1/completions", json=SHORT).status_code == 200
        assert launch.process.poll() is None
