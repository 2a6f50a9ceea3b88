"""A run that cannot fit is refused before anything is allocated; a context that does not fit is lowered."""

import json
from pathlib import Path

import pytest

from tests.system.mpi.launch import PROGRAM, TIMEOUT, run

pytestmark = pytest.mark.timeout(TIMEOUT + 60)
GREEDY = ("--temperature", "0", "--max-tokens", "2", "--json")


@pytest.mark.parametrize("ranks", [None, 3])
def test_too_little_memory_is_refused_with_the_remedy(ranks: int | None, toy: Path) -> None:
    """Slurm's grant stands in for a small node."""
    result = run(ranks, *PROGRAM, "--model", toy, *GREEDY, env={"SLURM_MEM_PER_NODE": "10"})
    assert (result.status, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "--force" in result.stderr
    assert "GB" in result.stderr
    forced = run(ranks, *PROGRAM, "--model", toy, *GREEDY, "--force", env={"SLURM_MEM_PER_NODE": "10"})
    assert forced.status == 0, forced.stderr


def test_the_context_is_lowered_to_what_fits(toy: Path) -> None:
    grant = {"SLURM_MEM_PER_NODE": "67"}  # 64 MiB are a reserve
    found = run(None, *PROGRAM, "--model", toy, *GREEDY, env=grant)
    assert found.status == 0, found.stderr
    context = json.loads(found.stdout)["options"]["max_seq_len"]
    assert 64 <= context < 8192
    assert context % 64 == 0
    told = run(None, *PROGRAM, "--model", toy, "--max-tokens", "2", env=grant)
    assert f"{context} of the model's 8192 tokens" in told.stderr
    wanted = run(None, *PROGRAM, "--model", toy, *GREEDY, "--max-seq-len", "8192", env=grant)
    assert wanted.status == 2
    assert f"--max-seq-len {context} fits" in wanted.stderr
