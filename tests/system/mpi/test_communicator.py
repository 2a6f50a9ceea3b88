"""The collectives, with the same test bodies on 1 to 5 ranks."""

import json
from pathlib import Path

import pytest

from tests.system.mpi.launch import ROOT, TIMEOUT, run

pytestmark = pytest.mark.timeout(3 * TIMEOUT)

PYTEST = ("-m", "mpi4py", "-m", "pytest", "-x", "-q", "--noconftest", "-p", "no:cacheprovider", "--timeout=120")


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_collectives(ranks: int) -> None:
    bodies = Path(__file__).with_name("collectives.py")
    result = run(ranks, *PYTEST, bodies, directory=ROOT, timeout=2 * TIMEOUT, all_cores=True)
    assert result.status == 0, result.stdout + result.stderr
    assert result.stdout.count(" passed") == ranks, result.stdout


@pytest.mark.parametrize(
    ("ranks", "hosts"),
    [(4, "2,1,1"), pytest.param(4, "2", marks=pytest.mark.slow), pytest.param(3, "1", marks=pytest.mark.slow)],
)
def test_sums_between_hosts(ranks: int, hosts: str) -> None:
    """The ranks of this machine as if they were on several hosts, with all ways of exchanging sums."""
    only = ("-k", "shared and (reduce or reduction or messages) and not many")
    env = {"MPILLAMA_RANKS_PER_HOST": hosts}
    bodies = Path(__file__).with_name("collectives.py")
    result = run(ranks, *PYTEST, *only, bodies, directory=ROOT, timeout=2 * TIMEOUT, env=env)
    assert result.status == 0, result.stdout + result.stderr
    assert result.stdout.count(" passed") == ranks, result.stdout


def test_sums_between_hosts_that_are_no_power_of_two() -> None:
    """Of five, six, seven and nine hosts: the ways of exchanging sums then have a rest of hosts, or a grid of them."""
    env, bodies = {"MPILLAMA_RANKS_PER_HOST": "1"}, Path(__file__).with_name("host_sums.py")
    result = run(9, *PYTEST, bodies, directory=ROOT, timeout=2 * TIMEOUT, env=env)
    assert result.status == 0, result.stdout + result.stderr
    assert result.stdout.count(" passed") == 9, result.stdout


def test_a_body_that_fails_on_one_rank_fails_the_run(tmp_path: Path) -> None:
    body = tmp_path / "bodies.py"
    body.write_text("from mpi4py import MPI\n\n\ndef test_rank():\n    assert MPI.COMM_WORLD.rank != 1\n")
    assert run(2, *PYTEST, body, directory=ROOT).status != 0


def test_answers_from_candidates_are_those_from_whole_rows(demo: Path) -> None:
    """Ranks tell rank 0 the likeliest tokens; whatever is in doubt is looked up, while others' rows are under way."""
    found = {}
    for ranks, error in ((1, 2e-5), (3, 2e-5), (2, 0.9)):
        result = run(ranks, "-m", "tests.system.mpi.scripts.candidates", demo, error)
        assert result.status == 0, result.stderr
        found[ranks] = json.loads(result.stdout)
    assert found[1]["tokens"] == found[2]["tokens"] == found[3]["tokens"]
    assert found[1]["whole_rows"] == 0
    assert found[2]["whole_rows"] > found[3]["whole_rows"]
