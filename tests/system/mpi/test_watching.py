"""What a user sees of a long run: progress of all ranks, logs, the monitor, an end before memory ends."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from tests.system.mpi.launch import END_SECONDS, PROGRAM, SCRIPTS, TIMEOUT, run, started
from tests.system.mpi.terminal import on_terminal

pytestmark = pytest.mark.timeout(TIMEOUT + 60)

SHORT = ("--temperature", "0", "--max-tokens", "5", "--json")
LONG = ("--max-tokens", "4000", "--temperature", "0", "--logit-bias", "1=-1000", "--quiet")
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3} (\d+)/(\d+)@\S+ (DEBUG|INFO|WARNING|ERROR|CRITICAL) .+")
SABOTAGE = SCRIPTS / "reading_faults.py"


def log(folder: Path, rank: int, ranks: int) -> list[str]:
    """The lines of a rank's log, each of which has its form."""
    lines = (folder / f"mpillama-{rank}-of-{ranks}.log").read_text().splitlines()
    for line in lines:
        found = LINE.fullmatch(line)
        assert found, line
        assert (int(found[1]), int(found[2])) == (rank, ranks)
    return lines


def answer(result) -> object:
    assert result.status == 0, result.stderr
    return json.loads(result.stdout)["logits_sha256"]


# -- loading ----------------------------------------------------------------------------------------------------------


def test_the_bar_shows_the_slowest_rank(toy: Path, tmp_path: Path) -> None:
    arguments = (SABOTAGE, "slow_read", "1", tmp_path, "--model", toy, "--max-tokens", "1", "--threads", "1")
    with on_terminal(2, *arguments) as terminal:
        terminal.expect(f"slowest: rank 1 on {os.uname().nodename}, ")


@pytest.mark.parametrize(("ranks", "culprit"), [(2, 0), (3, 1)])
def test_a_rank_that_cannot_read_ends_the_reading_of_all(ranks: int, culprit: int, toy: Path, tmp_path: Path) -> None:
    arguments = (SABOTAGE, "fail_on_culprit", "all", tmp_path, "--model", toy, *LONG)
    result = run(ranks, *arguments, env={"CULPRIT": str(culprit)})
    assert time.time() - float((tmp_path / "failed").read_text()) < END_SECONDS + 2  # a read that has begun lasts 2 s
    assert result.status == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"mpillama: rank {culprit} of {ranks} on {os.uname().nodename}: {toy}: tensor ")
    assert "cannot be read at byte" in line


@pytest.mark.parametrize(("ranks", "culprit"), [(1, 0), (2, 1)])
def test_errors_that_pass_are_warnings(ranks: int, culprit: int, toy: Path, tmp_path: Path) -> None:
    usual = answer(run(ranks, *PROGRAM, "--model", toy, *SHORT))
    arguments = (SABOTAGE, "flaky", str(culprit), tmp_path, "--model", toy)
    assert answer(run(ranks, *arguments, *SHORT, "--log-dir", tmp_path)) == usual
    warnings = [line for line in log(tmp_path, culprit, ranks) if " WARNING " in line]
    assert len(warnings) == 2
    assert all("Input/output error" in line and "try 2 of 6" in line for line in warnings)
    shown = run(ranks, *arguments, "--max-tokens", "1").stderr
    assert shown.count(f"mpillama: warning: rank {culprit} of {ranks} on ") == 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_file_that_is_written_while_it_is_read(ranks: int, toy: Path, tmp_path: Path) -> None:
    copy = shutil.copy(toy, tmp_path / "copy.h5")
    result = run(ranks, SABOTAGE, "rewrite", "0", tmp_path, "--model", copy, *SHORT)
    assert (result.status, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert f"{copy}: changed while it was read" in result.stderr


# -- what takes long -------------------------------------------------------------------------------------------------


def test_a_terminal_tells_what_takes_long(toy: Path, tmp_path: Path) -> None:
    """Before and between the steps: nothing is silent for more than a few seconds."""
    slow = (SCRIPTS / "sabotage.py", "none", "table", "0", tmp_path, "--model", toy)
    with on_terminal(2, *slow, "--max-tokens", "1") as terminal:
        terminal.expect("reading the model's table")
        terminal.expect("0:00:0")
    prompt = ("--prompt-token-ids", ",".join(map(str, range(5, 255))), "--prefill-chunk", "2", "--max-tokens", "1")
    with on_terminal(2, SABOTAGE, "slow", "all", tmp_path, "--model", toy, *prompt) as terminal:
        terminal.expect("reading the prompt")
        terminal.expect("of 250 tokens")


def test_no_line_is_drawn_without_a_terminal(toy: Path, tmp_path: Path) -> None:
    slow = (SCRIPTS / "sabotage.py", "none", "table", "0", tmp_path, "--model", toy)
    result = run(None, *slow, "--max-tokens", "1", "--temperature", "0")
    assert result.status == 0
    assert "\x1b" not in result.stderr
    assert "tok/s" in result.stderr.splitlines()[-1]


# -- logs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_rank_writes_a_log(ranks: int, toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "logs"
    result = run(ranks, *PROGRAM, "--model", toy, *SHORT, "--log-dir", folder, "--monitor", "0.1")
    usual = answer(run(ranks, *PROGRAM, "--model", toy, *SHORT))
    assert answer(result) == usual
    assert result.stderr == ""
    assert len(list(folder.iterdir())) == ranks
    for rank in range(ranks):
        text = "\n".join(log(folder, rank, ranks))
        for part in ("mpillama 0", "numpy", "arguments: --model", " tensors after", "GB are available", "read ", "GB/s",
                     "RSS", "minor", "tokens/s", "status 0 after", "done after"):  # fmt: skip
            assert part in text, part
        assert "DEBUG" not in text


@pytest.mark.parametrize("level", ["debug", "warning"])
def test_levels(level: str, toy: Path, tmp_path: Path) -> None:
    run(None, *PROGRAM, "--model", toy, *SHORT, "--log-dir", tmp_path, "--log-level", level)
    text = "\n".join(log(tmp_path, 0, 1))
    assert ("units 0 to" in text) == ("INFO" in text) == (level == "debug")


def test_a_failure_is_in_the_log_and_a_second_run_goes_on_in_it(toy: Path, tmp_path: Path) -> None:
    arguments = (SABOTAGE, "input_error", "1", tmp_path, "--model", toy, *SHORT, "--log-dir", tmp_path)
    assert run(2, *arguments).status == 2
    for rank in (0, 1):
        assert f"ERROR rank 1 of 2 on {os.uname().nodename}: " in log(tmp_path, rank, 2)[-1]
    before = len(log(tmp_path, 0, 2))
    assert run(2, *PROGRAM, "--model", toy, *SHORT, "--log-dir", tmp_path).status == 0
    assert len(log(tmp_path, 0, 2)) > before


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_folder_that_cannot_be_written(ranks: int | None, toy: Path) -> None:
    result = run(ranks, *PROGRAM, "--model", toy, "--log-dir", f"{toy}/logs")
    assert (result.status, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"mpillama: --log-dir {toy}/logs")


def test_a_full_disk_ends_the_log_and_not_the_run(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "mpillama-1-of-2.log").symlink_to("/dev/full")
    usual = run(2, *PROGRAM, "--model", toy, *SHORT)
    result = run(2, *PROGRAM, "--model", toy, *SHORT, "--log-dir", tmp_path, "--monitor", "0.1")
    assert answer(result) == answer(usual)
    (line,) = result.stderr.splitlines()
    assert line.startswith("mpillama: warning: rank 1 of 2 on ")
    assert "no space left on device" in line
    assert "done after" in log(tmp_path, 0, 2)[-1]


def test_a_log_that_may_not_grow_ends_in_the_midst(toy: Path, tmp_path: Path) -> None:
    """A bound on file sizes, as a quota: a part of the log is written, the run goes on."""
    options = ("--model", toy, *SHORT, "--log-dir", tmp_path, "--log-level", "debug")
    result = run(None, SCRIPTS / "limited.py", "1200", *options)
    assert result.status == 0, result.stderr
    assert "token_ids" in result.stdout
    (line,) = result.stderr.splitlines()
    assert "file too large" in line
    assert (tmp_path / "mpillama-0-of-1.log").stat().st_size == 1200


# -- the monitor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [None, 2])
def test_without_logs_the_monitor_speaks_on_standard_error(ranks: int | None, toy: Path) -> None:
    result = run(ranks, *PROGRAM, "--model", toy, *SHORT, "--monitor", "0.1")
    assert result.status == 0
    for rank in range(ranks or 1):
        lines = [s for s in result.stderr.splitlines() if s.startswith(f"mpillama: rank {rank} of {ranks or 1} on ")]
        assert lines
        assert all("RSS" in s and "available" in s and "page faults" in s and "tokens/s" in s for s in lines)


@pytest.mark.parametrize("ranks", [None, 1, 3])
def test_a_host_below_the_floor_ends_the_job(ranks: int | None, toy: Path) -> None:
    result = run(ranks, *PROGRAM, "--model", toy, *LONG, "--memory-floor", "1000TB")
    assert result.status not in (0, None)
    told = [line for line in result.stderr.splitlines() if "--memory-floor" in line]
    assert len(told) == 1, result.stderr
    assert re.match(r"mpillama: rank 0 of \d on \S+: the host has \d+\.\d+ GB of memory left", told[0])
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("culprit", [0, 1])
def test_memory_that_ends_in_mid_generation(culprit: int, toy: Path, tmp_path: Path) -> None:
    """The other rank waits in a reduction or a broadcast meanwhile."""
    arguments = (SABOTAGE, "low_memory", str(culprit), tmp_path, "--model", toy, *LONG, "--memory-floor", "1MB")
    with started(2, *arguments, "--log-dir", tmp_path) as launch:
        assert len(launch.read(10)) == 10, launch.stderr()
        (tmp_path / "low").touch()
        assert launch.gone_within(END_SECONDS + 3), launch.stderr()  # the host's first rank would have spoken before
        assert launch.process.returncode != 0
        assert f"mpillama: rank {culprit} of 2 on" in launch.stderr()
        assert "0.00 GB of memory left" in launch.stderr()
        assert "CRITICAL the host has" in log(tmp_path, culprit, 2)[-1]
    assert not list(tmp_path.glob("status-*"))
