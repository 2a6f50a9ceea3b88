"""What the scripts in jobs/ and the script of `plan` have in common, and how they read."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpillama.cli.options import parse
from mpillama.cli.plan import ENVIRONMENT, job_script
from tests.system.mpi.launch import ROOT

SCRIPTS = sorted([*(ROOT / "jobs").glob("*.sbatch"), *(ROOT / "jobs").glob("*.sh")])
PLANS = [
    ("--model", "a b's.h5", "--nodes", "4", "--max-seq-len", "4096", "--kv-type", "q8"),
    ("--model", "folder", "--weights", "q4_0"),
    ("--shape", "llama-3.1-405b", "--ranks-per-node", "2"),
]


def planned(words: tuple[str, ...]) -> str:
    return job_script(parse(["plan", *words])[1])


def shellcheck(*files: Path) -> str:
    """What shellcheck has to say."""
    found = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    assert found, "no shellcheck: install the package with [test]"
    return subprocess.run([found, *files], capture_output=True, text=True, timeout=60).stdout


def test_all_scripts_are_there():
    names = [path.name for path in SCRIPTS]
    assert names == ["batch.sbatch", "chat.sh", "convert.sbatch", "generate.sbatch", "serve.sbatch"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_has_the_same_environment(script):
    text = script.read_text()
    assert ENVIRONMENT in text
    assert "dirname" not in text, "sbatch runs a copy of the script elsewhere"


def test_shellcheck_finds_nothing(tmp_path):
    for number, words in enumerate(PLANS):
        (tmp_path / f"{number}.sbatch").write_text(planned(words))
    assert shellcheck(*SCRIPTS, *tmp_path.iterdir()) == ""


def test_shellcheck_finds_what_is_wrong(tmp_path):
    (tmp_path / "wrong.sh").write_text("#!/bin/bash\nrm $1\n")
    assert "SC2086" in shellcheck(tmp_path / "wrong.sh")


def test_a_planned_script_has_what_was_planned():
    text = planned(PLANS[0])
    assert "#SBATCH --nodes=4\n" in text
    assert "--kv-type q8 --max-seq-len 4096" in text
    assert "--weights q4_0" in planned(PLANS[1])
    assert "#SBATCH --ntasks-per-node=2\n" in planned(PLANS[2])
    assert "llama-3.1-405b" in planned(PLANS[2])
    assert "speculate" not in text
    assert "draft" not in text


def test_a_planned_script_drafts_as_planned():
    drafts = ("--draft-model", "a b.gguf", "--draft-ranks", "first", "--speculate", "3")
    assert "--speculate 3 --draft-model 'a b.gguf' --draft-ranks first" in planned(("--model", "m.h5", *drafts))
    assert "--speculate 2 $" in planned(("--model", "m.h5", "--speculate", "2"))
