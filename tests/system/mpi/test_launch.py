"""Where the tests' own launcher puts ranks."""

import os

import pytest

from tests.system.mpi.launch import WORKER, WORKERS, cores_of_worker, is_open_mpi, run

TOLD = ("-c", r"import os; os.write(1, f'{sorted(os.sched_getaffinity(0))}\n'.encode())")


@pytest.fixture
def last_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a worker of more than there are cores."""
    count = 2 * len(os.sched_getaffinity(0))
    monkeypatch.setenv(WORKER, f"gw{count - 1}")
    monkeypatch.setenv(WORKERS, str(count))


@pytest.mark.skipif(is_open_mpi(), reason="binds ranks by itself")
def test_several_ranks_have_the_core_of_their_worker(last_of_many: None) -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert run(2, *TOLD).stdout.splitlines() == [str(cores[-1:])] * 2
    assert sorted(os.sched_getaffinity(0)) == cores


def test_a_process_alone_has_all_cores_and_so_have_ranks_for_which_they_are_wanted(last_of_many: None) -> None:
    cores = str(sorted(os.sched_getaffinity(0)))
    assert run(None, *TOLD).stdout.splitlines() == [cores]
    assert is_open_mpi() or run(2, *TOLD, all_cores=True).stdout.splitlines() == [cores] * 2


@pytest.mark.parametrize(
    ("cores", "workers", "shares"),
    [
        ({3}, 2, [{3}, {3}]),
        ({2, 5}, 3, [{2}, {5}, {2}]),
        ({0, 1, 2, 3}, 2, [{0, 2}, {1, 3}]),
        ({0, 1, 2}, 1, [{0, 1, 2}]),
    ],
)
def test_workers_share_all_cores(
    cores: set[int], workers: int, shares: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: cores)
    monkeypatch.setenv(WORKERS, str(workers))
    for number, share in enumerate(shares):
        monkeypatch.setenv(WORKER, f"gw{number}")
        assert cores_of_worker() == share


def test_a_run_of_one_test_after_the_other_has_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKER, raising=False)
    monkeypatch.delenv(WORKERS, raising=False)
    assert cores_of_worker() == os.sched_getaffinity(0)
