"""Ranks that do not belong together: another mpillama on one of them, or processes that MPI does not connect."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mpillama import __version__
from mpillama.errors import UserError
from mpillama.job.same_program import (
    FOLDER,
    Program,
    contents_of,
    looks_of,
    refuse_differences,
    this_program,
    told_by_the_first,
)
from tests.system.faults.running import SHORT, name, sabotage, the_mistake
from tests.system.mpi.launch import PROGRAM, TIMEOUT, run

pytestmark = pytest.mark.timeout(TIMEOUT + 60)

SAYS = {"version": "runs mpillama 0.0.1", "sources": f"runs other sources of mpillama {__version__}"}


@pytest.mark.parametrize("fault", SAYS)
@pytest.mark.parametrize(
    ("ranks", "victim"), [(3, 1), (3, 2), *(pytest.param(n, n - 1, marks=pytest.mark.slow) for n in (2, 4))]
)
def test_another_mpillama_on_one_rank(fault: str, ranks: int, victim: int, toy: Path, tmp_path: Path) -> None:
    sentence = the_mistake(sabotage(fault, ranks, victim, "any", toy, tmp_path, *SHORT))
    assert sentence.startswith(f"mpillama: {name(victim, ranks)} {SAYS[fault]} ({tmp_path / 'mpillama'})")
    assert "install the same" in sentence


@pytest.mark.parametrize("fault", SAYS)
def test_another_mpillama_on_rank_0(fault: str, toy: Path, tmp_path: Path) -> None:
    sentence = the_mistake(sabotage(fault, 3, 0, "any", toy, tmp_path, *SHORT))
    assert f"{name(1, 3)} (and 1 more) runs" in sentence


def test_a_program_survives_its_journey() -> None:
    mine = this_program(contents_of)
    assert mine.version == __version__
    assert Program.of_record(mine.record()) == mine
    long = Program("1" * 40, "2" * 64, "3" * 300, "4" * 1000)
    assert len(long.record()) == len(mine.record()) == 512
    assert Program.of_record(np.zeros(512, np.uint8)) == Program("", "", "", "")


def test_a_copy_looks_different_but_has_the_same_contents(tmp_path: Path) -> None:
    copy = shutil.copytree(FOLDER, tmp_path / "mpillama", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    assert looks_of(copy) != looks_of(FOLDER) == looks_of(FOLDER)
    assert contents_of(copy) == contents_of(FOLDER)
    source = copy / "errors.py"
    source.write_text(source.read_text().replace("e", "f", 1))
    assert contents_of(copy) != contents_of(FOLDER)


def test_one_rank_of_a_host_speaks_for_those_of_its_folder() -> None:
    looked = [
        Program("1", sources, *place) for sources, *place in (("abc", "x", "/a"), ("", "x", "/a"), ("", "x", "/b"))
    ]
    assert [p.sources for p in told_by_the_first(looked)] == ["abc", "abc", ""]


def test_the_first_rank_that_differs_is_named() -> None:
    one, other = Program("1.0", "abc", "x", "/a"), Program("1.0", "abd", "y", "/b")
    refuse_differences([one, Program("1.0", "abc", "z", "/elsewhere")])
    with pytest.raises(UserError, match=r"rank 1 of 4 on y \(and 1 more\) runs other sources of mpillama 1.0"):
        refuse_differences([one, other, one, other])


# -- processes that MPI does not connect ------------------------------------------------------------------------------

UNCONNECTED = {
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK", "mpirun"),
    "SLURM_STEP_NUM_TASKS": ("SLURM_PROCID", "srun --mpi=pmi2"),
}


@pytest.mark.parametrize("variable", UNCONNECTED)
def test_singletons_under_a_launcher_are_refused(variable: str, toy: Path) -> None:
    rank_variable, remedy = UNCONNECTED[variable]
    sentence = the_mistake(run(None, *PROGRAM, "--model", toy, env={variable: "4", rank_variable: "0"}))
    assert sentence.startswith("mpillama: 4 processes were started")
    assert remedy in sentence
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
    assert run(1, *PROGRAM, "--model", toy, *SHORT, env=environment).status == 0
