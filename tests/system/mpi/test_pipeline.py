"""`--pipeline`: layers on one stage of ranks after the other, with the same logits and answers."""

import json
from pathlib import Path

import pytest

from tests.golden_models import FOLDER as GOLDEN
from tests.system.mpi.launch import PROGRAM, SCRIPTS, TIMEOUT, run
from tests.system.mpi.test_shares import digest

pytestmark = pytest.mark.timeout(3 * TIMEOUT)


@pytest.mark.parametrize(
    ("ranks", "options"), [(2, ("2",)), (4, ("2", "--shares", "3,1,0,1")), (4, ("2", "--prefill-chunk", "33"))]
)
def test_logits_do_not_depend_on_stages(ranks: int, options: tuple[str, ...], toy: Path) -> None:
    """The prompt goes through the stages in several parts."""
    expected, whole = digest(None, toy)
    found, weights = digest(ranks, toy, "--pipeline", *options)
    assert found == expected
    assert max(weights) < 0.8 * whole[0]


@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v3", "glm_moe_dsa"])
def test_layers_of_several_kinds(family: str) -> None:
    """Recurrent states, experts and an untied head; latent caches, experts after dense layers and a tied one."""
    expected, _ = digest(None, GOLDEN / family)
    found, _ = digest(2, GOLDEN / family, "--pipeline", "2")
    assert found == expected


def test_batch_and_perplexity_through_stages(toy: Path, tmp_path: Path) -> None:
    rows, texts = tmp_path / "rows.jsonl", tmp_path / "text"
    rows.write_text("".join(json.dumps({"id": str(i), "prompt": "the queue " * (1 + i % 3)}) + "\n" for i in range(40)))
    texts.write_text("Once upon a time a llama waited in the queue. " * 9)
    answers, losses = [], []
    for ranks, options in ((None, ()), (4, ("--pipeline", "2", "--threads", "1"))):
        out = tmp_path / f"out-{ranks}"
        command = ("--model", toy, "--max-tokens", "6", "--sequences", "36", "--max-seq-len", "256", "--quiet")
        parallel = ("--tensor-parallel", "4") if ranks else ()
        batch = run(ranks, *PROGRAM, "batch", rows, out, *command, *options, *parallel)
        assert batch.status == 0, batch
        found = (json.loads(line) for line in out.read_text().splitlines())
        answers.append({row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in found})
        told = run(
            ranks, *PROGRAM, "perplexity", "--model", toy, "--file", texts, "--context", "64", "--json", *options
        )
        assert told.status == 0, told
        losses.append(json.loads(told.stdout)["perplexity"])
    assert len(answers[0]) == 40
    assert answers[0] == answers[1]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("model", ["demo", "qwen3_next"])
def test_steps_under_way_change_no_answer(model: str, demo: Path) -> None:
    """Requests are cancelled and sent back while they are in a step that other ranks have begun; whole rows are looked
    up, memory is reported and the end comes while there is one.
    """
    path, found = demo if model == "demo" else GOLDEN / model, {}
    for ranks, stages, error in ((1, 1, 2e-5), (2, 2, 2e-5), (4, 2, 0.9)):
        result = run(ranks, "-m", "tests.system.mpi.scripts.steps_ahead", path, stages, error)
        assert result.status == 0, result
        found[ranks] = json.loads(result.stdout)
    results = [each.pop("results") for each in found.values()]
    assert results[0] == results[1] == results[2]
    assert (found[1]["ahead"], found[1]["dropped"]) == (0, 0)
    for each in (found[2], found[4]):
        assert (each["ahead"], each["under_way_when_cancelled"], each["left_under_way"]) == (1, 2, 1)
        assert each["dropped"] > 2  # those that were cancelled, and some that others needed the blocks of
    assert found[2]["whole_rows"] < found[4]["whole_rows"]


def test_an_llm_of_stages_answers_and_embeds_as_one(toy: Path) -> None:
    script = "tests.system.mpi.scripts.staged_llm"
    alone, staged = run(None, "-m", script, toy, "1"), run(2, "-m", script, toy, "2")
    assert (alone.status, staged.status) == (0, 0), staged
    assert alone.stdout.count("\n") == 2
    assert staged.stdout == alone.stdout


def test_the_idle_time_of_stages_is_told(toy: Path) -> None:
    """Of two stages with a step in one part, each waits while the other works: here rank 1 takes 5 ms longer."""
    sizes = ("--prefill", "16", "--decode", "8", "--context", "8", "--repetitions", "2", "--batch", "4")
    options = ("--pipeline", "2", "--threads", "1", "--where", "--json", *sizes)
    result = run(2, SCRIPTS / "failing_ranks.py", "1", "0", "paced", "bench", "--model", toy, *options)
    assert result.status == 0, result
    (step, _) = json.loads(result.stdout)["where"]
    assert [rank["first_layer"] for rank in step["ranks"]] == [1, 0]
    assert [len(rank["waiting_seconds_per_layer"]) for rank in step["ranks"]] == [1, 1]
    assert step["ranks"][0]["stage_wait_seconds"] > 0.5 * step["ranks"][1]["own_seconds"]
    assert step["late"] == []


def test_the_whole_model_is_extrapolated_from_stages_of_different_kinds() -> None:
    """One stage has the dense layer, the other one experts: both time layers of each kind."""
    sizes = ("--prefill", "8", "--decode", "2", "--context", "8", "--repetitions", "1", "--batch", "1", "--layers", "2")
    command = (*PROGRAM, "bench", "--model", GOLDEN / "deepseek_v3", "--threads", "1", "--json", *sizes)
    for ranks, options in ((None, ()), (2, ("--pipeline", "2"))):
        result = run(ranks, *command, *options)
        assert result.status == 0, result
        (step,) = json.loads(result.stdout)["decode"]
        assert step["whole_model_tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("ranks", "stages", "words"), [(3, "2", "3 ranks do not divide"), (3, "3", "only 2 layers"), (2, "0", "at least 1")]
)
def test_stages_that_cannot_be(ranks: int, stages: str, words: str, toy: Path) -> None:
    result = run(ranks, *PROGRAM, "--model", toy, "--pipeline", stages)
    assert (result.status, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert words in result.stderr
