"""`batch`: a file of requests to a file of answers, each exactly once, through kills and restarts."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mpillama import __version__
from mpillama.batch.journal import Journal, last_options, options_digest, record
from mpillama.batch.results import Provenance, Result, RowAdapter
from mpillama.batch.rows import Line, read_lines
from mpillama.batch.run import REQUEUE_STATUS, BatchRun, Counts
from mpillama.cli.display import STANDARD_ERROR, console, watched
from mpillama.cli.engines import ReplicaWorld, prompter, replicated
from mpillama.cli.options import BatchOptions, recorded_sampling
from mpillama.cli.running import loaded, running
from mpillama.cli.values import refuse_unwritable
from mpillama.engine.engine import Engine
from mpillama.errors import UserError
from mpillama.job.deadline import Deadline, StopRequest, ignore_stop_signals
from mpillama.job.start import World
from mpillama.loading.draft import needs_of_draft, open_draft_file
from mpillama.loading.load import DEFAULT_BATCH_CONTEXT, open_shared_executor
from mpillama.loading.model_file import model_path, open_model
from mpillama.loading.preflight import Needs, smallest_group
from mpillama.loading.session import Session
from mpillama.replicas.replica import follow_router
from mpillama.replicas.runner import EngineRunner

METRICS_SECONDS = 10.0
SHOW_SECONDS = 0.5


class Reporter:
    """Reports the counts from time to time; it is called after each step."""

    def __init__(self, engine: Engine, input_bytes: int, metrics: str | None, show: Callable[[str], None]):
        self.engine = engine
        self.input_bytes = input_bytes
        self.metrics = metrics
        self.show = show
        self._next_show = self._next_metrics = 0.0

    def __call__(self, counts: Counts) -> None:
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
        """What a machine may want to know; the engine's are those of rank 0's replica."""
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
            "cache_blocks": engine.pool.size,
            "prefix_cache_hit_share": totals.cached_tokens / max(1, totals.prompt_tokens),
            "cache_blocks_saved": engine.disk.counts.saved if engine.disk else 0,
            "cache_blocks_loaded": engine.disk.counts.loaded if engine.disk else 0,
            "late_steps": engine.pace.late if engine.pace else 0,
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
    """A status line on a terminal, nothing elsewhere."""
    if not watched(quiet):
        yield lambda text: None
        return
    from rich.status import Status

    with Status("", console=console(STANDARD_ERROR)) as status:
        yield status.update


ANSWER_OPTIONS = ("weights", "kv_type", "sync", "layers")
"""What an answer depends on besides row, model and sampling."""


def batch(options: BatchOptions, world: World) -> int:
    """Run the command; returns the exit status: 85 if it stopped before the end, 3 if a replica failed."""
    world.comm.on_root_only(lambda: check(options))
    stop, deadline = StopRequest(), Deadline.of_run(options.time_limit)
    stop.install() if world.comm.is_root else ignore_stop_signals()
    with (
        running(options, world) as job,
        replicated(job, group_size(options, world)) as replica,
        loaded(job, partial(open_shared_executor, options), replica.world) as session,
    ):
        if world.comm.is_root:
            job.status = BatchJob(options, stop, deadline, replica, world.comm.size).run(session)
        elif session.is_root and replica.mailbox:
            job.status = follow_router(replica.mailbox, make_runner(session, options))
    return job.status


def group_size(options: BatchOptions, world: World) -> int:
    """Ranks that share a model: as asked, or as few as the hosts have room for."""
    if options.tensor_parallel is not None:
        return options.tensor_parallel
    if world.comm.size == 1:
        return 1
    open_file = lambda: open_model(model_path(options.model), options.weights, options.tokenizer)  # noqa: E731
    file = world.comm.on_root(lambda: world.comm.busy(open_file, "reading the model's table"))
    context = options.max_seq_len or min(file.config.max_position_embeddings, DEFAULT_BATCH_CONTEXT)
    draft = open_draft_file(options, world)
    beside = lambda ranks: needs_of_draft(draft, options, world, ranks) if draft else Needs()  # noqa: E731
    return smallest_group(file, world, options, context, beside)


def check(options: BatchOptions) -> None:
    """Raise UserError for what is wrong with the options."""
    refuse_unwritable("OUTPUT", options.output)
    refuse_unwritable("--metrics", options.metrics)
    if not Path(options.input).is_file():
        raise UserError(f"{options.input}: there is no such file: give a file of JSON lines.")
    if Path(options.output).exists() and Path(options.input).samefile(options.output):
        raise UserError(f"{options.output}: is the input too: name another output file.")


class BatchJob:
    """What rank 0 does once the model is loaded."""

    def __init__(self, options: BatchOptions, stop: StopRequest, deadline: Deadline, replica: ReplicaWorld, ranks: int):
        self.options = options
        self.stop = stop
        self.deadline = deadline
        self.replica = replica
        self.ranks = ranks

    def run(self, session: Session) -> int:
        """Answer the rows; returns the exit status."""
        used = answer_options(self.options, session)
        journal = Journal(self.options.output, make_provenance(session, used), used, last_options(self.options.output))
        try:
            record(self.options.output, "start", {**self._facts(session), "options": used})
            status, counts = self._answer(session, journal)
            record(self.options.output, "end", {"status": status, "rows": counts.rows, "errors": counts.errors})
        finally:
            journal.close()
        return status

    def _answer(self, session: Session, journal: Journal) -> tuple[int, Counts]:
        options, runner = self.options, make_runner(session, self.options)
        router = self.replica.router(runner, "what was finished stays, start again.")
        with shown(options.quiet or options.json) as show:
            size = Path(options.input).stat().st_size
            reporter = Reporter(runner.engine, size, options.metrics, show)
            batch_run = BatchRun(router, read_lines(options.input), journal, self.deadline, self.stop, reporter)
            try:
                status = batch_run.run()
            finally:
                router.close()
        reporter.write_metrics(batch_run.counts)
        self._tell_end(reporter, batch_run.counts, status, router.failures)
        return status, batch_run.counts

    def _facts(self, session: Session) -> dict[str, Any]:
        """What stays the same during a run."""
        return {
            "mpillama": __version__,
            "model": session.path,
            "model_sha256": session.loaded.file.metadata_sha256,
            "ranks": self.ranks,
            "tensor_parallel": session.world.comm.size,
            "threads": session.target.threads,
            "isa": session.target.isa.name,
            "hosts": session.hosts,
            "sequences": self.options.sequences,
            "cache_tokens": session.executor.blocks * 64,
        }

    def _tell_end(self, reporter: Reporter, counts: Counts, status: int, failures: list[str]) -> None:
        """Say how the run ended, and which replicas failed."""
        for failure in failures:
            sys.stderr.write(f"mpillama: warning: a replica failed, others answered its rows: {failure}\n")
        if self.options.json:
            sys.stdout.write(json.dumps({"status": status, **reporter.figures(counts)}) + "\n")
        elif not self.options.quiet:
            why = f"stopped by {self.stop.name}" if self.stop.name else "stopped in time"
            end = "finished" if status != REQUEUE_STATUS else f"{why}, start the same command again to go on"
            sys.stderr.write(f"mpillama: {end}: {reporter.line(counts)}\n")


def make_runner(session: Session, options: BatchOptions) -> EngineRunner[Line, Result]:
    engine = session.engine
    provenance = make_provenance(session, answer_options(options, session))
    return EngineRunner(
        engine, RowAdapter(prompter(session, options), Path(session.path).name, options.sampling.seed or 0, provenance)
    )


def make_provenance(session: Session, used: dict[str, Any]) -> Provenance:
    """What each result says of its origin."""
    return Provenance(session.loaded.file.metadata_sha256, options_digest(used), __version__)


def answer_options(options: BatchOptions, session: Session) -> dict[str, Any]:
    """The options that an answer depends on, as they are used."""
    others = {name: getattr(options, name) for name in ANSWER_OPTIONS}
    return {**recorded_sampling(options.sampling), **others, "max_seq_len": session.executor.max_seq_len}
