"""Each rank reads its own bytes of the model file, and no more."""

import json
from pathlib import Path

import pytest

from tests.system.mpi.launch import SCRIPTS, TIMEOUT, run

pytestmark = pytest.mark.timeout(TIMEOUT + 60)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_rank_reads_its_slices_and_no_more(ranks: int, demo: Path) -> None:
    """What all hold whole is read by rank 0, and given to the others."""
    result = run(ranks, SCRIPTS / "load.py", demo)
    assert result.status == 0, result.stderr
    facts = json.loads(result.stdout)
    assert len(facts) == ranks
    for number, rank in enumerate(facts):
        own = rank["slices"] - (rank["replicated"] if number else 0)
        assert rank["replicated"] > 0
        assert rank["hdf5"] == (number == 0)
        assert rank["digest"] == facts[0]["digest"]
        assert rank["reader"] == own
        assert own <= rank["system"] <= 1.05 * own
    assert max(rank["slices"] for rank in facts) < 1.3 * demo.stat().st_size / ranks
