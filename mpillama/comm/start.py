"""Starting MPI: as late as possible, and so that no failure leaves ranks behind."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from mpillama.comm.failure import FAILURE_STATUS, Aborter, describe_rank
from mpillama.comm.launcher import refuse_singletons
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


@contextmanager
def start_mpi(threads: int | None, refuse: bool = True) -> Iterator[World]:
    """Start MPI and yield the World; `refuse` several processes that MPI does not connect.

    A UserError must be raised on all ranks (see Communicator.together); anything else that escapes aborts them all.
    """
    if threads is not None and threads < 1:
        raise UserError(f"--threads is {threads}: give at least 1.")
    comm, aborter = _initialise()
    if refuse:
        refuse_singletons(comm.size)
    try:
        yield _measure(comm, threads)
    except SystemExit as leaving:  # no excepthook sees it, but the other ranks would wait for this one
        aborter.end(leaving.code if isinstance(leaving.code, int) and leaving.code else FAILURE_STATUS)


def mpi_library() -> str:
    """The MPI library's own name and version."""
    from mpi4py import MPI

    return MPI.Get_library_version().strip().splitlines()[0]


def _initialise() -> tuple["Communicator", Aborter]:
    import mpi4py

    mpi4py.rc.thread_level = "funneled"
    with warnings.catch_warnings():
        # mpi4py's word on a launcher of another MPI, once per rank: refuse_singletons and doctor say it once.
        warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
        from mpi4py import MPI

    from mpillama.comm.communicator import Communicator

    aborter = Aborter(MPI.COMM_WORLD.Abort, describe_rank(MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size))
    aborter.install()
    return Communicator(MPI.COMM_WORLD), aborter


def _measure(comm: "Communicator", threads: int | None) -> World:
    """Share the host's cores among its ranks."""
    neighbours = comm.neighbours()
    cores = sorted(os.sched_getaffinity(0))
    mates = neighbours.gather((cores, threads))
    if threads is None:
        sharing = sum(bool(set(cores) & set(others)) for others, _ in mates)
        threads = max(1, int(min(len(cores), _cgroup_cores()) / sharing))
    wanted = sum(neighbours.gather(threads))
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
