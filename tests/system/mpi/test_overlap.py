"""Steps whose sums travel between hosts while other tokens are computed: the same bits as in one part."""

import json

import pytest

from mpillama.engine.step_parts import FEWEST_TOKENS, REPEAT, TRIES, StepParts
from tests.golden_models import FOLDER as GOLDEN
from tests.system.mpi.launch import DEMO_MODEL, PROGRAM, run

pytestmark = pytest.mark.timeout(240)

# Kinds of attention and MLP, norms of whole projections, norms after the halves, states.
FAMILIES = ("llama_bias", "olmo2", "gemma2", "gpt_oss", "deepseek_v3", "glm_moe_dsa", "qwen3_next", "minimax_m2")
SLOW_FOUR = pytest.param(4, "1", 1, marks=pytest.mark.slow)
WHOLE_PROJECTIONS = ("olmo2", "minimax_m2")


@pytest.mark.parametrize(("ranks", "hosts", "threads"), [(2, "1", 1), (3, "2,1", 2), SLOW_FOUR])
def test_parts_change_no_bit(ranks: int, hosts: str, threads: int) -> None:
    paths = [str(GOLDEN / family) for family in FAMILIES]
    words = ("-m", "tests.system.mpi.scripts.overlap", str(threads), *paths)
    result = run(ranks, *words, env={"MPILLAMA_RANKS_PER_HOST": hosts})
    assert result.status == 0, result.stderr
    for path, found in json.loads(result.stdout).items():
        for parts, of_ranks in found.items():
            sums = 2 + path.endswith(WHOLE_PROJECTIONS)
            assert of_ranks == [[True, int(parts) * sums]] * ranks, (path, parts)


def test_answers_are_the_same() -> None:
    """Of a prompt and of many sequences."""
    ids = ",".join(str(3 + 7 * i % 200) for i in range(40))
    words = ("generate", "--model", DEMO_MODEL, "--prompt-token-ids", ids, "--max-tokens", "4", "--temperature", "0")
    found = set()
    stages = ("--pipeline", "2", "--threads", "1")
    runs = (("never", 1, "", ()), ("always", 3, "1", ()), ("", 2, "1", ()), ("always", 4, "1", stages))
    for overlap, ranks, hosts, options in runs:
        env = {"MPILLAMA_RANKS_PER_HOST": hosts, "MPILLAMA_OVERLAP": overlap}
        result = run(ranks, *PROGRAM, *words, *options, "--json", env=env)
        assert result.status == 0, result.stderr
        answer = json.loads(result.stdout)
        found.add((tuple(answer["token_ids"]), answer["logits_sha256"]))
    assert len(found) == 1


@pytest.mark.parametrize(("ranks", "options"), [(2, ()), (4, ("--pipeline", "2"))])
def test_both_ways_are_tried_without_being_asked(ranks: int, options: tuple[str, ...]) -> None:
    """In steps of 8 tokens and more: two stages have two of them under way."""
    words = ("bench", "--model", DEMO_MODEL, "--layers", "2", "--prefill", "16", "--batch", "16", "1")
    few = ("--context", "16", "--decode", "1", "--repetitions", "1", "--threads", "1", "--json", *options)
    result = run(ranks, *PROGRAM, *words, *few, env={"MPILLAMA_RANKS_PER_HOST": "1"})
    assert result.status == 0, result.stderr
    found = json.loads(result.stdout)
    tried = [set(row["tried_tokens_per_second"]) for row in (*found["prefill"], *found["decode"])]
    assert tried == [{"1", "2"}, {"1", "2"}, set()]


@pytest.mark.parametrize(("hosts", "threads"), [("1", "multiple"), ("2", "funneled")])
def test_mpi_is_asked_for_threads_between_hosts_only(hosts: str, threads: str) -> None:
    result = run(2, *PROGRAM, "doctor", "--json", "--threads", "1", env={"MPILLAMA_RANKS_PER_HOST": hosts})
    assert result.status == 0, result.stderr
    assert json.loads(result.stdout)["mpi_threads"] == threads


def test_an_unknown_wish_is_refused_on_all_ranks() -> None:
    result = run(2, *PROGRAM, "doctor", env={"MPILLAMA_OVERLAP": "sometimes"})
    assert (result.status, result.stdout) == (2, "")
    assert result.words == (
        "mpillama: MPILLAMA_OVERLAP is 'sometimes': set it to always or never, or leave it unset to have it chosen.\n"
    )


def chosen(parts: StepParts, tokens: int, whole: float, halves: float, steps: int) -> list[int]:
    """The parts of so many steps that take so long in one and in two."""
    found = []
    for _ in range(steps):
        found.append(parts.choose(tokens))
        parts.note(tokens, found[-1], halves if found[-1] > 1 else whole)
    return found


@pytest.mark.parametrize(("whole", "halves", "better"), [(1.0, 0.7, 2), (1.0, 1.2, 1)])
def test_what_took_less_is_chosen(whole: float, halves: float, better: int) -> None:
    parts = StepParts(lambda tokens: 2)
    tried = chosen(parts, 32, whole, halves, 2 * (TRIES + 1))
    assert sorted(tried) == [1] * (TRIES + 1) + [2] * (TRIES + 1)
    later = chosen(parts, 32, whole, halves, 2 * REPEAT)
    assert later.count(3 - better) == 2
    assert chosen(parts, FEWEST_TOKENS - 1, whole, halves, 3) == [1, 1, 1]


def test_what_becomes_faster_is_found() -> None:
    parts = StepParts(lambda tokens: 2)
    chosen(parts, 32, 1.0, 1.2, 20)
    assert chosen(parts, 32, 1.0, 0.5, 6 * REPEAT)[-1] == 2
