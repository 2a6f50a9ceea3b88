"""A rank that stops answering ends the job; one that is only slow, idle or suspended does not."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpillama.cli.running import write
from mpillama.comm.liveness import Kind, Liveness, Message, Place, Progress, State, describe, tree_neighbours
from tests.system.faults.running import (
    LONG,
    QUICK,
    SHORT,
    ends,
    everywhere,
    in_the_midst,
    name,
    sabotage,
    the_sentence,
    wait_for,
)
from tests.system.mpi.launch import END_SECONDS, PROGRAM, SCRIPTS, TIMEOUT, Launch, run, started

pytestmark = pytest.mark.timeout(TIMEOUT + 60)
WAIT = 2
BOUND = WAIT + 1 + END_SECONDS
"""A rank begins to ask within a second, and must then have waited for so long."""


# -- whole runs -------------------------------------------------------------------------------------------------------


@everywhere(QUICK)
def test_stopped_rank(ranks: int, victim: int, phase: str, toy: Path, tmp_path: Path) -> None:
    with in_the_midst(ranks, phase, toy, tmp_path, "--timeout", str(WAIT), slow=victim) as launch:
        launch.ranks()[victim].suspend()
        sentence = the_sentence(ends(launch, BOUND))
    assert sentence.startswith(f"mpillama: {name(victim, ranks)} has not answered for {WAIT} s while rank ")
    assert "--timeout" in sentence


@pytest.mark.parametrize("victim", [0, 1, 2], ids=["leader and root", "not a leader", "leader"])
def test_stopped_rank_of_several_hosts(victim: int, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks on one host, one on another: each waits for others of its host, or of other hosts."""
    monkeypatch.setenv("MPILLAMA_RANKS_PER_HOST", "2,1")
    with in_the_midst(3, "decode", toy, tmp_path, "--timeout", str(WAIT), slow=victim) as launch:
        launch.ranks()[victim].suspend()
        sentence = the_sentence(ends(launch, BOUND))
    assert sentence.startswith(f"mpillama: {name(victim, 3)} has not answered for {WAIT} s while rank ")


def test_rank_0_stopped_in_perplexity(toy: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Once upon a time a llama waited in the queue. " * 400)
    arguments = ("--file", str(text), "--context", "64", "--json", "--timeout", str(WAIT))
    with in_the_midst(2, "prefill", toy, tmp_path, command="perplexity", arguments=arguments) as launch:
        launch.ranks()[0].suspend()
        assert f"{name(0, 2)} has not answered" in the_sentence(ends(launch, BOUND))


@pytest.mark.parametrize("victim", [0, 2])
def test_a_read_that_never_ends(victim: int, toy: Path, tmp_path: Path) -> None:
    """The rank itself answers, but gets no further: its file server is gone."""
    result = sabotage("hang", 3, victim, "load", toy, tmp_path, *LONG, "--timeout", str(WAIT), limit=BOUND)
    assert result.status != 0
    sentence = the_sentence(result.stderr)
    assert sentence.startswith(f"mpillama: {name(victim, 3)} has got no further for {WAIT} s")
    assert "file system" in sentence


def test_a_rank_that_computes_for_long_is_no_failure(toy: Path, tmp_path: Path) -> None:
    """The others wait for much longer than the time-out, but it computes."""
    arguments = ("table", "0", tmp_path, "--model", toy, *SHORT, "--timeout", str(WAIT))
    result = run(3, SCRIPTS / "sabotage.py", "none", *arguments)
    assert (result.status, result.stderr) == (0, "")


def test_a_command_that_is_imported_for_long_is_no_failure(toy: Path, tmp_path: Path) -> None:
    """As from a file system that all ranks ask at once."""
    arguments = ("import", "1", tmp_path, "--model", toy, *SHORT, "--timeout", str(WAIT))
    result = run(2, SCRIPTS / "sabotage.py", "none", *arguments)
    assert (result.status, result.stderr) == (0, "")


def test_a_table_that_never_comes(toy: Path, tmp_path: Path) -> None:
    """The rank itself answers, but waits for something that does not come, as a file system."""
    result = sabotage("hang", 3, 0, "table", toy, tmp_path, *SHORT, "--timeout", str(WAIT), limit=BOUND)
    assert result.status != 0
    assert the_sentence(result.stderr).startswith(f"mpillama: {name(0, 3)} has got no further for {WAIT} s while ")


def test_a_rank_that_was_stopped_while_it_computes(toy: Path, tmp_path: Path) -> None:
    arguments = ("table", "0", tmp_path, "--model", toy, *SHORT, "--timeout", str(WAIT))
    with started(2, SCRIPTS / "sabotage.py", "none", *arguments) as launch:
        wait_for(launch, [tmp_path / "table-0"])
        launch.ranks()[0].suspend()
        assert f"{name(0, 2)} has not answered for {WAIT} s" in the_sentence(ends(launch, BOUND))


def test_a_slow_load_is_no_failure(toy: Path, tmp_path: Path) -> None:
    """One rank reads on for much longer than the time-out."""
    arguments = (*SHORT, "--layers", "1", "--timeout", str(WAIT))
    result = run(3, SCRIPTS / "sabotage.py", "none", "load", "1", tmp_path, "--model", toy, *arguments)
    assert (result.status, result.stderr) == (0, "")


def test_a_suspended_job_goes_on(toy: Path, tmp_path: Path) -> None:
    """All ranks are stopped, as a scheduler does it, for longer than the time-out; the time does not count."""
    with in_the_midst(2, "decode", toy, tmp_path, "--timeout", str(WAIT)) as launch:
        processes = launch.ranks().values()
        for process in processes:
            process.suspend()
        time.sleep(2 * WAIT)
        for process in processes:
            process.resume()
        assert not launch.gone_within(2 * WAIT), launch.stderr()
        assert launch.stderr() == ""


@contextmanager
def conversation(toy: Path) -> Iterator[Launch]:
    """A chat on two ranks that answers, after much longer than the time-out without a word."""
    options = ("--max-tokens", "3", "--timeout", "1", "--quiet")
    with started(2, *PROGRAM, "chat", "--model", toy, *options) as launch:
        assert not launch.gone_within(7), launch.stderr()
        say(launch, "Hello")
        assert launch.read(1)
        yield launch


def say(launch: Launch, text: str) -> None:
    assert launch.process.stdin is not None
    launch.process.stdin.write(text.encode() + b"\n")
    launch.process.stdin.flush()


def test_chat_waits_for_a_person(toy: Path) -> None:
    with conversation(toy) as launch:
        assert not launch.gone_within(4), launch.stderr()
        say(launch, "/quit")
        assert launch.gone_within(END_SECONDS)
        assert (launch.process.returncode, launch.stderr()) == (0, "")


def test_chat_finds_a_rank_that_stopped_meanwhile(toy: Path) -> None:
    with conversation(toy) as launch:
        launch.ranks()[1].suspend()
        say(launch, "Are you there?")
        assert f"{name(1, 2)} has not answered for 1 s" in the_sentence(ends(launch, 1 + 1 + END_SECONDS))


def test_a_wait_inside_mpi_ends_too() -> None:
    with started(3, SCRIPTS / "blocked.py") as launch:
        assert launch.gone_within(TIMEOUT)
        assert launch.process.returncode != 0
        sentence = the_sentence(launch.stderr())
    assert f"{name(0, 3)} has been stuck in the start" in sentence
    assert "cannot be known" in sentence


def test_an_end_that_takes_longer_than_a_short_time_out_is_no_failure() -> None:
    """All ranks have done their work by then."""
    result = run(2, SCRIPTS / "slow_end.py")
    assert (result.status, result.stderr) == (0, "")


@pytest.mark.parametrize("reader", ["quick", "slow"])
def test_a_reader_that_takes_its_time_is_announced(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a pager does: the pipe is full for a while."""
    idle: list[str] = []

    @contextmanager
    def note_idle() -> Iterator[None]:
        idle.append("begins")
        yield

    read_end, write_end = os.pipe()
    filling = b"x" * 65536 if reader == "slow" else b""
    os.write(write_end, filling)
    comm: Any = SimpleNamespace(idle=note_idle)
    with os.fdopen(write_end, "w") as stream, os.fdopen(read_end, "rb") as source:
        monkeypatch.setattr("sys.stdout", stream)
        reading = threading.Timer(2.0, lambda: source.read(len(filling)))
        reading.start()
        write(comm, "hello")
        reading.join()
        assert source.read(5) == b"hello"
    assert idle == (["begins"] if reader == "slow" else [])


# -- liveness, by a clock of its own -----------------------------------------------------------------------------


class Hour:
    """Rank 1 waits in collective 7 for its neighbours 0, 2 and 3; `others` say what they answer when asked, or None.

    `hosts`: of every rank, for those that are asked once one is silent.
    """

    def __init__(self, timeout: float = 600, hosts: Sequence[str] = "aaaa"):
        self.now = 0.0
        self.hosts = hosts
        self.calls: list[tuple[float, int]] = []
        self.liveness = Liveness(State(7, 0, True), 1, (0, 2, 3), timeout, lambda: self.now)

    def hear(self, rank: int, kind: Kind, state: State, *news: Any) -> None:
        self.liveness.hear(rank, Message(kind, state, *news))

    def wait(self, seconds: float, others: dict[int, Any], step: float = 0.5) -> tuple[str, list[int]]:
        """Pass time until a verdict."""
        for _ in range(int(seconds / step)):
            self.now += step
            self.liveness.pass_time()
            for rank in [*self.liveness.to_call(), *self.liveness.to_probe(self.hosts)]:
                self.calls.append((self.now, rank))
                if rank in others and (state := others[rank](self.now)):
                    self.hear(rank, Kind.HERE, state)
            verdict, found = self.liveness.verdict()
            if verdict:
                return verdict, [mate.rank for mate in found]
        return "", []


def waits(now: float) -> State:
    return State(7, 0, True)


def reads(now: float) -> State:
    return State(6, int(now), False)


def hangs(now: float) -> State:
    return State(6, 1000, False)


def elsewhere(now: float) -> State:
    return State(5, 0, True)


def silent(now: float) -> None:
    return None


CASES: dict[str, tuple[dict[int, Any], tuple[str, list[int]]]] = {
    "one is silent": ({0: waits, 2: silent, 3: waits}, ("silent", [2])),
    "two are silent": ({0: silent, 2: waits, 3: silent}, ("silent", [0, 3])),
    "one hangs": ({0: waits, 2: waits, 3: hangs}, ("stuck", [3])),
    "silence says more than a hang": ({0: hangs, 2: silent, 3: waits}, ("silent", [2])),
    "one hangs while another reads": ({0: reads, 2: hangs, 3: waits}, ("stuck", [2])),
    "all are elsewhere": ({0: elsewhere, 2: elsewhere, 3: waits}, ("elsewhere", [0, 2])),
    "all are here": ({0: waits, 2: waits, 3: waits}, ("all", [])),
    "one reads": ({0: reads, 2: waits, 3: waits}, ("", [])),
    "one reads for another who waits elsewhere": ({0: reads, 2: elsewhere, 3: waits}, ("", [])),
}


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case: str) -> None:
    others, expected = CASES[case]
    hour = Hour()
    assert hour.wait(3600, others) == expected
    assert not expected[0] or 600 <= hour.now <= 620
    names = [f"rank {rank} of 4 on n{rank}" for rank in range(4)]
    if expected[0]:
        mates = [hour.liveness.mates[rank] for rank in expected[1]]
        sentence = describe(expected[0], mates, Place(1, "a sum", names, hour.hosts, {"a"}), 600)
        assert all(names[rank] in sentence for rank in expected[1][:1])
        assert "600 s" in sentence
        assert "--timeout" in sentence


def test_a_rank_that_reads_and_then_falls_silent_is_found() -> None:
    hour = Hour()
    verdict = hour.wait(3600, {0: waits, 2: lambda now: reads(now) if now < 1000 else None, 3: waits})
    assert verdict == ("silent", [2])
    assert 1580 <= hour.now <= 1620


def test_the_time_of_a_suspended_job_does_not_count() -> None:
    hour = Hour()
    assert hour.wait(300, {0: waits, 2: silent, 3: waits}) == ("", [])
    hour.now += 100_000
    assert hour.wait(290, {0: waits, 2: silent, 3: waits}) == ("", [])
    assert hour.wait(30, {0: waits, 2: silent, 3: waits}) == ("silent", [2])


def test_nobody_is_asked_during_a_short_wait() -> None:
    hour = Hour()
    hour.wait(0.9, {0: silent, 2: silent, 3: silent}, step=0.1)
    assert hour.calls == []


def test_who_has_just_been_heard_is_not_asked() -> None:
    hour = Hour()
    for _ in range(1000):
        hour.hear(0, Kind.CALL, State(7, 0, True))
        hour.wait(0.5, {})
    assert {rank for _, rank in hour.calls} == {2, 3}


@pytest.mark.parametrize("gets_on", [True, False])
def test_news_of_a_rank_far_away_keep_a_wait_alive(gets_on: bool) -> None:
    """All neighbours wait here, but one of them has heard of rank 50."""
    hour, others = Hour(), {0: waits, 2: waits, 3: waits}
    for step in range(100):
        hour.hear(2, Kind.HERE, waits(0), (50, Progress(6, 10 + gets_on * step)))
        verdict = hour.wait(10, others)
        if verdict[0]:
            break
    assert (verdict[0], hour.now < 625) == (("", False) if gets_on else ("all", True))
    assert hour.liveness.known[50] == Progress(6, 10 + gets_on * step)


def test_news_are_passed_on_once_and_not_back() -> None:
    hour = Hour()
    hour.wait(20, {0: waits, 2: waits, 3: waits})
    hour.hear(2, Kind.HERE, reads(hour.now))
    assert hour.liveness.to_tell() == [0, 3]
    assert hour.liveness.news == (2, Progress(6, int(hour.now)))
    hour.wait(2, {})
    hour.hear(0, Kind.HERE, waits(0), (2, Progress(6, 20)))
    assert hour.liveness.to_tell() == []


@pytest.mark.parametrize(
    ("hosts", "silent_ranks", "words"),
    [
        ("abcd", {0, 2, 3}, ["rank 0 of 4 on a (and 2 more)", "so b is cut off from the network"]),
        ("abcd", {2}, ["rank 2 of 4 on c has not", "host c is down, hangs or is cut off", "other hosts answer"]),
        ("abcd", {2, 3}, ["rank 2 of 4 on c (and 1 more)", "the hosts c, d are down, or cut off from b"]),
        ("bbaa", {2, 3}, ["rank 2 of 4 on a (and 1 more)", "the network between it and b is down"]),
        ("abbb", {0}, ["rank 0 of 4 on a has not", "it was stopped or is busy", "or host a is down"]),
        ("bbaa", {2}, ["rank 2 of 4 on a has not", "it was stopped, it is busy"]),
        ("bbbb", {2, 3}, ["rank 2 of 4 on b (and 1 more)", "it was stopped, it is busy"]),
    ],
)
def test_a_silent_host_is_named(hosts: str, silent_ranks: set[int], words: list[str]) -> None:
    hour = Hour(10, hosts)
    others = {rank: silent if rank in silent_ranks else waits for rank in (0, 2, 3)}
    verdict, ranks = hour.wait(12, others)
    assert (verdict, set(ranks)) == ("silent", silent_ranks)
    names = [f"rank {rank} of 4 on {host}" for rank, host in enumerate(hosts)]
    place = Place(1, "a sum", names, hosts, hour.liveness.answering_hosts(hosts))
    sentence = describe(verdict, [hour.liveness.mates[rank] for rank in ranks], place, 10)
    assert all(part in sentence for part in words), sentence


def test_a_few_ranks_elsewhere_tell_whether_a_host_is_cut_off() -> None:
    """Rank 1's only neighbours are on host b; of 40 more hosts eight are asked, and of host b all but those."""
    hosts = ["x", "x", "b", "b", *("b" if rank < 8 else f"h{rank}" for rank in range(4, 48))]
    hour = Hour(10)
    hour.hosts, hour.liveness.mates = hosts, {rank: hour.liveness.mates[rank] for rank in (2, 3)}
    verdict, ranks = hour.wait(12, dict.fromkeys(range(8, 48), waits))
    probes = [mate for mate in hour.liveness.mates.values() if mate.probe]
    assert [mate.rank for mate in probes if hosts[mate.rank] == "b"] == [4, 5, 6, 7]
    assert len(probes) == 12
    assert (verdict, ranks) == ("silent", [2, 3, 4, 5, 6, 7])


@pytest.mark.parametrize("size", [1, 2, 9, 10, 100, 4096])
def test_the_tree_joins_all_ranks_by_few_links(size: int) -> None:
    neighbours = {rank: tree_neighbours(rank, size) for rank in range(size)}
    assert sum(map(len, neighbours.values())) == 2 * (size - 1)
    assert all(rank in neighbours[other] for rank, found in neighbours.items() for other in found)
    assert max(map(len, neighbours.values())) <= 9
    reached, steps = {0}, 0
    while len(reached) < size:
        reached |= {other for rank in reached for other in neighbours[rank]}
        steps += 1
    assert steps <= 4
