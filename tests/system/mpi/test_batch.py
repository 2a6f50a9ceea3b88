"""`batch` as a user starts it: mixed rows, kills, other numbers of ranks, signals, limits."""

import json
import random
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mpillama.batch.run import PARTIAL_STATUS, REQUEUE_STATUS
from tests.system.mpi.launch import END_SECONDS, PROGRAM, SCRIPTS, TIMEOUT, Launch, run, started

pytestmark = pytest.mark.timeout(TIMEOUT + 240)

Rows = dict[int, bytes]


def mixed_rows(count: int) -> list[dict[str, Any]]:
    """Rows of all forms, lengths and temperatures; a beginning that many share."""
    rng, rows = random.Random(count), []
    for i in range(count):
        fields = {"max_tokens": rng.randint(1, 40), "temperature": rng.choice([0, 0.8, 1.2])}
        story = [{"role": "user", "content": f"Tell me a story about animal number {i}."}]
        row = [
            {"id": f"r{i}", "prompt": "Once upon a time " * rng.randint(1, 20), **fields},
            {"id": f"r{i}", "messages": story, "top_p": 0.9, **fields},
            {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions",
             "body": {"messages": story, "stop": ["."], "seed": i, **fields}},
            {"id": f"r{i}", "prompt": [5, 6, 7 + i % 50], "presence_penalty": 0.5, **fields},
        ][i % 4]  # fmt: skip
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def results(path: Path) -> Rows:
    """Each line's result; AssertionError for one that is there twice or torn."""
    found: Rows = {}
    for text in path.read_bytes().splitlines():
        number = json.loads(text)["line"]
        assert number not in found
        found[number] = text
    return found


def arguments(source: Path, target: Path, model: Path) -> tuple[Any, ...]:
    return (*PROGRAM, "batch", source, target, "--model", model, "--quiet", "--sequences", "8")


def slowly(source: Path, target: Path, model: Path) -> tuple[Any, ...]:
    """As `arguments`, with steps so slow that a signal comes in the midst of the work."""
    return (SCRIPTS / "failing_ranks.py", "0,1,2", "0", "slow", *arguments(source, target, model)[2:])


def answer(ranks: int | None, source: Path, target: Path, model: Path, *more: str, all_cores: bool = False) -> Rows:
    ran = run(ranks, *arguments(source, target, model), *more, all_cores=all_cores)
    assert ran.status == 0, ran.stderr
    return results(target)


@pytest.fixture(scope="module")
def alone(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Rows]:
    """What one process without ranks answers to so many mixed rows."""
    folder = tmp_path_factory.mktemp("alone")

    @cache
    def rows(count: int) -> Rows:
        source = write_rows(folder / f"{count}.jsonl", mixed_rows(count))
        return answer(None, source, folder / f"{count}-answers.jsonl", demo)

    return rows


def test_answers_depend_on_nothing_but_the_row(demo: Path, tmp_path: Path, alone: Callable[[int], Rows]) -> None:
    """Ranks, sequences at once, drafts, a small cache, the order of rows: the same bytes."""
    source, whole = write_rows(tmp_path / "in.jsonl", mixed_rows(24)), alone(24)
    assert sorted(whole) == list(range(1, 25))
    assert all(json.loads(text)["response"]["status_code"] == 200 for text in whole.values())
    assert answer(2, source, tmp_path / "2.jsonl", demo, "--speculate", "4") == whole
    small = ("--sequences", "3", "--cache-tokens", "768", "--prefill-chunk", "40")
    assert answer(3, source, tmp_path / "3.jsonl", demo, *small) == whole


def test_bad_rows_get_errors_and_the_job_goes_on(demo: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    good = mixed_rows(3)
    bad = [b"\x00\x01\xff", b'{"id": "x"}', b'{"id": "long", "prompt": "' + b"a b " * 50_000 + b'"}',
           b'{"id": "r0", "prompt": "again"}',
           b'{"id": "f", "prompt": "x", "stop": 1}', b'{"id": "t", "prompt": [99999]}',
           b"x" * (17 << 20)]  # fmt: skip
    lines = [*(json.dumps(row).encode() for row in good), *bad]
    source.write_bytes(b"\n".join(lines))
    target = tmp_path / "out.jsonl"
    options = ("--model", demo, "--json", "--metrics", tmp_path / "metrics.jsonl")
    ran = run(2, *PROGRAM, "batch", source, target, *options)
    assert ran.status == 0, ran.stderr
    summary = json.loads(ran.stdout)
    assert (summary["rows"], summary["errors"]) == (10, 7)
    found = {number: json.loads(text) for number, text in results(target).items()}
    assert [found[i]["custom_id"] for i in range(1, 11)] == ["r0", "r1", "r2", None, "x", "long", "r0", "f", "t", None]
    words = ["no JSON", "prompt or messages", "context", "line 1", "stop", "outside", "longer than"]
    for i, word in enumerate(words, 4):
        assert found[i]["response"]["status_code"] == 400
        assert word in found[i]["error"]["message"]
    metrics = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["rows"] == 10
    runs = [json.loads(text) for text in (tmp_path / "out.jsonl.runs").read_text().splitlines()]
    assert [entry["event"] for entry in runs] == ["start", "end"]
    assert (runs[0]["ranks"], len(runs[0]["hosts"])) == (2, 1)


def wait_for(condition: Any, launch: Launch) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert launch.process.poll() is None, launch.stderr()
        assert time.monotonic() < end
        time.sleep(0.01)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def kill_at_random(launch: Launch, target: Path, rng: random.Random) -> None:
    """Kill -9 of all ranks: while they start, or a little after something new was written."""
    before, end = size(target), time.monotonic() + rng.choice([0, TIMEOUT, TIMEOUT])
    while launch.process.poll() is None and size(target) == before and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.8))
    launch.kill()


@pytest.mark.slow
def test_ten_kills_lose_nothing_and_do_nothing_twice(demo: Path, tmp_path: Path, alone: Callable[[int], Rows]) -> None:
    """Kill -9 of the whole job at random points, each time continued on another number of ranks."""
    source, whole = write_rows(tmp_path / "in.jsonl", mixed_rows(120)), alone(120)
    assert len(whole) == 120
    target, rng, sizes = tmp_path / "out.jsonl", random.Random(0), set()
    for _ in range(10):
        with started(rng.choice([None, 2, 3]), *slowly(source, target, demo)) as launch:
            kill_at_random(launch, target, rng)
        sizes.add(size(target))
        if target.exists() and rng.random() < 0.3:  # as if the last block had not reached the disk
            with target.open("r+b") as file:
                file.truncate(max(0, size(target) - rng.randint(1, 3000)))
    assert len(sizes) > 3, "the kills came in mid-work"
    assert answer(2, source, target, demo) == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_what_is_done_and_asks_for_a_restart(number: signal.Signals, demo: Path, tmp_path: Path) -> None:
    source, target = write_rows(tmp_path / "in.jsonl", mixed_rows(150)), tmp_path / "out.jsonl"
    with started(2, *slowly(source, target, demo)) as launch:
        wait_for(lambda: target.exists() and target.stat().st_size > 0, launch)
        launch.ranks()[0].send_signal(number)
        assert launch.gone_within(END_SECONDS), launch.stderr()
        assert launch.process.returncode == REQUEUE_STATUS
        assert "Traceback" not in launch.stderr()
    done = len(results(target))
    assert 0 < done < 150
    assert len(answer(3, source, target, demo)) == 150


def test_time_that_runs_out_stops_the_run(demo: Path, tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": "Once", "max_tokens": 500, "ignore_eos": True} for i in range(300)]
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    ran = run(2, *PROGRAM, "batch", source, target, "--model", demo, "--time-limit", "6")
    assert ran.status == REQUEUE_STATUS, ran.stderr
    assert "start the same command again" in ran.stderr
    assert 0 <= len(results(target)) < 300


def test_other_options_do_not_continue(demo: Path, tmp_path: Path) -> None:
    source, target = write_rows(tmp_path / "in.jsonl", mixed_rows(4)), tmp_path / "out.jsonl"
    answer(None, source, target, demo)
    before = target.read_bytes()
    ran = run(2, *arguments(source, target, demo), "--seed", "7")
    assert (ran.status, ran.stderr.count("\n")) == (2, 1), ran.stderr
    assert "seed was 0 and is 7" in ran.stderr
    assert target.read_bytes() == before


def test_an_input_that_is_missing_or_the_output(demo: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", mixed_rows(1))
    for pair in ((tmp_path / "none", tmp_path / "out"), (source, source), (source, tmp_path / "none" / "out")):
        ran = run(None, *arguments(*pair, demo))
        assert (ran.status, ran.stderr.count("\n")) == (2, 1), ran.stderr
    assert json.loads(source.read_text())["id"] == "r0"


# -- groups of ranks ----------------------------------------------------------------------------------------------


def failing(ranks: int, culprits: str, kind: str, source: Path, target: Path, model: Path, size: int) -> Any:
    options = ("batch", source, target, "--model", model, "--sequences", "4", "--tensor-parallel", str(size))
    return run(ranks, SCRIPTS / "failing_ranks.py", culprits, "10", kind, *options)


@pytest.mark.parametrize(("ranks", "size"), [(2, 1), (4, 2), (3, 3)])
def test_groups_give_the_same_bytes(
    ranks: int, size: int, demo: Path, tmp_path: Path, alone: Callable[[int], Rows]
) -> None:
    """On all cores: what has a core to itself shares it with no other group."""
    source, groups = write_rows(tmp_path / "in.jsonl", mixed_rows(24)), ("--tensor-parallel", str(size))
    assert answer(ranks, source, tmp_path / "out.jsonl", demo, *groups, all_cores=True) == alone(24)


@pytest.mark.parametrize(
    ("ranks", "size", "culprits", "kind"),
    [(2, 1, "0", "memory"), (4, 2, "1", "disk"), (4, 2, "2", "memory"), (4, 2, "3", "bug"), (3, 1, "0,2", "bug")],
)  # fmt: skip
def test_a_group_that_fails_retires_and_the_others_do_its_rows(
    ranks: int, size: int, culprits: str, kind: str, demo: Path, tmp_path: Path, alone: Callable[[int], Rows]
) -> None:
    source, target = write_rows(tmp_path / "in.jsonl", mixed_rows(24)), tmp_path / "out.jsonl"
    ran = failing(ranks, culprits, kind, source, target, demo, size)
    assert ran.status == PARTIAL_STATUS, ran.stderr
    for culprit in culprits.split(","):
        assert ran.stderr.count(f"a replica failed, others answered its rows: rank {culprit} of {ranks}") == 1, (
            ran.stderr
        )
    assert "Traceback" not in ran.stderr
    assert results(target) == alone(24)


def test_no_group_left_keeps_what_was_finished(demo: Path, tmp_path: Path) -> None:
    source, target = write_rows(tmp_path / "in.jsonl", mixed_rows(40)), tmp_path / "out.jsonl"
    ran = failing(2, "0,1", "bug", source, target, demo, 1)
    assert (ran.status, ran.stderr.count("no replica is left")) == (2, 1), ran.stderr
    assert len(answer(2, source, target, demo)) == 40


def test_a_size_that_leaves_a_rest_is_refused(demo: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", mixed_rows(1))
    ran = run(3, *arguments(source, tmp_path / "out.jsonl", demo), "--tensor-parallel", "2")
    assert (ran.status, ran.stderr.count("\n")) == (2, 1), ran.stderr
    assert "--tensor-parallel is 2" in ran.stderr


def test_a_group_without_rows_waits_for_the_others(demo: Path, tmp_path: Path) -> None:
    """Longer than ranks wait for one another."""
    row = {"id": "a", "prompt": "Once", "max_tokens": 250, "temperature": 0, "ignore_eos": True}
    source, target = write_rows(tmp_path / "in.jsonl", [row]), tmp_path / "out.jsonl"
    ran = run(4, *slowly(source, target, demo), "--tensor-parallel", "2", "--timeout", "4")
    assert ran.status == 0, ran.stderr
    assert len(results(target)) == 1


def test_ranks_of_a_failed_group_wait_for_the_others(demo: Path, tmp_path: Path) -> None:
    """Longer than ranks wait for one another: also those of rank 0's own group."""
    row = {"id": "a", "prompt": "Once", "max_tokens": 250, "temperature": 0, "ignore_eos": True}
    source, target = write_rows(tmp_path / "in.jsonl", [row, {**row, "id": "b"}]), tmp_path / "out.jsonl"
    script = (SCRIPTS / "failing_ranks.py", "1", "10", "bug/slow", *arguments(source, target, demo)[2:])
    ran = run(4, *script, "--tensor-parallel", "2", "--timeout", "4")
    assert ran.status == PARTIAL_STATUS, ran.stderr
    assert len(results(target)) == 2
