"""What may happen to a host or its link in the midst of a run, and what the ranks say of it."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mpillama.comm.ways import OVERLAP
from tests.system.faults.running import LONG
from tests.system.hosts.network import Hosts
from tests.system.mpi.launch import END_SECONDS, PROGRAM, TIMEOUT, Launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 60)]

WAIT = 10
"""--timeout of these runs, within which MPI must start on a busy machine, too."""
LATE = END_SECONDS
"""So much later than the time-out a job may end: asking begins within a second, and every end has its last words."""
BUSY = 3000
"""Messages of a host: more than a start sends."""
WRAPPER = 'exec "$0" "$@" 2> "$ERRORS/$PMI_RANK"'
"""Keeps what each rank writes: of a host that is cut off the launcher hears nothing any more."""


class Run:
    """A run in the midst of its decode."""

    def __init__(self, hosts: Hosts, launch: Launch, folder: Path):
        self.hosts = hosts
        self.launch = launch
        self.folder = folder

    def words(self, rank: int) -> str:
        """What a rank wrote on standard error."""
        return (self.folder / str(rank)).read_text()

    def wait_for_words(self, rank: int, seconds: float) -> str:
        """The same, once there is anything."""
        end = time.monotonic() + seconds
        while not self.words(rank):
            assert time.monotonic() < end, f"rank {rank} has said nothing for {seconds:.0f} s"
            time.sleep(0.1)
        return self.words(rank)

    def spoken(self) -> list[str]:
        """The sentences of all ranks, in order of rank; not those of MPI on a job that is aborted."""
        return [text for file in sorted(self.folder.iterdir()) if "mpillama: " in (text := file.read_text())]

    def goes_on(self) -> bool:
        """Whether it is still there, writes, and has not complained."""
        count = 40
        return len(self.launch.read(count)) == count and self.launch.process.poll() is None and not self.spoken()


@contextmanager
def decoding(hosts: Hosts, per_host: int, toy: Path, folder: Path, timeout: float = WAIT) -> Iterator[Run]:
    """A run that has begun to write."""
    folder.mkdir()
    words = ("generate", "--model", toy, *LONG, "--timeout", f"{timeout:g}")
    with hosts.started(per_host, *PROGRAM, *words, wrapper=WRAPPER, settings={"ERRORS": str(folder)}) as launch:
        assert launch.read(20), launch.stderr()
        yield Run(hosts, launch, folder)


@pytest.mark.parametrize("per_host", [1, 2])
def test_a_cut_link_ends_both_sides(per_host: int, two_hosts: Hosts, toy: Path, tmp_path: Path) -> None:
    with decoding(two_hosts, per_host, toy, tmp_path / "errors") as run:
        two_hosts.link("h2", up=False)
        assert run.launch.gone_within(WAIT + LATE), run.spoken()
        near, far = run.words(0), run.wait_for_words(per_host, LATE)
    size = 2 * per_host
    assert near.startswith(f"mpillama: rank {per_host} of {size} on h2 ")
    assert far.startswith(f"mpillama: rank 0 of {size} on h1 ")
    assert all(f"not answered for {WAIT} s" in text and text.count("mpillama: ") == 1 for text in (near, far))
    lone = "it was stopped or is busy beyond measure, or " if per_host == 1 else ""
    assert f": {lone}host h2 is down or hangs, or the network between it and h1 is down; all ranks end" in near
    assert f": {lone}host h1 is down or hangs, or the network between it and h2 is down; all ranks end" in far
    assert len(run.spoken()) == 2


def test_a_link_is_cut_while_sums_travel_beside_work(two_hosts: Hosts, toy: Path, tmp_path: Path) -> None:
    """The thread that brings them is in MPI then."""
    folder = tmp_path / "errors"
    folder.mkdir()
    words = ("bench", "--model", toy, "--prefill", "64", "--repetitions", "1000000", "--timeout", str(WAIT))
    settings = {"ERRORS": str(folder), OVERLAP: "always", "MPI4PY_RC_THREAD_LEVEL": "multiple"}
    with two_hosts.started(1, *PROGRAM, *words, wrapper=WRAPPER, settings=settings) as launch:
        run, end = Run(two_hosts, launch, folder), time.monotonic() + TIMEOUT
        sent = 0
        while sent < BUSY:
            assert launch.process.poll() is None, launch.stderr()
            assert time.monotonic() < end, run.spoken()
            time.sleep(0.5)
            sent += two_hosts.counts()["h1"].messages
        two_hosts.link("h2", up=False)
        assert launch.gone_within(WAIT + LATE), run.spoken()
        near, far = run.words(0), run.wait_for_words(1, LATE)
    assert near.startswith("mpillama: rank 1 of 2 on h2 ")
    assert far.startswith("mpillama: rank 0 of 2 on h1 ")
    assert "host h2 is down or hangs, or the network" in near
    assert all(f"not answered for {WAIT} s" in text and text.count("mpillama: ") == 1 for text in (near, far))


def test_a_host_that_is_cut_off_says_so(four_hosts: Hosts, toy: Path, tmp_path: Path) -> None:
    """And the others name it."""
    with decoding(four_hosts, 1, toy, tmp_path / "errors") as run:
        four_hosts.link("h3", up=False)
        assert run.launch.gone_within(WAIT + LATE), run.spoken()
        near, far = run.words(0), run.wait_for_words(2, LATE)
    assert near.startswith(f"mpillama: rank 2 of 4 on h3 has not answered for {WAIT} s while rank 0 of 4 on h1 ")
    assert "host h3 is down, hangs or is cut off, or the rank was stopped; other hosts answer" in near
    assert "no other host answers h3 (h1, h2, h4 were asked), so h3 is cut off from the network" in far


def test_a_killed_host_is_named(four_hosts: Hosts, toy: Path, tmp_path: Path) -> None:
    """Its power fails: not even its kernel answers."""
    with decoding(four_hosts, 1, toy, tmp_path / "errors") as run:
        four_hosts.kill("h4")
        assert run.launch.gone_within(WAIT + LATE), run.spoken()
        spoken = "".join(run.spoken())
    assert "rank 3 of 4 on h4" in spoken
    assert "cut off from the network" not in spoken


def test_after_a_killed_rank_no_other_speaks_of_itself(two_hosts: Hosts, toy: Path, tmp_path: Path) -> None:
    """The launcher ends them, by whatever signal it takes; what there is to say, it says."""
    with decoding(two_hosts, 2, toy, tmp_path / "errors", timeout=10 * WAIT) as run:
        run.launch.ranks()[3].kill()
        assert run.launch.gone_within(END_SECONDS), run.spoken()
        assert run.launch.process.returncode != 0
        assert run.spoken() == []


@pytest.mark.parametrize(("silence", "timeout"), [(3, 10), (8, 30)])
def test_silence_shorter_than_the_time_out_is_survived(
    silence: float, timeout: float, two_hosts: Hosts, toy: Path, tmp_path: Path
) -> None:
    with decoding(two_hosts, 1, toy, tmp_path / "errors", timeout) as run:
        two_hosts.link("h2", up=False)
        time.sleep(silence)
        two_hosts.link("h2", up=True)
        assert run.goes_on(), run.spoken()
        run.launch.process.send_signal(signal.SIGTERM)


def test_lost_frames_are_no_fault(two_hosts: Hosts, toy: Path, tmp_path: Path) -> None:
    two_hosts.shape(loss_percent=1)
    with decoding(two_hosts, 2, toy, tmp_path / "errors") as run:
        assert run.goes_on(), run.spoken()
        run.launch.process.send_signal(signal.SIGTERM)
