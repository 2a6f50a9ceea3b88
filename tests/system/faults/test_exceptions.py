"""An exception on one rank is a bug of mpillama: it keeps its traceback, and all ranks end."""

from pathlib import Path

import pytest

from tests.system.faults.running import QUICK, everywhere, name, sabotage, statuses
from tests.system.mpi.launch import TIMEOUT

pytestmark = pytest.mark.timeout(TIMEOUT + 60)


@everywhere(QUICK)
def test_exception(ranks: int, victim: int, phase: str, toy: Path, tmp_path: Path) -> None:
    _check_exception("exception", ranks, victim, phase, toy, tmp_path)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_exception_in_a_thread(victim: int, toy: Path, tmp_path: Path) -> None:
    _check_exception("thread", 3, victim, "decode", toy, tmp_path)


def _check_exception(fault: str, ranks: int, victim: int, phase: str, toy: Path, directory: Path) -> None:
    result = sabotage(fault, ranks, victim, phase, toy, directory)
    assert result.status != 0
    message = f"mpillama: {name(victim, ranks)}: RuntimeError: sabotage; all ranks end."
    assert result.stderr.count(message) == 1, result.stderr
    assert result.stderr.count("mpillama: ") == 1, result.stderr
    assert 1 <= result.stderr.count("Traceback") <= 2, result.stderr  # two if it came out of a thread pool
    assert (directory / "failed").exists()
    assert not statuses(directory)


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_exception_on_all_ranks_is_told_once(ranks: int, toy: Path, tmp_path: Path) -> None:
    result = sabotage("exception", ranks, "all", "decode", toy, tmp_path)
    assert result.status != 0
    assert result.stderr.count("mpillama: ") == 1, result.stderr
    assert result.stderr.count("Traceback") == 1, result.stderr
    assert name(0, ranks) in result.stderr


@pytest.mark.parametrize("victim", [0, 1])
def test_exit_in_the_middle_of_a_step_leaves_nobody_waiting(victim: int, toy: Path, tmp_path: Path) -> None:
    result = sabotage("leave", 2, victim, "decode", toy, tmp_path)
    assert result.status != 0
    assert (tmp_path / "failed").exists()
