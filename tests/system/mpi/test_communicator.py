"""The collectives, with the same test bodies on 1 to 5 ranks."""

from pathlib import Path

import pytest

from tests.system.mpi.launch import ROOT, run

pytestmark = pytest.mark.timeout(150)

PYTEST = ("-m", "mpi4py", "-m", "pytest", "-x", "-q", "--noconftest", "-p", "no:cacheprovider", "--timeout=60")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_collectives(ranks: int) -> None:
    result = run(ranks, *PYTEST, Path(__file__).with_name("collectives.py"), directory=ROOT, timeout=120)
    assert result.status == 0, result.stdout + result.stderr
    assert result.stdout.count(" passed") == ranks, result.stdout


def test_a_body_that_fails_on_one_rank_fails_the_run(tmp_path: Path) -> None:
    body = tmp_path / "bodies.py"
    body.write_text("from mpi4py import MPI\n\n\ndef test_rank():\n    assert MPI.COMM_WORLD.rank != 1\n")
    assert run(2, *PYTEST, body, directory=ROOT, timeout=60).status != 0
