"""What `bench` prints of ranks that wait for each other."""

from typing import Any

import pytest

from mpillama.cli.bench import print_waiting


def step(stages: list[list[int]], late: list[int]) -> dict[str, Any]:
    """Of stages of two layers each with these ranks, of which some are late by their number of ms."""
    ranks = [
        {
            "rank": rank, "host": f"h{rank}", "own_seconds": 0.004, "waiting_seconds_per_layer": [0.001, 0.002],
            "wire_seconds": 0.001, "stage_wait_seconds": 0.0, "first_layer": 2 * stage,
        }
        for stage, mates in enumerate(stages)
        for rank in mates
    ]  # fmt: skip
    found = [{"rank": rank, "host": f"h{rank}", "seconds_later": rank / 1000} for rank in late]
    return {"step": "decode", "ranks": ranks, "late": found, "waiting_seconds": 0.003}


@pytest.mark.parametrize(
    ("stages", "late", "told"),
    [
        (
            [[0, 1, 2]],
            [1],
            "The others wait most for rank 1 on h1, which works 1000 µs longer than the middle one; a rank waits "
            "3000 µs a step in the mean.",
        ),
        (
            [[2, 3], [0, 1]],
            [3, 1],
            "In the stage from layer 0 on the others wait most for rank 3 on h3, which works 3000 µs longer than the "
            "middle one; in the stage from layer 2 on the others wait most for rank 1 on h1, which works 1000 µs "
            "longer than the middle one; a rank waits 3000 µs a step in the mean.",
        ),
        ([[1], [0]], [], "A rank waits 3000 µs a step in the mean."),
    ],
)
def test_the_late_rank_of_each_stage(
    stages: list[list[int]], late: list[int], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_waiting(step(stages, late))
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.endswith(told)
