"""The running ranks: how they meet, what each of them may use, and how they leave MPI together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import psutil
from mpi4py import MPI

from mpillama.comm.communicator import Communicator
from mpillama.comm.failure import FAILURE_STATUS, Aborter, describe_rank, no_longer_than
from mpillama.comm.launcher import DEFAULT_TIMEOUT, launched_here, launched_rank, launched_size, refuse_singletons
from mpillama.comm.liveness import Messages
from mpillama.comm.outbox import drain_all
from mpillama.comm.watchdog import Guard, Watch
from mpillama.comm.ways import overlap_wish
from mpillama.errors import UserError
from mpillama.job.same_program import refuse_other_programs

Intracomm = MPI.Intracomm
"""Ranks that a program has chosen."""


@dataclass(frozen=True)
class World:
    """The running ranks: their communicator, this rank's host mates, and how many threads it may use."""

    comm: Communicator
    neighbours: Communicator
    threads: int
    host: str

    def free(self) -> None:
        """Give back what `join` took of MPI; all ranks must call this, and none may use this World any more."""
        self.neighbours.mpi.Free()
        self.comm.free()

    def split(self, size: int) -> "World":
        """The world of this rank's group: ranks 0 to size - 1 are the first, and so on; UserError if a rest is left."""
        whole = self.comm
        if size < 1 or whole.size % size:
            raise UserError(f"--tensor-parallel is {size}: {whole.size} ranks do not divide into groups of that size.")
        group = whole.rank // size
        with whole.watch.blocking("the start"):
            mpi = cast(MPI.Intracomm, whole.mpi.Split(group, whole.rank))
            watch = Watch(whole.watch.aborter, whole.watch.timeout)
            watch.messages = Messages(mpi.Dup()) if size > 1 else None
        watch.display = whole.watch.display
        watch.names = whole.watch.names[group * size : (group + 1) * size]
        watch.hosts = whole.watch.hosts[group * size : (group + 1) * size]
        comm = Communicator(mpi, whole.yields, watch)
        return replace(self, comm=comm, neighbours=comm.neighbours())


@contextmanager
def start_mpi(
    threads: int | None, timeout: float = DEFAULT_TIMEOUT, refuse: bool = True, beside: int = 0,
    aborter: Aborter | None = None,
) -> Iterator[World]:  # fmt: skip
    """Let all ranks meet and yield the World; `refuse` several processes that MPI does not connect.

    `beside`: threads that rank 0 has busy besides those of its kernels.

    A UserError must be raised on all ranks (see Communicator.together); anything else that escapes aborts them all.
    No rank waits longer than `timeout` seconds for one that does not get on; 0 waits for ever.
    """
    if aborter is None:
        aborter = Aborter(launched_rank(), launched_size()[1])
        aborter.install()
    comm = _meet(MPI.COMM_WORLD, aborter, timeout, guarded=True)
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
    first = MPI.Get_library_version().replace("\0", "").strip().splitlines()[0]
    return " ".join(first.split())


def mpi_threads() -> str:
    """What MPI allows threads, in MPI's words: multiple, if they may send beside the main one."""
    levels = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled", MPI.THREAD_SERIALIZED: "serialized"}
    return levels.get(MPI.Query_thread(), "multiple")


def join(mpi: Intracomm | None, threads: int | None, timeout: float) -> World:
    """The World of a program that starts MPI by itself; all of `mpi` (None: all ranks) must call this.

    Nothing of the process is changed: no signal handler, no excepthook, no thread, and MPI stays the program's own.
    """
    if mpi is None:
        refuse_singletons(MPI.COMM_WORLD.size)
        mpi = MPI.COMM_WORLD
    own = mpi.Dup()
    return _measure(_meet(own, Aborter(own.rank, own.size), timeout, guarded=False), threads, 0)


def _meet(mpi: MPI.Intracomm, aborter: Aborter, timeout: float, guarded: bool) -> Communicator:
    aborter.abort, aborter.rank, aborter.where = mpi.Abort, mpi.rank, describe_rank(mpi.rank, mpi.size)
    watch = Watch(aborter, timeout)
    aborter.tell_end, aborter.knows_of_end = watch.tell_end, watch.knows_of_end
    if guarded:
        Guard(watch, aborter).start()
    with watch.blocking("the start"):
        hosts = refuse_other_programs(mpi)
        watch.messages = Messages(mpi.Dup()) if mpi.size > 1 else None
    watch.names = [f"rank {rank} of {mpi.size} on {host}" for rank, host in enumerate(hosts)]
    watch.hosts = hosts
    return Communicator(mpi, watch=watch)


def _finish(comm: Communicator, timeout: float) -> None:
    """Leave MPI when all ranks are there."""
    comm.barrier()
    comm.watch.messages = None
    with no_longer_than(timeout):
        drain_all()
        MPI.Finalize()


def _measure(comm: Communicator, threads: int | None, beside: int) -> World:
    """Share the host's cores among its ranks; UserError on all for what one's environment says amiss."""
    comm.together(overlap_wish)
    neighbours = comm.neighbours()
    cores = sorted(os.sched_getaffinity(0))
    mates = neighbours.gather((cores, threads))
    # Ranks of the job that are not in this communicator: they share the cores too, unless each is bound to its own.
    strangers = max(0, launched_here() - neighbours.size) if len(cores) == os.cpu_count() else 0
    if threads is None:
        sharing = strangers + sum(bool(set(cores) & set(others)) for others, _ in mates)
        threads = max(1, int(min(len(cores), _cgroup_cores()) / sharing))
    wanted = strangers * threads + sum(neighbours.gather(threads + (beside if comm.is_root else 0)))
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
