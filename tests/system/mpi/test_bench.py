"""`bench --where`: the parts of a step, and that they add up."""

import json
from pathlib import Path

import pytest

from mpillama.engine.measure import LATE, REST, SUM
from mpillama.kernels.library import PARTS
from tests.system.mpi.launch import PROGRAM, TIMEOUT, run

pytestmark = pytest.mark.timeout(TIMEOUT + 60)
QUICK = ("--prefill", "16", "--prefill-chunk", "8", "--context", "8", "--decode", "4", "--repetitions", "2")


@pytest.mark.parametrize("ranks", [None, 2])
def test_the_parts_of_a_step(ranks: int | None, toy: Path) -> None:
    result = run(ranks, *PROGRAM, "bench", "--model", toy, *QUICK, "--batch", "1", "3", "--where", "--json")
    assert result.status == 0
    steps = {step["step"]: step["parts"] for step in json.loads(result.stdout)["where"]}
    assert list(steps) == ["decode, 1 sequence", "decode, 3 sequences", "prefill, chunk of 8 tokens"]
    for parts in steps.values():
        names = [part["part"] for part in parts]
        everywhere = set(PARTS) - {"router", LATE}  # the first is of experts, the second of several ranks
        assert everywhere <= set(names) <= everywhere | {LATE, REST}
        assert SUM in names
        assert (LATE in names) == (ranks is not None)
        assert all(part["seconds"] > 0 for part in parts)
        streamed = {part["part"]: part["bytes"] for part in parts if "bytes" in part}
        assert set(streamed) == {"q/k/v", "o_proj", "gate/up", "down", "lm_head"}


def test_nothing_is_told_of_parts_unless_asked(toy: Path) -> None:
    result = run(None, *PROGRAM, "bench", "--model", toy, *QUICK, "--json")
    assert "where" not in json.loads(result.stdout)


def test_the_table_of_parts(toy: Path) -> None:
    result = run(None, *PROGRAM, "bench", "--model", toy, *QUICK, "--where")
    assert "barriers" in result.stdout
    assert "lm_head" in result.stdout
    assert "prefill, chunk of 8 tokens" in result.stdout
