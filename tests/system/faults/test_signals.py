"""Killed, stopped and asked to end: one rank or the launcher, in every phase."""

import signal
from pathlib import Path

import pytest

from tests.system.faults.running import PHASES, ends, everywhere, in_the_midst, name, statuses, the_sentence
from tests.system.mpi.launch import TIMEOUT, is_open_mpi

pytestmark = pytest.mark.timeout(TIMEOUT + 60)

SPOTS = pytest.mark.parametrize(
    ("ranks", "victim", "phase"),
    [
        (3, 2, "load"),
        (3, 0, "decode"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((3, 0, "load"), (2, 1, "prefill"), (4, 3, "decode"))
        ),
    ],
)


@everywhere([(3, rank, phase) for rank in range(3) for phase in PHASES])
def test_killed_rank(ranks: int, victim: int, phase: str, toy: Path, tmp_path: Path) -> None:
    with in_the_midst(ranks, phase, toy, tmp_path) as launch:
        found = launch.ranks()
        assert sorted(found) == list(range(ranks))
        found[victim].kill()
        assert "Traceback" not in ends(launch)
        said = launch.stderr() + launch.rest_of_output()
        assert "9 (Killed)" in said or "signal 9" in said, said  # the launcher's word: who is killed says nothing
        if not is_open_mpi():  # that ends the other ranks by SIGTERM, and a busy machine kills them too late
            assert "SIGTERM" not in said
    assert not statuses(tmp_path)


@SPOTS
def test_stopped_then_killed_rank(ranks: int, victim: int, phase: str, toy: Path, tmp_path: Path) -> None:
    with in_the_midst(ranks, phase, toy, tmp_path) as launch:
        process = launch.ranks()[victim]
        process.suspend()
        assert not launch.gone_within(0.5)
        process.kill()
        assert "Traceback" not in ends(launch)


@pytest.mark.parametrize(
    ("number", "ranks", "victim", "phase"),
    [
        (signal.SIGTERM, 3, 2, "load"),
        (signal.SIGTERM, 3, 0, "decode"),
        (signal.SIGINT, 3, 0, "load"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((signal.SIGTERM, 2, 1, "prefill"), (signal.SIGINT, 4, 3, "decode"))
        ),
    ],
)
def test_one_rank_asked_to_end(
    number: signal.Signals, ranks: int, victim: int, phase: str, toy: Path, tmp_path: Path
) -> None:
    with in_the_midst(ranks, phase, toy, tmp_path) as launch:
        launch.ranks()[victim].send_signal(number)
        sentence = the_sentence(ends(launch))
        assert sentence == f"mpillama: {name(victim, ranks)}: ended by {number.name}; all ranks end."
    assert not statuses(tmp_path)


@pytest.mark.parametrize("phase", ["load", "decode"])
def test_all_ranks_asked_to_end_say_it_once(phase: str, toy: Path, tmp_path: Path) -> None:
    """What Slurm does at a job's time limit."""
    with in_the_midst(3, phase, toy, tmp_path) as launch:
        for process in launch.ranks().values():
            process.terminate()
        assert the_sentence(ends(launch)) == f"mpillama: {name(0, 3)}: ended by SIGTERM; all ranks end."


@pytest.mark.parametrize("phase", ["load", "decode"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_launcher_asked_to_end(number: signal.Signals, phase: str, toy: Path, tmp_path: Path) -> None:
    with in_the_midst(3, phase, toy, tmp_path) as launch:
        launch.process.send_signal(number)
        errors = ends(launch)
        assert "Traceback" not in errors
        assert errors.count("mpillama: ") <= 1  # some launchers kill before a rank can speak, and speak themselves


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_without_launcher(number: signal.Signals, toy: Path, tmp_path: Path) -> None:
    with in_the_midst(None, "decode", toy, tmp_path) as launch:
        launch.process.send_signal(number)
        assert number.name in the_sentence(ends(launch))
        assert launch.process.returncode == 128 + number


def test_a_signal_while_the_prompt_is_awaited(toy: Path, tmp_path: Path) -> None:
    """Standard input gives nothing and does not end."""
    with in_the_midst(2, "load", toy, tmp_path, arguments=("--prompt", "-", "--timeout", "1")) as launch:
        assert not launch.gone_within(8)
        launch.ranks()[0].terminate()
        the_sentence(ends(launch))
