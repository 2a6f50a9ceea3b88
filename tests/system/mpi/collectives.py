"""What the ranks must agree on; test_communicator.py runs these bodies with pytest under mpirun."""

import os
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from mpi4py import MPI

from mpillama.comm import communicator
from mpillama.comm.communicator import MESSAGE_BYTES, Communicator, Rounds
from mpillama.comm.shared_memory import CAPACITY, POLLING_SECONDS, SharedReduction
from mpillama.comm.ways import Traffic, virtual_host, ways_between
from mpillama.errors import UserError
from mpillama.kernels.shared_sum import SharedWindow, window_bytes
from mpillama.kernels.target import prepare

GRID = 2.0**-30
LIMIT = 2**52
"""In units of the grid: sums below this are exact in float64."""


CROWDED = MPI.COMM_WORLD.size > len(os.sched_getaffinity(0))
"""More ranks than cores: they always yield, as in a run, since each would wait until the system interrupts another."""


@pytest.fixture(scope="module")
def shared() -> SharedReduction:
    """The sum through shared memory, between hosts if MPILLAMA_RANKS_PER_HOST makes some."""
    return SharedReduction(MPI.COMM_WORLD, window_bytes, partial(SharedWindow, prepare("", 1).team), CROWDED)


HOSTS = os.environ.get("MPILLAMA_RANKS_PER_HOST", "")
WAYS = [f"shared memory, {way}" for way in ways_between(3)] if HOSTS else []


@pytest.fixture(params=["blocking", "yielding", "in pieces", "shared memory", "shared memory, yielding", *WAYS])
def comm(request: pytest.FixtureRequest) -> Communicator:
    yields = "yielding" in request.param
    if yields and CROWDED:
        pytest.skip("all yield")
    comm = Communicator(MPI.COMM_WORLD, yields=yields or CROWDED)
    if request.param == "in pieces":  # as if counts had few bits
        comm.largest_count = 500
    if "shared" in request.param:
        comm.shared, comm.shared_limit = request.getfixturevalue("shared"), sys.maxsize
        way = request.param.rpartition(", ")[2]
        comm.shared.use([(0, way if way in comm.shared.ways else comm.shared.ways[0])])
    return comm


def on_grid(addends: np.ndarray) -> np.ndarray:
    return addends.astype(np.float64) * GRID


# -- all_reduce -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_all_reduce_is_exact_for_any_split(comm: Communicator, seed: int) -> None:
    random = np.random.default_rng(seed)  # the same on every rank
    panels, tokens, width = int(random.integers(1, 40)), int(random.integers(1, 9)), int(random.integers(1, 70))
    magnitude = LIMIT // panels
    addends = random.integers(-magnitude, magnitude, (panels, tokens, width))
    owner = random.integers(0, comm.size, panels)  # some ranks may have none
    mine = np.zeros((tokens, width))
    for panel in np.random.default_rng(comm.rank).permutation(np.flatnonzero(owner == comm.rank)):
        mine += on_grid(addends[panel])
    result = comm.all_reduce(mine)
    assert result.tobytes() == on_grid(addends.sum(axis=0)).tobytes()


def test_all_reduce_keeps_the_last_bit_that_another_order_would_lose(comm: Communicator) -> None:
    huge, tiny = float(2**22 - 1), GRID
    mine = np.full((1, 3), tiny if comm.rank else huge)
    assert comm.all_reduce(mine).tolist() == [[huge + (comm.size - 1) * tiny] * 3]


def test_all_reduce_of_a_message_longer_than_the_shared_memory(comm: Communicator) -> None:
    length = 2 * CAPACITY + 17
    result = comm.all_reduce((np.arange(length) * (comm.rank + 1.0)).reshape(1, -1))
    assert np.array_equal(result[0], np.arange(length) * (comm.size * (comm.size + 1) / 2))


def test_many_reductions_in_a_row_never_mix(comm: Communicator) -> None:
    for number in range(200):
        if number % 50 == comm.rank:
            time.sleep(0.002)
        result = comm.all_reduce(np.full((1, 1 + number % 7), number * 10.0 + comm.rank))
        assert set(result[0]) == {comm.size * number * 10 + comm.size * (comm.size - 1) / 2}


def test_all_ranks_choose_the_same_reduction(comm: Communicator, shared: SharedReduction) -> None:
    comm.choose_reduction(shared, [16, 1024])
    assert len(set(comm.gather(comm.shared_limit))) == 1
    assert comm.shared_limit in ((1024,) if HOSTS else (0, 16, 1024))
    assert (comm.seconds, comm.calls, comm.sent) == (0, 0, Traffic())
    assert comm.all_reduce(np.ones((1, 16))).tolist() == [[comm.size] * 16]
    assert comm.all_reduce(np.ones((1, 2000))).tolist() == [[comm.size] * 2000]


def test_messages_between_hosts_are_few_and_small(comm: Communicator) -> None:
    """One rank a host speaks for it, and what it sends has few bits."""
    if comm.shared is None or comm.shared.hosts < 2:
        pytest.skip("one host, or not through shared memory")
    assert comm.shared.hosts == 1 + virtual_host(HOSTS, comm.size - 1)
    comm.forget_costs()
    values = np.random.default_rng(comm.rank).integers(-(2**24), 2**24, 640) * GRID
    comm.all_reduce(values.reshape(1, -1))
    sent, others = comm.sent, comm.shared.hosts - 1
    assert (sent.messages > 0) == comm.shared.leads
    assert sent.messages <= 2 * others
    assert sent.bytes <= others * 640 * 3.6


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_all_reduce_spreads_nan_and_infinity_from_any_rank(comm: Communicator, poison: float) -> None:
    for culprit in range(comm.size):
        mine = np.ones((2, 3))
        if comm.rank == culprit:
            mine[1, 2] = poison
        result = comm.all_reduce(mine)
        assert np.isfinite(result).sum() == 5
        np.testing.assert_equal(result[1, 2], poison)


def test_all_reduce_of_opposite_infinities_is_nan(comm: Communicator) -> None:
    result = comm.all_reduce(np.array([[np.inf if comm.rank == 0 else -np.inf]]))
    assert np.isnan(result[0, 0]) == (comm.size > 1)


def test_time_in_collectives_includes_waiting_for_other_ranks(comm: Communicator) -> None:
    for _ in range(4):  # a rank that gets no core does not wait
        comm.barrier()
        if comm.is_root:
            time.sleep(0.06)
        comm.all_reduce(np.zeros((1, 1)))
    assert comm.calls == 4 * (comm.size > 1)
    assert comm.is_root or comm.seconds > 0.03


def test_a_long_wait_takes_little_of_a_core(comm: Communicator) -> None:
    """Where ranks share cores, those that wait leave them to those that work."""
    comm.barrier()
    if comm.is_root:
        time.sleep(0.6)
        comm.barrier()
    else:
        before = time.process_time()
        comm.barrier()
        assert time.process_time() - before < 0.3


# -- gather_columns ---------------------------------------------------------------------------------------------


def columns(rows: int, widths: list[int], rank: int) -> np.ndarray:
    """A rank's part of the matrix whose element [r, c] is 1000 r + c."""
    first = sum(widths[:rank])
    return (1000.0 * np.arange(rows)[:, None] + np.arange(first, first + widths[rank])).astype(np.float32)


WIDTHS: dict[str, Callable[[int], list[int]]] = {
    "even": lambda size: [4] * size,
    "uneven": lambda size: [3 + 2 * (rank % 2) for rank in range(size)],
    "last has none": lambda size: [5] * max(1, size - 1) + [0] * (size > 1),
    "only the last": lambda size: [0] * (size - 1) + [7],
    "middle has none": lambda size: [2 * (rank != size // 2) + (size == 1) for rank in range(size)],
}


@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_gather_columns(comm: Communicator, rows: int, kind: str) -> None:
    widths = WIDTHS[kind](comm.size)
    result = comm.gather_columns(columns(rows, widths, comm.rank), widths)
    assert result.dtype == np.float32
    assert result.tolist() == (columns(rows, [sum(widths)], 0).tolist() if comm.is_root else [])


def test_gather_columns_of_a_view(comm: Communicator) -> None:
    widths = [3] * comm.size
    padded = np.full((4, 8), -1, np.float32)
    padded[:, 2:5] = columns(4, widths, comm.rank)
    result = comm.gather_columns(padded[:, 2:5], widths)
    assert result.tolist() == (columns(4, [sum(widths)], 0).tolist() if comm.is_root else [])


def test_gather_columns_spreads_nan(comm: Communicator) -> None:
    part = np.full((2, 1), np.nan if comm.rank == comm.size - 1 else comm.rank, np.float32)
    result = comm.gather_columns(part, [1] * comm.size)
    np.testing.assert_array_equal(result, [[*range(comm.size - 1), np.nan]] * 2 if comm.is_root else result[:0])


# -- plans ----------------------------------------------------------------------------------------------------------


def test_broadcast_plan_gives_each_of_many_plans(comm: Communicator) -> None:
    for number in range(50):
        plan = np.arange(300) * (number + 1) if comm.is_root else np.full(300, -1)
        comm.broadcast_plan(plan)
        assert plan.tolist() == (np.arange(300) * (number + 1)).tolist()


def test_broadcast_plan_arrives_while_the_others_sleep(comm: Communicator) -> None:
    plan = np.zeros(4, np.int64)
    if comm.is_root:
        time.sleep(5 * POLLING_SECONDS)
        plan[:] = 1, 2, 3, 4
    comm.broadcast_plan(plan)
    assert plan.tolist() == [1, 2, 3, 4]


def test_waiting_for_a_plan_leaves_the_core_to_others(comm: Communicator) -> None:
    plan = np.zeros(4, np.int64)
    comm.barrier()
    before = time.process_time()
    if comm.is_root:
        time.sleep(0.3)
    comm.broadcast_plan(plan)
    assert time.process_time() - before < 0.15


# -- objects and errors ---------------------------------------------------------------------------------------------


def test_gather_and_broadcast(comm: Communicator) -> None:
    assert comm.gather({"rank": comm.rank}) == [{"rank": rank} for rank in range(comm.size)]
    assert comm.broadcast(("from", comm.rank)) == ("from", 0)
    assert comm.broadcast(None if comm.is_root else 1) is None


def test_neighbours_are_the_ranks_of_this_host(comm: Communicator) -> None:
    neighbours = comm.neighbours()
    assert (neighbours.rank, neighbours.size, neighbours.yields) == (comm.rank, comm.size, comm.yields)
    neighbours.barrier()


def test_ranks_that_share_cores_time_a_sum_as_often_as_others(comm: Communicator) -> None:
    """As on hosts of which one has more threads than cores."""
    comm.yields = comm.rank % 2 == 0
    assert comm.median_seconds(np.zeros(64)) > 0
    assert comm.broadcast(comm.rank) == 0


def test_alone_reduces_nothing(comm: Communicator) -> None:
    alone = Communicator.alone()
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.all_reduce(np.array([[float(comm.rank)]])).tolist() == [[float(comm.rank)]]


def test_on_root_runs_once_and_tells_all(comm: Communicator) -> None:
    ran: list[int] = []
    assert comm.on_root(lambda: ran.append(comm.rank) or "result") == "result"
    assert comm.gather(ran) == [[0], *[[]] * (comm.size - 1)]


def test_on_root_only_gives_the_others_nothing(comm: Communicator) -> None:
    assert comm.on_root_only(lambda: "result") == ("result" if comm.is_root else None)


@pytest.mark.parametrize("method", ["on_root", "on_root_only"])
def test_mistake_on_root_is_raised_everywhere(comm: Communicator, method: str) -> None:
    def fail() -> None:
        raise UserError("the file is missing.")

    with pytest.raises(UserError) as caught:
        getattr(comm, method)(fail)
    assert comm.gather(str(caught.value)) == ["the file is missing."] * comm.size
    assert comm.on_root(lambda: 5) == 5  # no message was left over


def message_of(comm: Communicator, failing: set[int]) -> str:
    """What together() raises if these ranks fail; the same everywhere."""

    def act() -> int:
        if comm.rank in failing:
            raise UserError(f"rank {comm.rank} has no file.")
        return comm.rank

    with pytest.raises(UserError) as caught:
        comm.together(act)
    messages = set(comm.gather(str(caught.value)))
    assert len(messages) == 1
    return messages.pop()


def test_together_without_mistakes(comm: Communicator) -> None:
    assert comm.together(lambda: comm.rank * 10) == comm.rank * 10


def test_together_names_the_rank_that_fails(comm: Communicator) -> None:
    for rank in range(comm.size):
        message = message_of(comm, {rank})
        if comm.size == 1:
            assert message == "rank 0 has no file."
        else:
            assert message.startswith(f"rank {rank} of {comm.size}")
            assert message.endswith(f": rank {rank} has no file.")


def test_together_tells_how_many_fail(comm: Communicator) -> None:
    if comm.size < 3:
        pytest.skip("some but not all of at least two ranks")
    message = message_of(comm, {1, comm.size - 1})
    assert message.startswith(f"rank 1 of {comm.size}")
    assert "and 1 more" in message


def test_together_names_no_rank_if_all_fail(comm: Communicator) -> None:
    assert message_of(comm, set(range(comm.size))) == "rank 0 has no file."


# -- news and large broadcasts ----------------------------------------------------------------------------------------


def test_rounds_are_the_same_everywhere_and_nobody_waits() -> None:
    comm = Communicator(MPI.COMM_WORLD)
    rounds, seen, told = Rounds(comm), [], 0
    while not seen or seen[-1].min() < 20:
        told += 1 + comm.rank
        if (heard := rounds.exchange(np.array([told]))) is not None:
            assert heard.shape == (comm.size, 1)
            assert heard[comm.rank, 0] <= told
            seen.append(heard)
        time.sleep(0.001 * comm.rank)
    assert len(seen) > 1
    every = comm.gather([heard.tolist() for heard in seen])
    assert all(other == every[0] for other in every)
    assert rounds.under_way is None


@pytest.mark.parametrize("message", [7, 64, MESSAGE_BYTES])
def test_arrays_of_rank_0_reach_all_in_messages_of_bounded_size(message: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communicator, "MESSAGE_BYTES", message)
    comm, random = Communicator(MPI.COMM_WORLD), np.random.default_rng(3)
    wanted = [random.standard_normal(shape).astype(np.float32) for shape in [(5,), (0,), (3, 4), (1,), (40,)]]
    arrays = [a.copy() if comm.is_root else np.zeros_like(a) for a in wanted]
    comm.broadcast_arrays(arrays)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, wanted, strict=True))
