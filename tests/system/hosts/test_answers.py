"""Runs over several hosts: the answer of one rank, nothing else on standard output, and what crosses the wire."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.system.hosts.network import Hosts, running_hosts, why_not
from tests.system.mpi.launch import PROGRAM, SCRIPTS, TIMEOUT, run
from tests.tiny_models import EOS, TOY

pytestmark = pytest.mark.timeout(TIMEOUT + 60)

TOKENS = 12
PROMPT = "Once * upon"
OPTIONS = ("--json", "--temperature", "0", "--max-tokens", str(TOKENS), "--prompt", PROMPT)


def answer(stdout: str) -> tuple[list[int], str]:
    found = json.loads(stdout)
    return found["token_ids"], found["logits_sha256"]


@pytest.fixture(scope="module")
def alone(toy: Path) -> tuple[list[int], str]:
    """The answer of one rank."""
    return answer(run(None, *PROGRAM, "generate", "--model", toy, *OPTIONS).stdout)


def generate(hosts: Hosts, per_host: int, toy: Path, *options: str) -> dict[str, Any]:
    """A whole run, whose standard output must be one JSON object."""
    result = hosts.run(per_host, *PROGRAM, "generate", "--model", toy, *OPTIONS, *options)
    assert result.status == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("per_host", [1, 2])
def test_two_hosts_give_the_answer_of_one_rank(
    per_host: int, two_hosts: Hosts, toy: Path, alone: tuple[list[int], str]
) -> None:
    found = generate(two_hosts, per_host, toy)
    assert (found["token_ids"], found["logits_sha256"]) == alone
    assert found["ranks"] == 2 * per_host


def test_one_rank_of_each_host_sends_its_sums(two_hosts: Hosts, toy: Path) -> None:
    """Frames with data that cross the wire for a token: twice as many ranks send no more of them."""

    def frames(tokens: int) -> int:
        two_hosts.counts()
        words = ("--prompt-token-ids", "5,6,7", "--temperature", "0", "--max-tokens", str(tokens), "--quiet")
        result = two_hosts.run(
            2, SCRIPTS / "direct_sums.py", "generate", "--model", toy, *words, "--logit-bias", f"{EOS}=-1000"
        )
        assert result.status == 0, result.stderr
        return sum(count.messages for count in two_hosts.counts().values())

    few, many = 4, 304  # so many that the trials of the start, which are not always as many, hardly count
    a_token = (frames(many) - frames(few)) / (many - few)
    sums = 2 * (1 + 2 * TOY["num_hidden_layers"])  # of both hosts' leaders
    assert sums / 2 < a_token < 1.5 * sums + 4, "each rank's own would be twice the sums"


@pytest.mark.slow
def test_four_hosts_give_it_too(four_hosts: Hosts, toy: Path, alone: tuple[list[int], str]) -> None:
    """Over a slow network that loses frames."""
    four_hosts.shape(delay_us=200, mbit=1000, loss_percent=1)
    found = generate(four_hosts, 1, toy)
    assert (found["token_ids"], found["logits_sha256"]) == alone


def test_threads_are_granted_between_hosts_without_being_asked(
    tmp_path: Path, toy: Path, alone: tuple[list[int], str]
) -> None:
    """By what a user's launcher tells of hosts with cores of their own."""
    if reason := why_not():
        pytest.skip(reason)
    with running_hosts(tmp_path, 2, 1) as hosts:
        doctor = hosts.run(1, *PROGRAM, "doctor", "--json")
        assert json.loads(doctor.stdout)["mpi_threads"] == "multiple", doctor.stderr
        found = generate(hosts, 1, toy, "--prefill-chunk", "8")
        assert (found["token_ids"], found["logits_sha256"]) == alone


def test_too_little_shared_memory_is_a_sentence(two_hosts: Hosts, toy: Path) -> None:
    """On the host that lacks it, before MPI ends by a bus error."""
    two_hosts.call("h2", "mount", "-o", "remount,size=1M", "/dev/shm")
    words, truth = ("generate", "--model", toy, *OPTIONS), 'MPI_LOCALNRANKS=2 exec "$0" "$@"'
    with two_hosts.started(2, *PROGRAM, *words, wrapper=truth) as launch:
        result = launch.finish()
    assert result.status != 0
    assert "mpillama: /dev/shm on host h2 holds 1 MB, but 2 ranks" in result.stderr
    assert result.stderr.count("mpillama: ") == 1
    assert "{" not in result.stdout


def test_little_shared_memory_suffices(two_hosts: Hosts, toy: Path, alone: tuple[list[int], str]) -> None:
    """UCX would begin with as much and find it too little, and end by a segmentation fault."""
    for name in two_hosts.names:
        two_hosts.call(name, "mount", "-o", "remount,size=16M", "/dev/shm")
    words, usual = ("generate", "--model", toy, *OPTIONS), 'unset UCX_TLS; exec "$0" "$@"'
    with two_hosts.started(2, *PROGRAM, *words, wrapper=usual) as launch:
        result = launch.finish()
    assert result.status == 0, result.stderr
    assert answer(result.stdout) == alone


def test_the_wire_counts_delays_and_cuts(two_hosts: Hosts) -> None:
    usual = two_hosts.ping()
    two_hosts.counts()
    two_hosts.shape(delay_us=2000)
    delayed = [two_hosts.ping(10) for _ in range(5)]  # of which one finds the cores free
    assert 0.004 <= min(delayed) < usual + 0.02
    counts = two_hosts.counts()
    assert all(50 <= count.messages < 60 for count in counts.values())  # TCP may send one again
    assert all(50 * 64 < count.bytes < 250 * 200 for count in counts.values())
    two_hosts.link("h2", up=False)
    with pytest.raises(AssertionError):
        two_hosts.call("h1", "timeout", "1", "python3", "-c", "import socket; socket.create_connection(('h2', 7))")


def test_the_time_of_sums_on_the_wire_is_not_called_waiting(two_hosts: Hosts, toy: Path) -> None:
    """With 20 ms from host to host both tables of `bench --where` say that ranks wait for the network."""
    two_hosts.shape(20_000)
    sizes = ("--prefill", "8", "--decode", "4", "--context", "8", "--repetitions", "1", "--batch", "1")
    result = two_hosts.run(1, *PROGRAM, "bench", "--model", toy, *sizes, "--threads", "1", "--where", "--json")
    assert result.status == 0, result.stderr
    for step in json.loads(result.stdout)["where"]:
        parts = {part["part"]: part["seconds"] for part in step["parts"]}
        wire = step["ranks"][0]["wire_seconds"]
        assert wire > 2 * TOY["num_hidden_layers"] * 0.02
        assert parts["residual and sum over ranks"] >= wire
