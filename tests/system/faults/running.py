"""Runs that are slow in one phase, so that a fault surely hits it, and what they must say at their end."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.mpi.launch import END_SECONDS, SCRIPTS, TIMEOUT, Launch, Result, run, started

PHASES = ("load", "prefill", "decode")
PROMPT = ",".join(str(5 + i % 50) for i in range(300))
LONG = (
    "--prompt-token-ids", PROMPT, "--prefill-chunk", "2", "--max-tokens", "4000", "--temperature", "0", "--logit-bias",
    "1=-1000", "--quiet",
)  # fmt: skip
"""Minutes of prefill and generation with slow steps; token 1 is EOS."""
SHORT = ("--max-tokens", "2", "--temperature", "0", "--quiet")
HOST = os.uname().nodename


QUICK = [(3, 0, "load"), (3, 1, "prefill"), (3, 2, "decode"), (4, 3, "prefill")]


def everywhere(quick: list[tuple[int, int, str]]) -> pytest.MarkDecorator:
    """Rank 0 and another one of 3 in every phase, some of 2 and 4; what is not in `quick` is marked slow."""
    others = [(3, 2, "load"), (3, 1, "prefill"), (3, 2, "decode"), (2, 1, "load"), (4, 3, "prefill")]
    cases = [*((3, 0, phase) for phase in PHASES), *others]
    params = [pytest.param(*case, marks=[] if case in quick else [pytest.mark.slow]) for case in cases]
    return pytest.mark.parametrize(("ranks", "victim", "phase"), params)


@contextmanager
def in_the_midst(
    ranks: int | None, phase: str, toy: Path, directory: Path, *options: str, command: str = "generate",
    arguments: tuple[str, ...] = LONG, slow: int | None = None,
) -> Iterator[Launch]:  # fmt: skip
    """A run whose ranks have all entered a phase, in which they stay for long; only rank `slow`, if that is given."""
    victim = "none" if slow is None else str(slow)
    script = (SCRIPTS / "sabotage.py", "none", phase, victim, directory, command, "--model", toy)
    with started(ranks, *script, *options, *arguments) as launch:
        wait_for(launch, [directory / f"{phase}-{rank}" for rank in range(ranks or 1)])
        yield launch


def wait_for(launch: Launch, files: list[Path], seconds: float = TIMEOUT) -> None:
    """Wait until all files exist; AssertionError if the run ends before."""
    end = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        assert launch.process.poll() is None, launch.stderr()
        assert time.monotonic() < end, launch.stderr()
        time.sleep(0.02)


def sabotage(
    fault: str, ranks: int, victim: int | str, phase: str, toy: Path, directory: Path, *options: str,
    limit: float = END_SECONDS,
) -> Result:  # fmt: skip
    """Run the program with something wrong on one rank; it must end by itself, within `limit` after the fault."""
    arguments = options or LONG
    result = run(ranks, SCRIPTS / "sabotage.py", fault, phase, str(victim), directory, "--model", toy, *arguments)
    failed = directory / "failed"
    assert not failed.exists() or time.time() - failed.stat().st_mtime < limit
    return result


def ends(launch: Launch, seconds: float = END_SECONDS) -> str:
    """Standard error of a run that ends badly within so many seconds, every process of it."""
    assert launch.gone_within(seconds), f"still there: {launch.processes()}; stderr: {launch.stderr()}"
    assert launch.process.returncode != 0
    return launch.stderr()


def the_sentence(stderr: str) -> str:
    """The one sentence of mpillama on standard error; no traceback."""
    assert "Traceback" not in stderr, stderr
    assert "Exception ignored" not in stderr, stderr
    found = [line for line in stderr.splitlines() if line.startswith("mpillama: ")]
    assert len(found) == 1, stderr
    return found[0]


def the_mistake(result: Result) -> str:
    """As the_sentence, where status 2 and silence otherwise are due."""
    assert (result.status, result.stdout) == (2, ""), result.stderr
    assert result.words.count("\n") == 1, result.stderr
    return the_sentence(result.stderr)


def name(rank: int, ranks: int) -> str:
    """A rank as the sentences name it."""
    return f"rank {rank} of {ranks} on {HOST}"


def statuses(directory: Path) -> dict[int, int]:
    """The exit status of each rank that ended by itself."""
    return {int(f.name.removeprefix("status-")): int(f.read_text()) for f in directory.glob("status-*")}
