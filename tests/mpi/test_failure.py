"""Never hang, never half-fail: whatever happens on one rank, all end within seconds and the user is told once."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mpi.launch import END_SECONDS, PROGRAM, SCRIPTS, TIMEOUT, Launch, Result, run, started

pytestmark = pytest.mark.timeout(TIMEOUT + 60)

LONG = ("--max-tokens", "4000", "--temperature", "0", "--logit-bias", "1=-1000", "--quiet")
"""Minutes of generation with slow steps; token 1 is EOS."""
RANKS = [(ranks, rank) for ranks in (2, 3) for rank in range(ranks)]


@contextmanager
def in_mid_generation(ranks: int | None, toy: Path, directory: Path) -> Iterator[Launch]:
    """A slow run that has begun to print its text."""
    with started(ranks, SCRIPTS / "sabotage.py", "slow", "all", directory, "--model", toy, *LONG) as launch:
        assert len(launch.read(10)) == 10, launch.stderr()
        yield launch


def sabotage(ranks: int, kind: str, rank: int, directory: Path, model: Path, timeout: float = TIMEOUT) -> Result:
    """Run the program with something wrong on one rank; it must end by itself, and soon after that."""
    arguments = (kind, str(rank), directory, "--model", model, *LONG)
    result = run(ranks, SCRIPTS / "sabotage.py", *arguments, timeout=timeout)
    failed = directory / "failed"
    assert not failed.exists() or time.time() - float(failed.read_text()) < END_SECONDS
    return result


def statuses(directory: Path) -> dict[int, int]:
    """The exit status of each rank that ended by itself."""
    return {int(f.name.removeprefix("status-")): int(f.read_text()) for f in directory.glob("status-*")}


# -- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "victim"), RANKS)
def test_killed_rank_takes_all_others_along(ranks: int, victim: int, toy: Path, tmp_path: Path) -> None:
    with in_mid_generation(ranks, toy, tmp_path) as launch:
        found = launch.ranks()
        assert sorted(found) == list(range(ranks))
        found[victim].kill()
        assert launch.gone_within(END_SECONDS), f"still there: {launch.processes()}"
        assert launch.process.returncode != 0
    assert not statuses(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_launcher_ends_all(number: signal.Signals, toy: Path, tmp_path: Path) -> None:
    with in_mid_generation(3, toy, tmp_path) as launch:
        launch.process.send_signal(number)
        assert launch.gone_within(END_SECONDS), f"still there: {launch.processes()}"
        assert launch.process.returncode != 0
        assert "Traceback" not in launch.stderr()


def test_interrupt_without_launcher_is_quiet(toy: Path, tmp_path: Path) -> None:
    with in_mid_generation(None, toy, tmp_path) as launch:
        launch.process.send_signal(signal.SIGINT)
        assert launch.gone_within(END_SECONDS)
        assert launch.process.returncode in (128 + signal.SIGINT, -signal.SIGINT)
        assert "Traceback" not in launch.stderr()


# -- exceptions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "culprit"), RANKS)
@pytest.mark.parametrize("kind", ["exception", "thread"])
def test_exception_in_the_middle_of_a_step(kind: str, ranks: int, culprit: int, toy: Path, tmp_path: Path) -> None:
    result = sabotage(ranks, kind, culprit, tmp_path, toy)
    assert result.status != 0
    message = f"mpillama: rank {culprit} of {ranks} on {os.uname().nodename}: RuntimeError: sabotage"
    assert result.stderr.count(message) == 1, result.stderr
    assert result.stderr.count("mpillama: rank") == 1, result.stderr
    assert not statuses(tmp_path)


@pytest.mark.parametrize("culprit", [0, 1])
def test_exit_in_the_middle_of_a_step_leaves_nobody_waiting(culprit: int, toy: Path, tmp_path: Path) -> None:
    result = sabotage(2, "leave", culprit, tmp_path, toy, timeout=30)
    assert result.status != 0


@pytest.mark.parametrize("culprit", [0, 1])
def test_interrupt_of_one_rank_ends_all_quietly(culprit: int, toy: Path, tmp_path: Path) -> None:
    result = sabotage(2, "interrupt", culprit, tmp_path, toy)
    assert result.status != 0
    assert "Traceback" not in result.stderr


# -- what one rank alone cannot read ----------------------------------------------------------------------------------

SAYS = {
    "missing": "no such file",
    "forbidden": "permission denied",
    "shorter": "bytes",
    "input_error": "cannot be read",
}


@pytest.mark.parametrize(
    ("ranks", "culprit", "kind"),
    [
        *((2, 1, kind) for kind in SAYS),
        (2, 0, "input_error"),
        (3, 0, "missing"),
        (3, 1, "shorter"),
        (3, 2, "forbidden"),
    ],
)
def test_model_file_that_one_rank_cannot_read(ranks: int, culprit: int, kind: str, toy: Path, tmp_path: Path) -> None:
    result = sabotage(ranks, kind, culprit, tmp_path, toy)
    assert result.status == 2
    assert statuses(tmp_path) == dict.fromkeys(range(ranks), 2)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"mpillama: rank {culprit} of {ranks}")
    assert str(toy) in lines[0]
    assert SAYS[kind] in lines[0].lower()
    assert result.stdout == ""


# -- processes that MPI does not connect ------------------------------------------------------------------------------

UNCONNECTED = {
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK", "mpirun"),
    "SLURM_STEP_NUM_TASKS": ("SLURM_PROCID", "srun --mpi=pmi2"),
}


@pytest.mark.parametrize("variable", UNCONNECTED)
def test_singletons_under_a_launcher_are_refused(variable: str, toy: Path) -> None:
    rank_variable, remedy = UNCONNECTED[variable]
    first = run(None, *PROGRAM, "--model", toy, env={variable: "4", rank_variable: "0"})
    assert first.status == 2
    assert first.stdout == ""
    (line,) = first.stderr.splitlines()
    assert line.startswith("mpillama: 4 processes were started")
    assert remedy in line
    other = run(None, *PROGRAM, "--model", toy, env={variable: "4", rank_variable: "1"})
    assert (other.status, other.stdout, other.stderr) == (2, "", "")


@pytest.mark.parametrize("variable", UNCONNECTED)
def test_doctor_explains_singletons(variable: str) -> None:
    rank_variable, _ = UNCONNECTED[variable]
    result = run(None, *PROGRAM, "doctor", "--json", env={variable: "4", rank_variable: "0"})
    assert result.status == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["launched"] == {"variable": variable, "processes": 4}
    assert report["ranks"] == 1
    assert any("4 processes were launched" in sentence for sentence in report["advice"])


def test_mpirun_of_one_rank_inside_a_larger_slurm_step_runs(toy: Path) -> None:
    environment = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}
    options = ("--model", toy, "--max-tokens", "2", "--quiet")
    assert run(1, *PROGRAM, *options, env=environment).status == 0


# -- nobody listens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [None, 1, 2, 3])
def test_closed_output_ends_the_run(ranks: int | None, toy: Path, tmp_path: Path) -> None:
    with in_mid_generation(ranks, toy, tmp_path) as launch:
        launch.close_output()
        assert launch.gone_within(END_SECONDS), f"still there: {launch.processes()}"
        assert "Traceback" not in launch.stderr()
        assert "Exception ignored" not in launch.stderr()


@pytest.mark.parametrize("ranks", [None, 2])
def test_input_that_ends_does_not_end_the_run(ranks: int | None, toy: Path) -> None:
    with started(ranks, *PROGRAM, "--model", toy, "--max-tokens", "5", "--json") as launch:
        launch.end_input()
        assert launch.gone_within(TIMEOUT)
        assert launch.process.returncode == 0, launch.stderr()


# -- each rank reads its own bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_rank_reads_its_slices_and_no_more(ranks: int, demo: Path) -> None:
    result = run(ranks, SCRIPTS / "load.py", demo)
    assert result.status == 0, result.stderr
    facts = json.loads(result.stdout)
    assert len(facts) == ranks
    for rank in facts:
        assert rank["reader"] == rank["slices"]
        assert rank["slices"] <= rank["system"] <= 1.05 * rank["slices"]
    assert max(rank["slices"] for rank in facts) < 1.3 * demo.stat().st_size / ranks
