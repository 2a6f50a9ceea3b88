"""Nobody listens, or nobody speaks."""

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.system.faults.running import LONG, in_the_midst
from tests.system.mpi.launch import END_SECONDS, PROGRAM, ROOT, TIMEOUT, environment, python, started

pytestmark = pytest.mark.timeout(TIMEOUT + 60)


@pytest.mark.parametrize("ranks", [None, pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_closed_output_ends_the_run(ranks: int | None, toy: Path, tmp_path: Path) -> None:
    with in_the_midst(ranks, "decode", toy, tmp_path) as launch:
        launch.close_output()
        assert launch.gone_within(END_SECONDS), f"still there: {launch.processes()}"
        assert "Traceback" not in launch.stderr()
        assert "Exception ignored" not in launch.stderr()


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_pipe_into_head(ranks: int | None, toy: Path) -> None:
    """`head -1` leaves after the first line, in the middle of a text that would take minutes."""
    command = shlex.join(python(ranks, *PROGRAM, "--model", toy, *LONG[4:], "--prompt", "Once\nupon"))
    done = subprocess.run(
        ["bash", "-c", f"{command.replace(' --quiet', '')} | head -1; echo ${{PIPESTATUS[0]}}"],
        env=environment(), cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    line, status = done.stdout.splitlines()
    assert line == "Once"
    assert status != "0"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("ranks", [None, 2])
def test_input_that_ends_does_not_end_the_run(ranks: int | None, toy: Path) -> None:
    with started(ranks, *PROGRAM, "--model", toy, "--max-tokens", "5", "--json") as launch:
        launch.end_input()
        assert launch.gone_within(TIMEOUT)
        assert launch.process.returncode == 0, launch.stderr()
