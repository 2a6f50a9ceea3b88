"""What `batch` tells while it runs: a line on a terminal, JSON lines in a file."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpillama.batch.run import Counts
from mpillama.cli.display import terminal_console, watched
from mpillama.engine.engine import Engine
from mpillama.errors import UserError

METRICS_SECONDS = 10.0
SHOW_SECONDS = 0.5


class Reporter:
    """Takes the counts after each step and tells of them from time to time."""

    def __init__(self, engine: Engine, input_bytes: int, metrics: str | None, show: Callable[[str], None]):
        self.engine = engine
        self.input_bytes = input_bytes
        self.metrics = metrics
        self.show = show
        self._next_show = self._next_metrics = 0.0

    def __call__(self, counts: Counts) -> None:
        """A step was done."""
        now = time.monotonic()
        if now >= self._next_show:
            self._next_show = now + SHOW_SECONDS
            self.show(self.line(counts))
        if self.metrics and now >= self._next_metrics:
            self._next_metrics = now + METRICS_SECONDS
            self.write_metrics(counts)

    def write_metrics(self, counts: Counts) -> None:
        """Append the figures of now; UserError if they cannot be written."""
        if self.metrics is None:
            return
        try:
            with Path(self.metrics).open("a") as file:
                file.write(json.dumps({"time": time.time(), **self.figures(counts)}) + "\n")
        except OSError as error:
            raise UserError(f"--metrics {self.metrics}: cannot be written ({error.strerror}).") from error

    def figures(self, counts: Counts) -> dict[str, Any]:
        """What a machine may want to know; the engine's are those of rank 0's group."""
        seconds, engine = time.monotonic() - counts.began, self.engine
        totals = engine.counts
        return {
            "seconds": seconds,
            "rows": counts.rows,
            "errors": counts.errors,
            "skipped": counts.skipped,
            "prompt_tokens": counts.prompt_tokens,
            "answer_tokens": counts.answer_tokens,
            "prompt_tokens_per_second": counts.prompt_tokens / max(seconds, 1e-9),
            "answer_tokens_per_second": counts.answer_tokens / max(seconds, 1e-9),
            "input_share": counts.read_bytes / max(1, self.input_bytes),
            "eta_seconds": self._eta(counts, seconds),
            "running": len(engine.scheduler.running),
            "waiting": len(engine.scheduler.waiting),
            "cache_blocks_used": engine.pool.used,
            "cache_blocks": engine.pool.blocks,
            "prefix_cache_hit_share": totals.cached_tokens / max(1, totals.prompt_tokens),
            "preemptions": engine.scheduler.preemptions,
            "steps": totals.steps,
            "step_seconds": totals.step_seconds,
            "model_seconds": totals.model_seconds,
            "drafts_proposed": engine.drafter.proposed if engine.drafter else 0,
            "drafts_accepted": engine.drafter.accepted if engine.drafter else 0,
        }

    def _eta(self, counts: Counts, seconds: float) -> float | None:
        """Seconds that the rest of the input will take at the speed so far; rows of earlier runs took none."""
        share = counts.rows / (counts.rows + counts.skipped) if counts.rows else 0.0
        done = counts.read_bytes * share
        return seconds * (self.input_bytes - counts.read_bytes) / done if done else None

    def line(self, counts: Counts) -> str:
        """The same for people."""
        f = self.figures(counts)
        eta = "" if not f["eta_seconds"] else f", {f['eta_seconds']:.0f} s left"
        return (
            f"{f['rows']} rows ({f['errors']} errors, {f['skipped']} done before), {100 * f['input_share']:.0f} % of "
            f"the input, {f['prompt_tokens_per_second']:.0f} tok/s in, {f['answer_tokens_per_second']:.0f} tok/s out, "
            f"prefix cache {100 * f['prefix_cache_hit_share']:.0f} %{eta}"
        )


@contextmanager
def shown(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line that is written over on a terminal; nothing where nobody watches."""
    if not watched(quiet):
        yield lambda text: None
        return
    from rich.status import Status

    with Status("", console=terminal_console()) as status:
        yield status.update
