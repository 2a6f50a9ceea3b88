"""Handing out lines: each once, again if a group fails, in time for the end."""

import json
from pathlib import Path

import pytest

from mpillama.batch.journal import Journal
from mpillama.batch.results import Provenance, Result
from mpillama.batch.rows import Line
from mpillama.batch.run import PARTIAL_STATUS, REQUEUE_STATUS, BatchRun
from mpillama.errors import UserError
from mpillama.job.deadline import Deadline, StopRequest, parse_duration
from mpillama.replicas.router import Router
from tests.replicas.scripted import ScriptedReplica

CAME_FROM = Provenance("m", "o", "1")


def line(number: int, name: str | None = None) -> Line:
    return Line(number, json.dumps({"id": name or f"r{number}", "prompt": "x"}).encode(), number)


class Group(ScriptedReplica):
    """A group of ranks that finishes one line a step; fails at its `fails`-th line."""

    def __init__(self, slots: int = 3, fails: int | None = None):
        super().__init__(result, slots, fails)


def result(line: Line) -> Result:
    fields = {"line": line.number, "custom_id": f"r{line.number}", "provenance": CAME_FROM.as_json()}
    return Result(line.number, f"r{line.number}", json.dumps(fields).encode() + b"\n", False, 1, 1)


def run(tmp_path: Path, groups, lines, deadline=None, stop=None, on_progress=lambda counts: None):
    journal = Journal(str(tmp_path / "out.jsonl"), CAME_FROM, {}, {})
    router = Router(groups, None, "what was finished stays, start again.")
    batch = BatchRun(router, iter(lines), journal, deadline or Deadline(None), stop or StopRequest(), on_progress)
    try:
        return batch.run(), batch.counts
    finally:
        journal.close()


def done(tmp_path: Path) -> list[int]:
    return [json.loads(text)["line"] for text in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_every_line_once_and_the_faster_group_does_more(tmp_path: Path):
    wide, narrow = Group(8), Group(1)
    status, counts = run(tmp_path, [narrow, wide], [line(i) for i in range(1, 51)])
    assert status == 0
    assert sorted(done(tmp_path)) == list(range(1, 51))
    assert counts.rows == 50
    assert narrow.taken
    assert wide.taken


def test_a_second_run_does_the_rest(tmp_path: Path):
    run(tmp_path, [Group()], [line(i) for i in (1, 2, 3)])
    status, counts = run(tmp_path, [Group()], [line(i) for i in range(1, 8)])
    assert (status, counts.rows, counts.skipped) == (0, 4, 3)
    assert sorted(done(tmp_path)) == list(range(1, 8))


def test_another_input_is_refused(tmp_path: Path):
    run(tmp_path, [Group()], [line(1)])
    with pytest.raises(UserError, match="the same input"):
        run(tmp_path, [Group()], [line(1, "other")])


def test_a_second_row_of_an_id_is_an_error_also_after_a_restart(tmp_path: Path):
    rows = [line(1, "r1"), line(2, "r1"), line(3)]
    _, counts = run(tmp_path, [Group()], rows)
    assert counts.errors == 1
    status, counts = run(tmp_path, [Group()], [*rows, line(4, "r3")])
    assert (status, counts.skipped, counts.errors) == (0, 3, 1)
    assert sorted(done(tmp_path)) == [1, 2, 3, 4]


def test_lines_of_a_failed_group_go_to_the_others(tmp_path: Path):
    good, bad = Group(2), Group(4, fails=6)
    status, _ = run(tmp_path, [bad, good], [line(i) for i in range(1, 31)])
    assert status == PARTIAL_STATUS
    assert sorted(done(tmp_path)) == list(range(1, 31))
    assert len(bad.taken) == 6


def test_no_group_left_is_told(tmp_path: Path):
    with pytest.raises(UserError, match="out of memory; what was finished stays, start again"):
        run(tmp_path, [Group(fails=5)], [line(i) for i in range(1, 9)])
    assert done(tmp_path) == [1, 2]


def test_a_signal_stops_after_the_step(tmp_path: Path):
    stop = StopRequest()

    def after_five(counts):
        stop.name = "SIGUSR1" if counts.rows >= 5 else ""

    status, counts = run(tmp_path, [Group()], [line(i) for i in range(1, 100)], stop=stop, on_progress=after_five)
    assert (status, counts.rows) == (REQUEUE_STATUS, 5)
    assert len(done(tmp_path)) == 5


def test_nothing_begins_that_cannot_end(tmp_path: Path):
    now = [0.0]
    deadline = Deadline(100.0, clock=lambda: now[0])
    deadline.note(30.0)

    def tick(counts):
        now[0] += 10

    group = Group(1)
    status, counts = run(tmp_path, [group], [line(i) for i in range(1, 100)], deadline, on_progress=tick)
    assert status == REQUEUE_STATUS
    assert counts.rows == len(group.taken) == 7
    assert deadline.left > 0


def test_the_deadline_is_the_sooner_of_option_and_job():
    import time

    job = {"SLURM_JOB_END_TIME": str(int(time.time()) + 1000)}
    assert 965 < Deadline.of_run(None, job).left <= 970
    assert 55 < Deadline.of_run("60", job).left <= 60
    assert Deadline.of_run(None, {}).left == float("inf")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1:30", 90), ("01:00:00", 3600), ("2-01:00:00", 176400), ("0.5", 0.5)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "-5", "1:2:3:4", "1-"])
def test_no_durations(text):
    with pytest.raises(UserError, match="--time-limit"):
        parse_duration(text)
