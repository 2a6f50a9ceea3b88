"""Sums between more hosts than are a power of two; test_communicator.py runs these bodies with pytest under mpirun.

Each rank is taken for a host.
"""

from collections.abc import Iterator
from functools import partial
from typing import cast

import numpy as np
import pytest
from mpi4py import MPI

from mpillama.comm.communicator import Communicator
from mpillama.comm.shared_memory import CAPACITY, SharedReduction
from mpillama.comm.ways import ways_between
from mpillama.kernels.shared_sum import SharedWindow, window_bytes
from mpillama.kernels.target import prepare

GRID = 2.0**-30
SIZES = (1, 31, 33, 100, 4097)
"""Fewer numbers than hosts; one block of them, or one more; fewer blocks than hosts; many."""
LARGE = CAPACITY + 17
"""More than one exchange."""


@pytest.fixture(scope="module", params=[5, 6, 7, 9])
def comm(request: pytest.FixtureRequest) -> Iterator[Communicator | None]:
    """So many hosts; None on the ranks beyond."""
    mpi = cast(MPI.Intracomm, MPI.COMM_WORLD.Split(int(MPI.COMM_WORLD.rank < request.param), MPI.COMM_WORLD.rank))
    if MPI.COMM_WORLD.rank >= request.param:
        yield None
        return
    comm = Communicator(mpi, yields=True)
    comm.shared = SharedReduction(mpi, window_bytes, partial(SharedWindow, prepare("", 1).team), yields=True)
    comm.shared_limit = 2 * LARGE
    assert comm.shared.hosts == comm.size == request.param
    assert comm.shared.ways == ways_between(request.param)
    yield comm
    comm.free_sums()


def addends(kind: str, hosts: int, count: int) -> np.ndarray:
    """int64 [hosts, count], the same on every rank, in units of the grid."""
    random = np.random.default_rng(count)
    if kind == "exact":
        return random.integers(-(2**40), 2**40, (hosts, count))
    if kind == "large":  # sums that are just exact in float64; these are not packed
        return random.integers(-(2**52 // hosts), 2**52 // hosts, (hosts, count))
    if kind == "coarse":  # as of --sync q80: few bits, each token's on a grid of its own
        return random.integers(-127, 128, (hosts, count)) << (18 + np.arange(count) // 64 % 5)
    found = np.zeros((hosts, count), np.int64)  # one host alone has anything
    found[hosts - 1] = random.integers(-(2**30), 2**30, count)
    return found


@pytest.mark.parametrize("kind", ["exact", "large", "coarse", "of one host"])
@pytest.mark.parametrize("way", ways_between(9))
def test_sums_are_exact(comm: Communicator | None, way: str, kind: str) -> None:
    if comm is None:
        return
    assert comm.shared is not None
    comm.shared.use([(0, way)])
    for count in (*SIZES, *([LARGE] if kind in ("exact", "coarse") else [])):
        of_hosts = addends(kind, comm.size, count)
        found = comm.all_reduce((of_hosts[comm.rank] * GRID).reshape(1, -1))
        assert found.tobytes() == (of_hosts.sum(axis=0) * GRID).tobytes(), count


@pytest.mark.parametrize("way", ways_between(9))
def test_what_is_no_number_is_told_to_all(comm: Communicator | None, way: str) -> None:
    if comm is None:
        return
    assert comm.shared is not None
    comm.shared.use([(0, way)])
    mine = np.ones((1, 640))
    mine[0, ::7] = np.nan if comm.rank == comm.size - 1 else 1.0
    mine[0, 1::7] = {0: np.inf, 1: -np.inf}.get(comm.rank, 1.0)
    mine[0, 2::7] = np.inf if comm.rank == comm.size // 2 else 1.0
    found = comm.all_reduce(mine)[0]
    assert np.isnan(found[::7]).all()
    assert np.isnan(found[1::7]).all()
    assert (found[2::7] == np.inf).all()
    assert (found[3::7] == comm.size).all()


def test_messages_of_the_ways(comm: Communicator | None) -> None:
    """The most are those of a host that also answers for one beyond the grid, or beyond the largest power of two."""
    if comm is None:
        return
    assert comm.shared is not None
    doublings = comm.size.bit_length() - 1
    rest = comm.size > 1 << doublings
    rows, columns = {5: (2, 2), 6: (2, 3), 7: (2, 3), 9: (3, 3)}[comm.size]
    most_of = {
        "direct": comm.size - 1,
        "pieces": 2 * (comm.size - 1),
        "grid": 2 * (columns - 1) + 2 * (rows - 1) + (comm.size > rows * columns),
        "doubling": doublings + rest,
        "halving": 2 * doublings + rest,
    }
    for way, most in most_of.items():
        comm.shared.use([(0, way)])
        comm.forget_costs()
        comm.all_reduce(np.ones((1, 640)))
        assert max(comm.gather(comm.sent.messages)) == most
