"""What is sent between hosts: what `plan` says is what ranks count."""

import json
from pathlib import Path

import pytest

from mpillama.loading.model_file import open_model
from mpillama.loading.traffic import Layout, Sent, logits_sent, sum_sent, sums_of_step
from tests.golden_models import FOLDER as GOLDEN
from tests.system.mpi.launch import PROGRAM, TIMEOUT, run

pytestmark = pytest.mark.timeout(4 * TIMEOUT)


def counted(ranks: int, per_host: int, model: Path, sync: str = "exact") -> dict[str, list[list[float]]]:
    env = {"MPILLAMA_RANKS_PER_HOST": str(per_host)}
    result = run(ranks, "-m", "tests.system.mpi.scripts.traffic", model, sync, env=env)
    assert result.status == 0, result.stderr
    found: dict[str, list[list[float]]] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize(("hosts", "per_host"), [(2, 1), (2, 2), (4, 1)])
def test_what_is_sent_is_what_plan_says(hosts: int, per_host: int, demo: Path) -> None:
    config, layout = open_model(str(demo)).config, Layout(hosts, per_host)
    found = counted(hosts * per_host, per_host, demo)
    ways = sum_sent(layout, config.padded_hidden_size, 1)
    assert list(found) == list(ways)
    for way, of_ranks in found.items():
        sums = ways[way].times(sums_of_step(config))
        for rank, (messages, size) in enumerate(of_ranks):
            expected = sums if rank % per_host == 0 else Sent()  # one rank speaks for its host
            if rank:
                expected += logits_sent(config, layout, 1)
            assert messages == expected.messages
            assert size == pytest.approx(expected.bytes, rel=0.15)


def test_hosts_beyond_a_grid_cost_two_rounds_and_a_message() -> None:
    whole = 4096 * Layout(9, 1).bits / 8
    square, more = (sum_sent(Layout(hosts, 1), 4096, 1)["grid"] for hosts in (9, 11))
    assert (square.rounds, square.messages) == (4, 8)
    assert square.bytes == pytest.approx(2 * 8 / 9 * whole)
    assert (more.rounds, more.messages, more.bytes) == (6, 9, pytest.approx(square.bytes + whole))


def test_coarse_sums_take_a_third(demo: Path) -> None:
    exact, coarse = (counted(2, 1, demo, sync)["direct"][0] for sync in ("exact", "q80"))
    assert coarse[0] == exact[0]
    assert coarse[1] < 0.5 * exact[1]


def test_coarse_answers_are_the_same_on_any_number_of_ranks(demo: Path) -> None:
    options = ("--model", demo, "--prompt", "Once upon", "--max-tokens", "8", "--temperature", "0", "--json")
    found = {}
    for ranks, hosts, sync in ((1, "", "exact"), (1, "", "q80"), (2, "", "q80"), (3, "2,1", "q80")):
        env = {"MPILLAMA_RANKS_PER_HOST": hosts}
        result = run(ranks, *PROGRAM, *options, "--sync", sync, env=env)
        assert result.status == 0, result.stderr
        answer = json.loads(result.stdout)
        assert answer["options"]["sync"] == sync
        found.setdefault(sync, set()).add(answer["logits_sha256"])
    assert len(found["q80"]) == len(found["exact"]) == 1
    assert found["q80"] != found["exact"]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (2, ("generate", "--model", GOLDEN / "gemma2", "--prompt-token-ids", "5,6")),
        (2, ("bench", "--shape", "gemma-2-9b", "--layers", "1")),
        (None, ("plan", "--shape", "olmo-2-7b")),
        (None, ("plan", "--model", GOLDEN / "gemma3")),
    ],
)
def test_coarse_sums_are_refused_where_a_norm_follows(ranks: int | None, words: tuple[str, ...]) -> None:
    """Before anything is loaded or made, and planned as little as run."""
    result = run(ranks, *PROGRAM, *words, "--sync", "q80")
    assert (result.status, result.stdout, result.words.count("\n")) == (2, "", 1)
    sentence = f"{words[2]}: --sync q80 is for models without norms after the halves of a layer: use exact."
    assert sentence in result.stderr
