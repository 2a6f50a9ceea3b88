"""Where threads run: what launchers and users write into OpenMP's variables."""

import pytest

from mpillama.kernels.library import ANYWHERE, thread_places


@pytest.fixture(autouse=True)
def _eight_processors(monkeypatch):
    allow(monkeypatch, range(8))


def allow(monkeypatch, cpus) -> None:
    """What the launcher's or Slurm's mask leaves to this rank."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(cpus))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "environment",
    [{}, {"OMP_PLACES": ""}, {"OMP_PROC_BIND": "false"}, {"OMP_PLACES": "cores", "OMP_PROC_BIND": "FALSE"}],
)
def test_the_system_chooses_where_nobody_says(environment, threads):
    assert thread_places(threads, environment) == [ANYWHERE] * threads


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_PLACES": "threads"},
        {"OMP_PLACES": "cores"},
        {"OMP_PLACES": "THREADS(3)"},
        {"OMP_PROC_BIND": "true"},
        {"OMP_PROC_BIND": "close"},
        {"OMP_PROC_BIND": "spread,close"},
    ],
)
def test_a_ranks_own_processors_are_taken_one_by_one(environment, monkeypatch):
    """Never those of another rank: the mask says which there are."""
    allow(monkeypatch, {4, 6, 7})
    assert thread_places(3, environment) == [ANYWHERE, 6, 7]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ("{0},{2},{4}", [2, 4]),
        ("{0}:3", [1, 2]),
        ("{0}:3:2", [2, 4]),
        ("{1}:2, {6}", [2, 6]),
        ("{0:2}:3:2", [2, 4]),
        ("{0,1},{2,3},{4,5}", [2, 4]),
        ("{0:4:2},{1},{3}", [1, 3]),
    ],
)
def test_explicit_places(places, expected):
    """A thread has the first processor of its place; thread 0 is the program's own, and is left alone."""
    assert thread_places(3, {"OMP_PLACES": places}) == [ANYWHERE, *expected]


def test_places_of_other_ranks_do_not_count(monkeypatch):
    """A job script gives all ranks one variable; each has its mask."""
    allow(monkeypatch, {4, 5})
    assert thread_places(2, {"OMP_PLACES": "{0},{1},{4},{5}"}) == [ANYWHERE, 5]
    assert thread_places(2, {"OMP_PLACES": "{0},{1}"}) == [ANYWHERE, 5]


@pytest.mark.parametrize("places", ["{0},{1}", "{0}:2", "cores"])
def test_more_threads_than_places_are_not_bound(places, monkeypatch):
    allow(monkeypatch, {0, 1})
    assert thread_places(3, {"OMP_PLACES": places, "OMP_PROC_BIND": "close"}) == [ANYWHERE] * 3
