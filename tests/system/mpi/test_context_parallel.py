"""`--context-parallel`: ranks hold parts of the positions, with the same logits and answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillama.loading.model_file import open_model
from mpillama.loading.traffic import Layout, pieces_sent
from tests import tiny_models as models
from tests.engine.test_disk_cache import damage, files_in
from tests.golden_models import FOLDER as GOLDEN
from tests.system.mpi.launch import PROGRAM, TIMEOUT, run
from tests.system.mpi.test_shares import digest as digest_of_short_text

pytestmark = pytest.mark.timeout(3 * TIMEOUT)

TOKENS = 2600
"""Three pieces of 1,024 positions."""
ONE_HEAD = {**models.TOY, "num_key_value_heads": 1, "max_position_embeddings": 4096}
CONFIGS = {
    "one": ONE_HEAD,
    "three": {**models.TOY, "max_position_embeddings": 4096},
    "window": {**ONE_HEAD, "model_type": "mistral", "sliding_window": 1100},
    "latent": {**models.LATENT_TOY, "max_position_embeddings": 4096},
    "delta": {**models.DELTA_TOY, "num_key_value_heads": 2, "num_attention_heads": 4, "max_position_embeddings": 4096},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose ranks hold the same heads or latents."""
    paths = {name: tmp_path_factory.mktemp("positions") / f"{name}.h5" for name in CONFIGS}
    for name, config in CONFIGS.items():
        models.write_toy(paths[name], config=config)
    return paths


def generate(ranks: int | None, model: Path, *options: str, isa: str = "", tokens: int = TOKENS) -> dict[str, Any]:
    """What `generate` says of a long prompt and a few tokens."""
    prompt = ",".join(str(2 + (7 * i * i + i) % 300) for i in range(tokens))
    command = ("--model", model, "--prompt-token-ids", prompt, "--max-tokens", "4", "--temperature", "0", "--json")
    result = run(ranks, *PROGRAM, "generate", *command, *options, env={"MPILLAMA_ISA": isa} if isa else {})
    assert result.status == 0, result
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def digest(ranks: int | None, model: Path, *options: str, **how: Any) -> tuple[str, list[int]]:
    """Of the logits, and the bytes of each rank's cache."""
    found = generate(ranks, model, *options, **how)
    return found["logits_sha256"], [rank["kv_cache"] for rank in found["memory_bytes_per_rank"]]


def cached_digest(ranks: int | None, model: Path, *options: str) -> tuple[str, int]:
    """Of the logits, and how much of the prompt was found."""
    found = generate(ranks, model, *options)
    return found["logits_sha256"], found["cached_tokens"]


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("one", [(2, "q8", ("--prefill-chunk", "100", "--threads", "2")), (5, "f16", ("--threads", "1"))]),
        ("three", [(2, "q4", ("--threads", "1")), (5, "f16", ("--threads", "1", "--shares", "5,1,2,0,1"))]),
        ("window", [(3, "f16", ("--prefill-chunk", "333", "--threads", "1"))]),
        ("latent", [(2, "q4", ("--threads", "2")), (3, "q8", ("--threads", "1",)), (5, "f16", ("--threads", "1"))]),
        ("delta", [(4, "f16", ("--threads", "1", "--pipeline", "1"))]),
    ],
)  # fmt: skip
def test_logits_do_not_depend_on_who_holds_which_positions(name, runs, made):
    for ranks, kv_type, options in runs:
        expected, (whole,) = digest(None, made[name], "--kv-type", kv_type)
        found, held = digest(ranks, made[name], "--context-parallel", "--kv-type", kv_type, *options)
        assert found == expected, (ranks, options)
        assert len(held) == ranks
        assert max(held) <= whole * (-(-4 // ranks)) / 4, "of the context's four pieces"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "latent"])
def test_any_instruction_set_gives_the_same(name, made):
    found, _ = digest(2, made[name], "--context-parallel", isa="generic", tokens=1100)
    assert found == digest(None, made[name], tokens=1100)[0]


def test_stages_divide_positions_among_themselves(made):
    """Four ranks in two stages: each stage's two ranks hold the positions of its layer."""
    expected, (whole,) = digest(None, made["one"])
    found, held = digest(4, made["one"], "--context-parallel", "--pipeline", "2", "--threads", "1")
    assert found == expected
    assert held == [whole / 4] * 4


@pytest.mark.parametrize(
    ("family", "ranks"), [("gemma3", 2), ("gpt_oss", 2), ("olmo2", 2), ("qwen3_5", 2), ("llama4", 3)]
)
def test_families_whose_attention_has_more_to_it(family, ranks):
    """Windows, sinks and biases, norms of whole projections, gates, chunks; one piece holds their short contexts."""
    expected, _ = digest_of_short_text(None, GOLDEN / family)
    found, _ = digest_of_short_text(ranks, GOLDEN / family, "--context-parallel")
    assert found == expected


def answers(ranks: int | None, rows: Path, out: Path, model: Path, *options: str) -> tuple[dict[str, str], dict]:
    """Of `batch`, by row, and its last figures."""
    command = ("--model", model, "--max-tokens", "250", "--sequences", "8", "--metrics", f"{out}-metrics")
    parallel = ("--tensor-parallel", str(ranks)) if ranks else ()
    batch = run(ranks, *PROGRAM, "batch", rows, out, *command, "--threads", "1", *options, *parallel)
    assert batch.status == 0, batch
    found = (json.loads(line) for line in out.read_text().splitlines())
    texts = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in found}
    return texts, json.loads(Path(f"{out}-metrics").read_text().splitlines()[-1])


@pytest.mark.parametrize("name", ["one", "latent"])
def test_a_batch_with_common_beginnings_preemptions_and_drafts(name, made, tmp_path):
    rows, common = tmp_path / "rows.jsonl", " ".join(f"llama {i % 23}" for i in range(380))
    texts = [f"{i % 4} {common[: 500 * (i % 7) + 1500]} the queue {i % 9} " for i in range(11)]
    rows.write_text("".join(json.dumps({"id": str(i), "prompt": text}) + "\n" for i, text in enumerate(texts)))
    expected, _ = answers(None, rows, tmp_path / "alone", made[name])
    narrow = ("--context-parallel", "--cache-tokens", "6144", "--speculate", "2", "--prefill-chunk", "200")
    narrow += ("--cache-dir", str(tmp_path / "cache"))
    found, figures = answers(3, rows, tmp_path / "divided", made[name], *narrow)
    assert found == expected
    assert len(found) == 11
    assert figures["preemptions"] > 0
    assert figures["prefix_cache_hit_share"] > 0.3


def test_it_is_refused_where_nothing_is_held_twice(made, toy):
    for ranks, model in ((None, made["latent"]), (3, toy)):
        result = run(ranks, *PROGRAM, "--model", model, "--context-parallel", "--max-tokens", "1")
        assert (result.status, result.stdout, result.stderr.count("\n")) == (2, "", 1), result
        assert "leave it out" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks", "others"), [("one", 2, 3), ("latent", 5, 2), ("delta", 4, 4)])
def test_files_pass_between_ranks_that_divide_positions_and_others(name, ranks, others, made, tmp_path):
    """Whoever wrote them; and what is torn, whichever rank holds it, is computed again."""
    cache, divided, whole = ("--cache-dir", str(tmp_path), "--threads", "1"), "--context-parallel", TOKENS // 64 * 64
    expected, cached = cached_digest(ranks, made[name], *cache, divided)
    assert cached == 0
    assert cached_digest(None, made[name], *cache) == (expected, whole)
    damage(files_in(tmp_path)[7], np.random.default_rng(2))
    assert cached_digest(others, made[name], *cache, divided)[0] == expected
    assert cached_digest(others, made[name], *cache, divided) == (expected, whole)


def test_plan_counts_what_ranks_send(made):
    """With four spans of 512 positions, two on each rank."""
    context, found = 2000, []
    sizes = ("--prefill", "16", "--decode", "3", "--context", str(context), "--repetitions", "1", "--threads", "1")
    for options in ((), ("--context-parallel",)):
        result = run(2, *PROGRAM, "bench", "--model", made["latent"], *sizes, "--json", *options)
        assert result.status == 0, result
        row = json.loads(result.stdout)["decode"][0]
        found.append((row["sent_messages_per_step"], row["sent_bytes_per_step"]))
    planned = pieces_sent(open_model(str(made["latent"])).config, Layout(2, 1), 1, context + 1)
    assert found[1][0] - found[0][0] == planned.messages
    assert found[1][1] - found[0][1] == planned.bytes
