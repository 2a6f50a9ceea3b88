"""The same logits however unevenly ranks share a model, and shares by what `doctor --bandwidth` measures."""

import json
from pathlib import Path

import pytest

from tests.system.mpi.launch import PROGRAM, TIMEOUT, run

pytestmark = pytest.mark.timeout(3 * TIMEOUT)


def digest(ranks: int | None, model: Path, *options: str) -> tuple[str, list[int]]:
    """Of the logits of a few tokens, and the weights' bytes of each rank."""
    prompt = ",".join(str(2 + 7 * i % 60) for i in range(70))
    command = ("--model", model, "--prompt-token-ids", prompt, "--max-tokens", "6", "--temperature", "0", "--json")
    result = run(ranks, *PROGRAM, "generate", *command, "--threads", "1", *options)
    assert (result.status, result.stderr) == (0, ""), result
    found = json.loads(result.stdout)
    return found["logits_sha256"], [rank["weights"] for rank in found["memory_bytes_per_rank"]]


def test_logits_do_not_depend_on_the_shares(toy: Path) -> None:
    expected, whole = digest(None, toy)
    for shares in ("5,1,2", "0,1,0.3", "1,0,0"):
        found, weights = digest(3, toy, "--shares", shares)
        assert found == expected, shares
        numbers = [float(share) for share in shares.split(",")]
        assert weights.index(max(weights)) == numbers.index(max(numbers))
        assert all(size < 0.2 * whole[0] for size, number in zip(weights, numbers, strict=True) if not number)


def test_shares_by_measurement(toy: Path, tmp_path: Path) -> None:
    measured = run(2, *PROGRAM, "doctor", "--bandwidth", "--json", "--threads", "1")
    assert (measured.status, measured.stderr) == (0, "")
    report = json.loads(measured.stdout)
    for rank in report["per_rank"]:
        assert 1e8 < rank["read_bandwidth_bytes_per_second"] < 1e13
        assert 0 < rank["memory_bytes"] < 1 << 50
    report["per_rank"][1]["read_bandwidth_bytes_per_second"] = (
        report["per_rank"][0]["read_bandwidth_bytes_per_second"] / 3
    )
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps(report))
    expected, _ = digest(None, toy)
    found, weights = digest(2, toy, "--shares", str(path))
    assert found == expected
    assert weights[0] > 1.7 * weights[1]
    told = run(2, *PROGRAM, "--model", toy, "--max-tokens", "2", "--threads", "1", "--shares", path)
    assert "the ranks take 75, 25 % of the model" in told.stderr
    assert "times as fast as with even shares" in told.stderr


@pytest.mark.parametrize(("shares", "word"), [("1,2,3", "one for each of the 2 ranks"), ("0,0", "more than 0")])
def test_shares_that_do_not_fit_the_job(shares: str, word: str, toy: Path) -> None:
    result = run(2, *PROGRAM, "--model", toy, "--shares", shares)
    assert (result.status, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert word in result.stderr
