"""Many connections that do nothing: whoever asks is answered, and the process never runs out of files."""

import contextlib
import resource
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.server.conftest import Served, serving
from tests.server.raw import Wire, head, post, until
from tests.system.mpi.launch import SCRIPTS, TIMEOUT, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 120)]

FILES = 256
CROWD = 400
BODY_SECONDS = 60


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("certificate")
    found = folder / "certificate.pem", folder / "key.pem"
    words = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj",
             "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-out", found[0],
    "-keyout", found[1])  # fmt: skip
    try:
        subprocess.run([*map(str, words)], check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no openssl command to make a certificate with")
    return found


@contextmanager
def crowded(model: Path, folder: Path, *options: str) -> Iterator[Served]:
    """A server that may open few files."""
    with serving(model, folder, 1, *options, program=(SCRIPTS / "few_files.py", str(FILES))) as server:
        yield server


@pytest.fixture(scope="module")
def plain(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with crowded(toy, tmp_path_factory.mktemp("plain"), "--body-timeout", str(BODY_SECONDS)) as server:
        yield server


@pytest.fixture(scope="module")
def secure(certificate: tuple[Path, Path], toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    words = ("--tls-certificate", str(certificate[0]), "--tls-key", str(certificate[1]))
    with crowded(toy, tmp_path_factory.mktemp("secure"), *words) as server:
        yield server


@contextmanager
def crowd(server: Served, first: bytes = b"") -> Iterator[list[socket.socket]]:
    """Clients that connect, send something or nothing, and wait."""
    place = urlsplit(server.url)
    needed = CROWD + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(needed, hard)), hard))
    with ExitStack() as stack:
        clients = []
        for _ in range(CROWD):
            client = stack.enter_context(socket.create_connection((place.hostname, place.port), timeout=30))
            with contextlib.suppress(OSError):  # it may have been dropped for another one
                client.sendall(first)
            clients.append(client)
        yield clients


def rank(server: Served) -> psutil.Process:
    return server.launch.ranks()[0]


def asks(server: Served, certificate: Path | None = None) -> None:
    """New clients are answered, at once where the machine lets them."""
    times = []
    verify = ssl.create_default_context(cafile=str(certificate)) if certificate else False
    for _ in range(5):
        begin = time.monotonic()
        with httpx.Client(base_url=server.url, verify=verify, trust_env=False, timeout=30) as http:
            assert http.get("/health").status_code == 200
            assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
        times.append(time.monotonic() - begin)
    assert min(times) < 5
    assert rank(server).num_fds() < FILES - 16


@pytest.mark.parametrize("first", [b"", b"GET /health HTT", head("GET", "/health")])
def test_a_crowd_of_silent_clients_keeps_nobody_out(plain: Served, first: bytes):
    """Before a request, in its head, and after an answer."""
    with crowd(plain, first):
        asks(plain)


@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01\x02\x00\x01\x00"])
def test_a_crowd_that_never_ends_its_handshakes_keeps_nobody_out(
    secure: Served, certificate: tuple[Path, Path], first: bytes
):
    before = rank(secure).num_fds()
    with crowd(secure, first):
        asks(secure, certificate[0])
        until(lambda: rank(secure).num_fds() < before + 16, "handshakes are given up", 120)


def test_idle_tls_connections_keep_nobody_out(secure: Served, certificate: tuple[Path, Path]):
    """With their handshakes done."""
    place, context = urlsplit(secure.url), ssl.create_default_context(cafile=str(certificate[0]))
    with ExitStack() as stack:
        for _ in range(FILES):
            client = stack.enter_context(socket.create_connection((place.hostname, place.port), timeout=30))
            stack.enter_context(context.wrap_socket(client, server_hostname="127.0.0.1"))
        asks(secure, certificate[0])


def test_health_is_answered_while_all_places_have_requests(plain: Served):
    """Which take as long as the body may: the others are told to come again."""
    unfinished = head("POST", "/tokenize", b"Content-Type: application/json", b"Content-Length: 9")
    with crowd(plain, unfinished):
        for _ in range(3):
            with Wire(plain.url) as wire:
                answer = wire.ask(head("GET", "/health"))
                assert answer
                assert answer.status == 200
            with Wire(plain.url) as wire:
                answer = wire.ask(post("/tokenize", {"content": "x"}))
                assert answer
                assert answer.status == 429
        assert rank(plain).num_fds() < FILES
    with plain.http() as http:
        until(lambda: http.post("/tokenize", json={"content": "x"}).status_code == 200, "there is room again", 120)


def test_health_needs_no_body_that_is_announced(plain: Served):
    with Wire(plain.url) as wire:
        answer = wire.ask(head("GET", "/health", b"Content-Length: 5"))
        assert answer
        assert answer.status == 200


def test_too_few_files_are_told_in_one_sentence(toy: Path):
    result = run(1, str(SCRIPTS / "few_files.py"), "80", "serve", "--model", str(toy), "--port", "0")
    assert result.status == 2
    assert "ulimit -n" in result.stderr


def test_the_limit_of_files_is_raised_where_that_may_be():
    from mpillama.server.connections import FEWEST, PLACES_KEPT, most_connections

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        assert most_connections(100) == 200 + PLACES_KEPT
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert most_connections(FEWEST) == 2 * FEWEST + PLACES_KEPT


def test_the_longest_idle_connection_is_dropped_for_a_new_one():
    from mpillama.server.connections import Crowd

    crowd, dropped = Crowd(3), []
    places = [crowd.enter() for _ in range(3)]
    for i, place in enumerate(places):
        assert place
        place.drop = lambda i=i: dropped.append(i)
    places[0].busy()
    places[1].busy()
    places[1].idle()
    assert crowd.enter()
    assert crowd.enter()
    assert dropped == [2, 1]
    for place in list(crowd.waiting):
        place.busy()
    assert crowd.enter() is None
    places[0].gone()
    assert crowd.enter()
    assert len(crowd.places) == 3
