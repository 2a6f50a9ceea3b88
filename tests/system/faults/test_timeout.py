"""A rank that stops answering ends the job; one that is only slow, idle or suspended does not."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpillama.cli.running import write
from mpillama.comm.liveness import Kind, Liveness, State, describe
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
    """Rank 1 of four waits in collective 7 for the others; `others` say what they answer when asked, None nothing."""

    def __init__(self, timeout: float = 600, mates: int = 4):
        self.now = 0.0
        self.calls: list[float] = []
        self.liveness = Liveness(State(7, 0, True), 1, mates, timeout, lambda: self.now)

    def wait(self, seconds: float, others: dict[int, Any], step: float = 0.5) -> tuple[str, list[int]]:
        """Pass time until a verdict."""
        for _ in range(int(seconds / step)):
            self.now += step
            self.liveness.pass_time()
            if self.liveness.is_time_to_call():
                self.calls.append(self.now)
                for rank, answer in others.items():
                    if state := answer(self.now):
                        self.liveness.hear(rank, Kind.HERE, state)
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
        sentence = describe(expected[0], mates, names, "a sum", 1, 600)
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


def test_the_lowest_rank_asks_for_all() -> None:
    hour = Hour()
    others = {0: waits, 2: silent, 3: waits}
    for _ in range(100):
        hour.liveness.hear(0, Kind.CALL, State(7, 0, True))
        assert hour.wait(10, others) == ("", [])
    assert hour.calls == []
    assert hour.wait(60, others) == ("silent", [2])  # rank 0 asks no more


def test_a_call_from_another_collective_or_a_higher_rank_does_not_silence() -> None:
    hour = Hour()
    hour.liveness.hear(0, Kind.CALL, State(6, 0, True))
    hour.liveness.hear(3, Kind.CALL, State(7, 0, True))
    hour.wait(5, {})
    assert hour.calls
