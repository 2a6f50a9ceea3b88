"""Too little memory on one rank: a real limit of its address space, before anything is allocated and after."""

from pathlib import Path

import pytest

from tests.system.faults.running import HOST, SHORT, name, sabotage, statuses, the_mistake, the_sentence
from tests.system.mpi.launch import TIMEOUT

pytestmark = pytest.mark.timeout(TIMEOUT + 60)
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 0), (2, 1), (3, 1), (4, 3))]
EACH_RANK = pytest.mark.parametrize(("ranks", "victim"), [(3, 0), (3, 2), *SLOW])


@EACH_RANK
def test_a_limit_that_is_known_before(ranks: int, victim: int, toy: Path, tmp_path: Path) -> None:
    sentence = the_mistake(sabotage("no_room", ranks, victim, "any", toy, tmp_path, *SHORT, "--max-seq-len", "8192"))
    assert sentence.startswith(f"mpillama: {name(victim, ranks)}: a process may take only ")
    assert "--force" in sentence
    assert statuses(tmp_path) == dict.fromkeys(range(ranks), 2)


@EACH_RANK
def test_the_memory_for_the_weights_is_refused(ranks: int, victim: int, toy: Path, tmp_path: Path) -> None:
    sentence = the_mistake(sabotage("starved_load", ranks, victim, "any", toy, tmp_path, *SHORT))
    assert sentence.startswith(f"mpillama: {name(victim, ranks)}: host {HOST} is out of memory")
    assert "more nodes" in sentence
    assert (tmp_path / "failed").exists()
    assert statuses(tmp_path) == dict.fromkeys(range(ranks), 2)


@pytest.mark.parametrize("phase", ["load", "decode"])
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_an_allocation_fails(victim: int, phase: str, toy: Path, tmp_path: Path) -> None:
    result = sabotage("starved", 3, victim, phase, toy, tmp_path)
    assert result.status != 0
    sentence = the_sentence(result.stderr)
    assert name(victim, 3) in sentence
    assert "out of memory (" in sentence
    assert "more nodes" in sentence
    assert (tmp_path / "failed").exists()
