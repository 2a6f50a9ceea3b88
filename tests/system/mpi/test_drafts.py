"""Draft models from the command line: the answers of one run, on any ranks that hold them."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.mtp_models import write_folder
from tests.server.conftest import serving
from tests.system.mpi.launch import PROGRAM, SCRIPTS, TIMEOUT, run

pytestmark = pytest.mark.timeout(TIMEOUT + 120)

LONG = ("--prompt-token-ids", ",".join(map(str, range(5, 80))), "--max-tokens", "40", "--logit-bias", "1=-1000")


def answer(ranks: int | None, model: Path, *options: str | Path) -> dict[str, Any]:
    result = run(ranks, *PROGRAM, "--model", model, "--json", *LONG, *options)
    assert (result.status, result.stderr) == (0, "")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("sampling", [("--temperature", "0"), ("--temperature", "0.9", "--seed", "3")])
def test_a_draft_model_changes_nothing_on_any_number_of_ranks(sampling: tuple[str, ...], toy: Path) -> None:
    plain = answer(None, toy, *sampling)
    for ranks, options in (
        (1, ()),
        (2, ("--draft-ranks", "first")),
        (3, ("--speculate", "7")),
        (5, ()),
        (2, ("--pipeline", "2")),
    ):
        drafted = answer(ranks, toy, *sampling, "--draft-model", toy, *options)
        assert drafted["token_ids"] == plain["token_ids"]
        assert drafted["logits_sha256"] == plain["logits_sha256"]
        assert drafted["drafts_proposed"] == drafted["drafts_accepted"] > 0
        memory = drafted["memory_bytes_per_rank"]
        assert all(m["draft"] > 0 for m in (memory[:1] if "first" in options else memory))
        assert "first" not in options or all(m["draft"] == 0 for m in memory[1:])


def test_a_draft_model_of_another_vocabulary_is_refused(toy: Path, demo: Path) -> None:
    result = run(2, *PROGRAM, "--model", toy, "--draft-model", demo)
    assert result.status == 2
    (line,) = result.stderr.splitlines()
    assert "demo.h5: has another vocabulary than" in line


def test_a_draft_model_that_guesses_nothing_is_refused(toy: Path) -> None:
    result = run(None, *PROGRAM, "--model", toy, "--draft-model", toy, "--speculate", "0")
    assert result.status == 2
    assert "--speculate 0" in result.stderr


def test_rows_of_a_batch_are_the_same_with_a_draft_model(toy: Path, tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "prompt": [5 + i % 3] * (i * 9 + 1), "max_tokens": 20, "temperature": i % 2, "speculate": i != 3}
        for i in range(8)
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answers(ranks: int, *options: str | Path) -> list[str]:
        target = tmp_path / f"{ranks}-{len(options)}.jsonl"
        common = ("--model", toy, "--quiet", "--sequences", "3", "--max-seq-len", "192")
        result = run(ranks, *PROGRAM, "batch", source, target, *common, *options)
        assert result.status == 0, result.stderr
        return sorted(target.read_text().splitlines())

    plain = answers(1)
    assert answers(2, "--draft-model", toy) == plain
    assert answers(3, "--draft-model", toy, "--draft-ranks", "first", "--tensor-parallel", "3") == plain
    assert answers(2, "--draft-model", toy, "--tensor-parallel", "1") == plain


def test_a_server_drafts_unless_a_request_does_without(toy: Path, tmp_path: Path) -> None:
    body = {"prompt": [5, 6, 7] * 30, "temperature": 0.9, "seed": 1, "max_tokens": 30, "logit_bias": {"1": -100}}
    with serving(toy, tmp_path, 2, "--no-auth", "--draft-model", toy) as served:
        asked = lambda **more: httpx.post(  # noqa: E731
            f"{served.url}/v1/completions", json=body | more, timeout=TIMEOUT, trust_env=False
        )
        found = [asked(), asked(speculate=False)]
    assert found[0].status_code == found[1].status_code == 200, found[1].text
    assert found[0].json()["choices"] == found[1].json()["choices"]
    assert "X-Mpillama-Ignored" not in found[1].headers


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model with a layer that drafts tokens."""
    return write_folder(tmp_path_factory.mktemp("drafting") / "glm", "glm4_moe")


@pytest.mark.parametrize("sampling", [("--temperature", "0"), ("--temperature", "0.9", "--seed", "3")])
def test_the_models_own_layer_changes_nothing_on_any_number_of_ranks(
    sampling: tuple[str, ...], drafting: Path, tmp_path: Path
) -> None:
    """From the folder, and from a native file of the layer alone; the same drafts everywhere."""
    target = tmp_path / "layer.h5"
    result = run(2, *PROGRAM, "convert", drafting, target, "--mtp")
    assert result.status == 0, result.stderr
    plain = answer(None, drafting, *sampling)
    proposed = set()
    for ranks, options in (
        (1, ("--mtp",)),
        (2, ("--mtp", "--draft-ranks", "first")),
        (3, ("--mtp",)),
        (5, ("--draft-model", target, "--speculate", "2")),
    ):
        drafted = answer(ranks, drafting, *sampling, *options)
        assert drafted["token_ids"] == plain["token_ids"]
        assert drafted["logits_sha256"] == plain["logits_sha256"]
        proposed.add(drafted["drafts_proposed"] > 0)
    assert proposed == {True}


def test_what_has_no_layer_for_drafts_is_refused(toy: Path, drafting: Path, tmp_path: Path) -> None:
    mistakes = {
        (None, "--model", toy, "--mtp"): "convert --mtp",
        (None, "--model", drafting, "--mtp", "--draft-model", toy): "exclude each other",
        (2, "--model", drafting, "--mtp", "--pipeline", "2"): "--pipeline 1",
    }
    for (ranks, *options), words in mistakes.items():
        result = run(ranks, *PROGRAM, *options)
        assert (result.status, result.stdout) == (2, "")
        assert words in result.stderr
    target = tmp_path / "layer.h5"
    assert run(None, *PROGRAM, "convert", drafting, target, "--mtp").status == 0
    result = run(None, *PROGRAM, "--model", target)
    assert result.status == 2
    assert "give it with --draft-model" in result.stderr


def test_it_is_tried_which_ranks_had_better_hold_a_draft_model(demo: Path, toy: Path, tmp_path: Path) -> None:
    """The log says which and why; answers are the same. One that is as large as the model is divided untried."""
    layer = demo.with_name("demo-mtp.h5")
    for model, draft, words in ((demo, layer, "guesses took"), (toy, toy, "rank 0 alone would read")):
        plain = answer(None, model, "--temperature", "0")
        logs = tmp_path / model.stem
        drafted = answer(2, model, "--temperature", "0", "--draft-model", draft, "--log-dir", logs)
        assert drafted["logits_sha256"] == plain["logits_sha256"]
        said = {
            line.split("INFO ")[1] for log in logs.iterdir() for line in log.read_text().splitlines() if words in line
        }
        (sentence,) = said  # of both ranks
        first, second = (memory["draft"] for memory in drafted["memory_bytes_per_rank"])
        assert first > 0
        assert (second == 0) == sentence.startswith("rank 0 alone has the draft model: ")


def test_ranks_wait_as_long_as_rank_0_gets_on_with_guesses_of_its_own(demo: Path, tmp_path: Path) -> None:
    """One try takes longer than --timeout; there is no other."""
    seconds, guesses, timeout = 0.5, 16, 5
    models = ("--model", demo, "--draft-model", demo.with_name("demo-mtp.h5"), "--speculate", str(guesses))
    options = ("--timeout", str(timeout), "--max-tokens", "4", "--log-dir", tmp_path, "--json", *LONG[:2])
    result = run(2, SCRIPTS / "slow_guesses.py", str(seconds), *models, *options)
    assert (result.status, result.stderr) == (0, "")
    log = "".join(log.read_text() for log in tmp_path.iterdir())
    assert "all ranks divide the draft model: 16 guesses took" in log
    took = float(log.split("on all ranks, ")[1].split()[0]) / 1000
    assert timeout < seconds * guesses <= took
