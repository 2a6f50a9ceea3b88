"""The monitor's lines, the floor's patience, warnings about a host's memory, and how a rank attends its reading."""

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mpillama.errors import UserError
from mpillama.job import monitor
from mpillama.job.host_memory import memory_warnings
from mpillama.job.monitor import PATIENCE, Monitor, Sample

GIB = 1 << 30


# -- monitor ----------------------------------------------------------------------------------------------------------


def test_a_line_tells_what_happened_since_the_last():
    before = Sample(10.0, GIB, GIB, 0, 100, 7, 50)
    now = Sample(14.0, 1_500_000_000, 3_250_000_000, 2_000_000, 160, 10, 130)
    line = now.line(before)
    assert line == (
        "RSS 1.500 GB, host: 3.250 GB available, swap 0.002 GB used; page faults: 60 minor, 3 major; 20.0 tokens/s."
    )


@pytest.mark.timeout(120)
def test_the_monitor_counts_the_models_tokens(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mpillama"), "propagate", True)
    caplog.set_level(logging.INFO, "mpillama")
    model = SimpleNamespace(tokens_run=0)
    with Monitor(0.05, None) as watching:
        watching.watch(model)
        while not any(not r.getMessage().endswith(" 0.0 tokens/s.") for r in caplog.records):
            model.tokens_run += 1
            watching.ended.wait(0.01)
    assert not watching.thread.is_alive()


def test_nothing_runs_that_was_not_asked_for():
    count = threading.active_count()
    with Monitor(None, None) as watching:
        assert threading.active_count() == count
        assert not watching.thread.is_alive()


@pytest.mark.parametrize(("leads", "looks"), [(True, 1), (False, PATIENCE + 1)])
def test_the_first_rank_of_a_host_speaks_first(leads, looks, monkeypatch):
    watching = Monitor(None, 1000, leads)
    monkeypatch.setattr(monitor, "available_bytes", lambda: 1000)
    watching._check_floor()
    monkeypatch.setattr(monitor, "available_bytes", lambda: 999)
    for _ in range(looks - 1):
        watching._check_floor()
    with pytest.raises(UserError, match="--memory-floor"):
        watching._check_floor()


# -- a host's memory --------------------------------------------------------------------------------------------------


def kernel(folder: Path, huge: str, free: int) -> Path:
    (folder / "transparent_hugepage").mkdir()
    (folder / "transparent_hugepage" / "enabled").write_text(huge + "\n")
    (folder / "hugepages" / "hugepages-1048576kB").mkdir(parents=True)
    (folder / "hugepages" / "hugepages-1048576kB" / "free_hugepages").write_text(f"{free}\n")
    return folder


def test_a_host_as_it_should_be(tmp_path):
    assert memory_warnings(0, kernel(tmp_path, "always [madvise] never", 0)) == {}
    assert memory_warnings(0, tmp_path / "none") == {}


def test_a_host_that_wants_advice(tmp_path):
    found = memory_warnings(3 * 10**9, kernel(tmp_path, "always madvise [never]", 2))
    assert sorted(found) == ["pages", "reserved", "swap"]
    assert "3.0 GB of swap" in found["swap"]
    assert "transparent huge pages are off" in found["pages"]
    assert "2.1 GB are set aside" in found["reserved"]


@pytest.mark.parametrize(("swapped", "told"), [(0, False), (1 << 20, False), (GIB, True)])
def test_hosts_are_named_once(swapped, told, target, caplog, monkeypatch):
    from mpillama.loading import preflight

    monkeypatch.setattr(logging.getLogger("mpillama"), "propagate", True)
    caplog.set_level(logging.WARNING, "mpillama")
    monkeypatch.setattr(preflight, "memory_warnings", lambda used: memory_warnings(swapped, Path("/nowhere")))
    comm = SimpleNamespace(is_root=True, gather=lambda mine: [mine, ("n2", mine[1]), ("n2", {}), ("n3", mine[1])])
    preflight.warn_of_hosts(SimpleNamespace(comm=comm, neighbours=SimpleNamespace(is_root=True), host="n1"))
    assert len(caplog.records) == told
    assert all(r.getMessage().startswith("on host n1 (and on 2 more) 1.1 GB of swap") for r in caplog.records)


# -- attending --------------------------------------------------------------------------------------------------------


class Reader:
    """Counts, and is told to stop."""

    def __init__(self):
        self.bytes_read = 0
        self.stopped = threading.Event()

    def stop(self):
        self.stopped.set()


def attended(*tasks):
    """What was shown while tasks ran, on one rank."""
    from mpillama.comm.communicator import Communicator
    from mpillama.loading.progress import LoadWatch

    reader, shown = Reader(), []
    with ThreadPoolExecutor(4) as pool:
        futures: list[Future[None]] = [pool.submit(task, reader) for task in tasks]
        LoadWatch(Communicator.alone(), ["n1"], reader, 100, shown.append).attend(futures)
    return reader, shown


@pytest.mark.timeout(120)
def test_reading_ends_when_all_is_read(target):
    def read(reader):
        reader.bytes_read += 50
        reader.stopped.wait(0.3)

    reader, shown = attended(read, read)
    assert int(shown[-1].read.sum()) == 100
    assert shown[-1].slowest == "rank 0 on n1, 100 %"
    assert not reader.stopped.is_set()


@pytest.mark.timeout(120)
def test_a_failure_stops_the_rest(target):
    def fail(reader):
        raise UserError("it cannot be read.")

    with pytest.raises(UserError, match="cannot be read"):
        attended(fail, lambda reader: reader.stopped.wait())


@pytest.mark.timeout(120)
def test_a_failure_of_the_program_is_raised_as_it_is(target):
    def fail(reader):
        reader.stop()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attended(fail, lambda reader: reader.stopped.wait())


def test_the_slowest_rank_is_the_one_with_the_largest_share_to_read(target):
    from mpillama.loading.progress import LoadState

    state = LoadState(np.array([50, 30, 0]), np.array([100, 40, 0]), ["a", "b", "c"])
    assert state.slowest == "rank 0 on a, 50 %"
    assert LoadState(np.array([0, 0]), np.array([0, 0]), ["a", "b"]).slowest == "rank 0 on a, 100 %"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("is_root", "quiet", "told"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_what_takes_long_is_said_once_in_a_log(is_root, quiet, told, monkeypatch, capfd):
    from mpillama.cli import display

    monkeypatch.setattr(display, "LONG", 0.0)
    with display.stages(is_root, quiet)("reading the table") as tell:
        tell("half of it")
        time.sleep(0.2)
    assert capfd.readouterr().err == ("mpillama: reading the table …\n" if told else "")


def test_what_takes_a_moment_is_not_told(capfd):
    from mpillama.cli import display

    with display.stages(is_root=True, quiet=False)("reading the table"):
        pass
    assert capfd.readouterr().err == ""


def test_names_of_logs_sort_as_ranks_do(tmp_path):
    from mpillama.cli.logs import _open

    worlds = [SimpleNamespace(comm=SimpleNamespace(rank=rank, size=12), host="n1") for rank in (2, 10)]
    handlers = [_open(tmp_path, world) for world in worlds]
    for handler in handlers:
        handler.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mpillama-02-of-12.log", "mpillama-10-of-12.log"]
