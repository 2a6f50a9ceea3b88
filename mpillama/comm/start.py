"""Starting MPI: as late as possible, and so that no failure leaves ranks behind."""

import faulthandler
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from mpillama.comm.failure import FAILURE_STATUS, Aborter, describe_rank
from mpillama.comm.launcher import launched_rank, launched_size, refuse_singletons
from mpillama.errors import UserError

if TYPE_CHECKING:
    from mpillama.comm.communicator import Communicator


@dataclass(frozen=True)
class World:
    """The running ranks: their communicator, this rank's host mates, and how many threads it may use."""

    comm: "Communicator"
    neighbours: "Communicator"
    threads: int
    host: str


DEFAULT_TIMEOUT = 600.0
"""Seconds that a rank waits for another one."""


@contextmanager
def start_mpi(
    threads: int | None, refuse: bool = True, timeout: float = DEFAULT_TIMEOUT, beside: int = 0
) -> Iterator[World]:
    """Start MPI and yield the World; `refuse` several processes that MPI does not connect.

    `beside`: threads that rank 0 has busy besides those of its kernels.

    A UserError must be raised on all ranks (see Communicator.together); anything else that escapes aborts them all.
    No rank waits longer than `timeout` seconds for one that does not get on; 0 waits for ever.
    """
    if threads is not None and threads < 1:
        raise UserError(f"--threads is {threads}: give at least 1.")
    if timeout != 0 and not timeout >= 1:
        raise UserError(f"--timeout is {timeout:g}: give seconds, at least 1, or 0 to wait for ever.")
    comm, aborter = _initialise(timeout)
    if refuse:
        refuse_singletons(comm.size)
    try:
        yield _measure(comm, threads, beside)
    except SystemExit as leaving:  # no excepthook sees it, but the other ranks would wait for this one
        aborter.end(leaving.code if isinstance(leaving.code, int) and leaving.code else FAILURE_STATUS)
    except UserError:
        _finish(comm, timeout)
        raise
    else:
        _finish(comm, timeout)


def mpi_library() -> str:
    """The MPI library's own name and version."""
    from mpi4py import MPI

    first = MPI.Get_library_version().replace("\0", "").strip().splitlines()[0]
    return " ".join(first.split())


def _initialise(timeout: float) -> tuple["Communicator", Aborter]:
    aborter = Aborter(launched_rank(), launched_size()[1])
    aborter.install()
    with _no_longer_than(timeout):
        mpi = _load_mpi().COMM_WORLD

    from mpillama.comm.communicator import Communicator
    from mpillama.comm.roll_call import Messages
    from mpillama.comm.same_program import refuse_other_programs
    from mpillama.comm.watchdog import Guard, Watch

    aborter.abort, aborter.rank, aborter.where = mpi.Abort, mpi.rank, describe_rank(mpi.rank, mpi.size)
    watch = Watch(aborter, timeout)
    Guard(watch, aborter).start()
    with watch.blocking("the start"):
        hosts = refuse_other_programs(mpi)
        watch.messages = Messages(mpi.Dup()) if mpi.size > 1 else None
    watch.names = [f"rank {rank} of {mpi.size} on {host}" for rank, host in enumerate(hosts)]
    return Communicator(mpi, watch=watch), aborter


def _load_mpi() -> Any:
    import mpi4py

    mpi4py.rc.thread_level = "funneled"
    with warnings.catch_warnings():
        # mpi4py's word on a launcher of another MPI, once per rank: refuse_singletons and doctor say it once.
        warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
        from mpi4py import MPI
    return MPI


@contextmanager
def _no_longer_than(timeout: float) -> Iterator[None]:
    """A bound for what MPI does without letting any other Python run: its start and its end."""
    if timeout:
        faulthandler.dump_traceback_later(timeout, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def _finish(comm: "Communicator", timeout: float) -> None:
    """Leave MPI when all ranks are there."""
    comm.barrier()
    with _no_longer_than(timeout):
        _load_mpi().Finalize()


def _measure(comm: "Communicator", threads: int | None, beside: int) -> World:
    """Share the host's cores among its ranks."""
    neighbours = comm.neighbours()
    cores = sorted(os.sched_getaffinity(0))
    mates = neighbours.gather((cores, threads))
    if threads is None:
        sharing = sum(bool(set(cores) & set(others)) for others, _ in mates)
        threads = max(1, int(min(len(cores), _cgroup_cores()) / sharing))
    wanted = sum(neighbours.gather(threads + (beside if comm.is_root else 0)))
    comm.yields = neighbours.yields = wanted > len({c for others, _ in mates for c in others})
    return World(comm, neighbours, threads, os.uname().nodename)


def _cgroup_cores() -> float:
    """The cores that a container's quota grants (cgroup v2), or all."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:  # noqa: PTH123 - a kernel interface, not a path of ours
            quota, period = file.read().split()[:2]
    except (OSError, ValueError):
        return float(psutil.cpu_count() or 1)
    return float(psutil.cpu_count() or 1) if quota == "max" else max(1.0, int(quota) / int(period))
