"""`bench --where`: the parts of a step, and that they add up."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from mpillama.engine.measure import LATE, REST, SUM
from mpillama.kernels.library import PARTS
from tests.conftest import ModelFile
from tests.system.mpi.launch import PROGRAM, SCRIPTS, TIMEOUT, run

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


@pytest.mark.parametrize(("ranks", "hosts"), [(1, ""), (2, ""), (3, "2,1")])
def test_what_a_step_takes_beside_its_weights(ranks: int, hosts: str, toy: Path) -> None:
    """And a message, if it goes to another host."""
    env = {"MPILLAMA_RANKS_PER_HOST": hosts}
    result = run(
        ranks, *PROGRAM, "bench", "--model", toy, *QUICK, "--batch", "2", "1", "--threads", "1", "--json", env=env
    )
    assert result.status == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["hosts"] == (2 if hosts else 1)
    first, second = report["decode"]
    assert "overhead_seconds" not in second
    found = first["overhead_seconds"]
    assert found["step"] >= 0
    assert found["layer"] >= 0
    assert (found["latency"] is None) == (found["message"] is None) == (not hosts)
    assert not hosts or (found["latency"] > 0 and found["message"] >= 0)


@pytest.mark.parametrize(("hosts", "count"), [("2/2/1/1", 3), ("1/1/2/2", 2)])
def test_what_a_message_takes_where_one_stage_of_two_is_on_several_hosts(hosts: str, count: int, toy: Path) -> None:
    options = ("--model", toy, *QUICK, "--batch", "1", "--threads", "1", "--pipeline", "2", "--json")
    result = run(4, SCRIPTS / "hosts_of_ranks.py", hosts, "bench", *options)
    assert result.status == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["hosts"] == count
    found = report["decode"][0]["overhead_seconds"]
    assert found["latency"] > 0
    assert found["message"] >= 0


def test_a_rank_that_is_silent_while_latency_is_measured_ends_the_job(toy: Path) -> None:
    options = ("--model", toy, *QUICK, "--batch", "1", "--threads", "1", "--timeout", "5")
    env = {"MPILLAMA_RANKS_PER_HOST": "1,1"}
    result = run(2, SCRIPTS / "silent_ping.py", "bench", *options, env=env)
    assert result.status != 0
    assert "the measuring of latency" in result.words


def test_nothing_is_told_of_parts_unless_asked(toy: Path) -> None:
    result = run(None, *PROGRAM, "bench", "--model", toy, *QUICK, "--json")
    assert "where" not in json.loads(result.stdout)


def test_the_table_of_parts(toy: Path) -> None:
    result = run(None, *PROGRAM, "bench", "--model", toy, *QUICK, "--where")
    assert "barriers" in result.stdout
    assert "lm_head" in result.stdout
    assert "prefill, chunk of 8 tokens" in result.stdout


def test_ranks_that_wait_for_a_late_one(toy: Path, tmp_path: Path) -> None:
    """With all of the model on rank 1, rank 0 waits for it; `plan` learns how long."""
    quiet = (*QUICK, "--batch", "1", "--threads", "1", "--where")
    result = run(2, *PROGRAM, "bench", "--model", toy, *quiet, "--shares", "0,1", "--json")
    assert result.status == 0, result
    report = json.loads(result.stdout)
    for step in report["where"]:
        assert [rank["rank"] for rank in step["ranks"]] == [0, 1]
        for rank in step["ranks"]:
            assert len(rank["waiting_seconds_per_layer"]) == report["layers"]["measured"]
            assert min(rank["waiting_seconds_per_layer"]) >= 0
            assert rank["own_seconds"] > 0
        assert step["wire_seconds"] > 0
        assert step["waiting_seconds"] == pytest.approx(
            sum(sum(rank["waiting_seconds_per_layer"]) for rank in step["ranks"]) / 2
        )
        assert len(step["late"]) == 1
    saved = tmp_path / "bench.json"
    saved.write_text(result.stdout)
    planned = run(None, *PROGRAM, "plan", "--shape", "llama-3.2-1b", "--nodes", "2", "--bench", saved, "--json")
    without = report | {"where": []}
    saved.write_text(json.dumps(without))
    punctual = run(None, *PROGRAM, "plan", "--shape", "llama-3.2-1b", "--nodes", "2", "--bench", saved, "--json")
    late, usual = (json.loads(each.stdout)["speed"] for each in (planned, punctual))
    assert late["waiting_share"] > 0 == usual["waiting_share"]
    assert late["decode_tokens_per_second"] < usual["decode_tokens_per_second"]


SLEEP = 0.3
"""Much more than anything else takes on a machine with other work."""
LATE_RANKS = SCRIPTS / "late_ranks.py"


def test_the_late_rank_of_two_hosts_is_named_with_its_layer(toy: Path) -> None:
    """The last of four ranks, two on each host, sleeps before a layer: in it all the others wait."""
    quiet = (*QUICK, "--batch", "1", "--threads", "1", "--where", "--json")
    env = {"MPILLAMA_RANKS_PER_HOST": "2"}
    result = run(4, LATE_RANKS, SLEEP, "3", "1", "bench", "--model", toy, *quiet, env=env)
    assert result.status == 0, result
    report = json.loads(result.stdout)
    assert (report["ranks"], report["hosts"], report["layers"]["measured"]) == (4, 2, 2)
    step = report["where"][0]
    assert [rank["rank"] for rank in step["ranks"]] == [0, 1, 2, 3]
    assert all(0 < rank["wire_seconds"] < SLEEP for rank in step["ranks"])
    *others, last = step["ranks"]
    assert last["own_seconds"] > SLEEP
    assert sum(last["waiting_seconds_per_layer"]) < SLEEP / 2
    for rank in others:
        before, within = rank["waiting_seconds_per_layer"]
        assert rank["own_seconds"] < last["own_seconds"] - SLEEP / 2
        assert before < SLEEP / 2 < within < 2 * SLEEP
    (late,) = step["late"]
    assert late["rank"] == 3
    assert SLEEP / 2 < late["seconds_later"] < 2 * SLEEP
    assert SLEEP / 3 < step["waiting_seconds"] < 2 * SLEEP


def test_waiting_counts_once_in_what_is_planned_of_a_bench(toy: Path, tmp_path: Path) -> None:
    """Each rank is late in turn, so that all spend as long in sums: without --where that is a message's, else not."""
    quiet = (*QUICK, "--batch", "1", "--threads", "1", "--json")
    nodes, saved, messages = ("--nodes", "2", "--max-seq-len", "64"), tmp_path / "bench.json", []
    env = {"MPILLAMA_RANKS_PER_HOST": "1"}
    for where in ((), ("--where",)):
        result = run(2, LATE_RANKS, SLEEP, "all", "all", "bench", "--model", toy, *quiet, *where, env=env)
        assert result.status == 0, result
        (decode,) = json.loads(result.stdout)["decode"]
        messages.append(decode["overhead_seconds"]["message"])
        saved.write_text(result.stdout)
        planned = json.loads(run(None, *PROGRAM, "plan", "--model", toy, *nodes, "--bench", saved, "--json").stdout)
        assert (planned["speed"]["waiting_share"] > 0.3) == bool(where)
        ratio = planned["speed"]["decode_tokens_per_second"] / decode["tokens_per_second"]
        assert 0.75 < ratio < 1.33
    assert messages[0] > 0.05 * SLEEP > messages[1]  # a sum is one message after the other, or two


def test_the_picture_of_several_ranks(toy: Path, tmp_path: Path) -> None:
    drawing = find_spec("matplotlib") is not None
    path = tmp_path / "bench.png"
    result = run(2, *PROGRAM, "bench", "--model", toy, *QUICK, "--threads", "1", "--where", "--plot", path)
    if drawing:
        assert result.status == 0, result
        assert path.read_bytes().startswith(b"\x89PNG")
    else:
        assert (result.status, result.stderr.count("\n")) == (2, 1)
        assert "pip install 'mpillama[plot]'" in result.stderr


def test_what_cannot_be_drawn_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    """Here even before the model is looked for."""
    path = tmp_path / ("nowhere/bench.png" if find_spec("matplotlib") else "bench.png")
    result = run(2, *PROGRAM, "bench", "--model", tmp_path / "none.h5", *QUICK, "--threads", "1", "--plot", path)
    assert (result.status, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "--plot" in result.stderr


@pytest.mark.parametrize("kind", ["toy", "delta"])
def test_what_drafts_gain(kind: str, model_file: ModelFile) -> None:
    """Nobody's, the text's, and a draft model's on all ranks and on rank 0 alone; the answers are the same."""
    model = model_file(kind, "q8_0")
    options = ("--draft-model", model, "--speculate", "3", "--decode", "24", "--repetitions", "2", "--batch", "1", "2")
    result = run(2, *PROGRAM, "bench", "--model", model, *options, "--json")
    assert result.status == 0, result.stderr
    found = json.loads(result.stdout)["drafts"]
    assert len(found) == 2 * 2 * 4
    for each in found:
        assert each["tokens_per_second"] > 0
        if each["drafts_by"] == "nobody":
            assert (each["tokens_per_step"], each["drafts_proposed"]) == (pytest.approx(1, abs=0.05), 0)
        elif each["drafts_by"] != "the text so far":
            assert each["acceptance"] > 0.9
            assert each["drafts_proposed"] > 0


def test_drafts_of_weights_made_in_memory_are_not_measured() -> None:
    result = run(None, *PROGRAM, "bench", "--shape", "llama-3.2-1b", "--speculate", "2")
    assert result.status == 2
    assert "bench --speculate measures drafts of --model FILE" in result.stderr
