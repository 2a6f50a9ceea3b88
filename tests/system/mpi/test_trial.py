"""`--layers N`: a trial with the first layers of a real file, and what it says of the whole."""

import json
from pathlib import Path

import pytest

from mpillama.formats.native.table import read_table
from tests.system.mpi.launch import PROGRAM, TIMEOUT, run

pytestmark = pytest.mark.timeout(TIMEOUT + 60)
FOR_PYTHON = 12e6
"""So much of a process's 100 MB differs between starts."""
GREEDY = ("--temperature", "0", "--max-tokens", "4", "--json")


@pytest.mark.parametrize("ranks", [None, 3])
def test_a_trial_foresees_the_memory_of_the_whole_model(ranks: int | None, demo: Path) -> None:
    whole = json.loads(run(ranks, *PROGRAM, "--model", demo, *GREEDY).stdout)
    assert whole["trial"] is None
    trial = json.loads(run(ranks, *PROGRAM, "--model", demo, *GREEDY, "--layers", "2").stdout)["trial"]
    assert (trial["layers"], trial["whole_layers"]) == (2, read_table(str(demo)).config.num_hidden_layers)
    assert trial["memory_bytes_per_rank"] == pytest.approx(max(whole["rss_bytes_per_rank"]), abs=FOR_PYTHON)
    assert trial["load_seconds"] > 0
    assert trial["decode_tokens_per_second"] > 0


def test_a_trial_is_told_as_one(demo: Path) -> None:
    result = run(2, *PROGRAM, "--model", demo, "--max-tokens", "2", "--layers", "1")
    assert result.status == 0, result.stderr
    assert "trial of 1 of 6 layers" in result.stderr


@pytest.mark.parametrize(("layers", "told"), [("0", "--layers is 0: give at least 1"), ("7", "1 to 6 layers")])
def test_layers_that_are_none(layers: str, told: str, demo: Path) -> None:
    result = run(None, *PROGRAM, "--model", demo, *GREEDY, "--layers", layers)
    assert (result.status, result.stdout) == (2, "")
    assert told in result.stderr
