"""`batch`: a file of requests to a file of answers, each exactly once, through kills and restarts."""

import json
import sys
from pathlib import Path
from typing import Any

from mpillama import __version__
from mpillama.batch.journal import Journal, last_options, options_digest, record
from mpillama.batch.results import Provenance, Result, RowAdapter
from mpillama.batch.rows import Line, read_lines
from mpillama.batch.run import REQUEUE_STATUS, BatchRun, Counts
from mpillama.cli.batch_progress import Reporter, shown
from mpillama.cli.engines import ReplicaWorld, check_engine_options, model_name, opener, prompter, replicated
from mpillama.cli.options import BatchOptions, recorded_sampling
from mpillama.cli.running import Run, loaded, running
from mpillama.cli.values import refuse_unwritable
from mpillama.engine.engine import Engine
from mpillama.errors import UserError
from mpillama.job.deadline import Deadline, StopRequest, ignore_stop_signals
from mpillama.job.start import World
from mpillama.loading.load import DEFAULT_BATCH_CONTEXT
from mpillama.loading.model_file import model_path, open_model
from mpillama.loading.preflight import smallest_group
from mpillama.replicas.replica import follow_router
from mpillama.replicas.runner import EngineRunner

ANSWER_OPTIONS = ("weights", "kv_type", "layers")
"""What an answer depends on besides row, model and sampling."""


def batch(options: BatchOptions, world: World) -> int:
    """Run the command; returns the exit status: 85 if it stopped before the end, 3 if a group of ranks failed."""
    world.comm.on_root_only(lambda: check(options))
    stop, deadline = StopRequest(), Deadline.of_run(options.time_limit)
    stop.install() if world.comm.is_root else ignore_stop_signals()
    with (
        running(options, world) as job,
        replicated(job, group_size(options, world)) as replica,
        loaded(job, opener(options), replica.world) as run,
    ):
        if world.comm.is_root:
            job.status = BatchJob(options, stop, deadline, replica, world.comm.size).run(run)
        elif run.is_root and replica.mailbox:
            job.status = follow_router(replica.mailbox, make_runner(run, options))
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
    return smallest_group(file, world, context, options.kv_type, options.prefill_chunk)


def check(options: BatchOptions) -> None:
    """Raise UserError for what is wrong with the options."""
    check_engine_options(options)
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

    def run(self, run: Run) -> int:
        """Answer the rows; returns the exit status."""
        used = answer_options(self.options, run)
        journal = Journal(self.options.output, make_provenance(run, used), used, last_options(self.options.output))
        try:
            record(self.options.output, "start", {**self._facts(run), "options": used})
            status, counts = self._answer(run, journal)
            record(self.options.output, "end", {"status": status, "rows": counts.rows, "errors": counts.errors})
        finally:
            journal.close()
        return status

    def _answer(self, run: Run, journal: Journal) -> tuple[int, Counts]:
        options, runner = self.options, make_runner(run, self.options)
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

    def _facts(self, run: Run) -> dict[str, Any]:
        """What stays the same during a run."""
        return {
            "mpillama": __version__,
            "model": run.loaded.file.path,
            "model_sha256": run.loaded.file.metadata_sha256,
            "ranks": self.ranks,
            "tensor_parallel": run.world.comm.size,
            "threads": run.target.threads,
            "isa": run.target.isa.name,
            "hosts": run.hosts,
            "sequences": self.options.sequences,
            "cache_tokens": run.executor.blocks * 64,
        }

    def _tell_end(self, reporter: Reporter, counts: Counts, status: int, failures: list[str]) -> None:
        """Say how the run ended, and which groups did not see the end."""
        for failure in failures:
            sys.stderr.write(f"mpillama: warning: a group of ranks retired, others did its rows: {failure}\n")
        if self.options.json:
            sys.stdout.write(json.dumps({"status": status, **reporter.figures(counts)}) + "\n")
        elif not self.options.quiet:
            why = f"stopped by {self.stop.name}" if self.stop.name else "stopped in time"
            end = "finished" if status != REQUEUE_STATUS else f"{why}, start the same command again to go on"
            sys.stderr.write(f"mpillama: {end}: {reporter.line(counts)}\n")


def make_runner(run: Run, options: BatchOptions) -> EngineRunner[Line, Result]:
    """The engine of this process's replica."""
    engine = Engine(run.executor, run.tokenizer, options.speculate)
    provenance = make_provenance(run, answer_options(options, run))
    return EngineRunner(
        engine, RowAdapter(prompter(run, options), model_name(run), options.sampling.seed or 0, provenance)
    )


def make_provenance(run: Run, used: dict[str, Any]) -> Provenance:
    """What each result says of its origin."""
    return Provenance(run.loaded.file.metadata_sha256, options_digest(used), __version__)


def answer_options(options: BatchOptions, run: Run) -> dict[str, Any]:
    """The options that an answer depends on, as they are used."""
    others = {name: getattr(options, name) for name in ANSWER_OPTIONS}
    return {**recorded_sampling(options.sampling), **others, "max_seq_len": run.executor.max_seq_len}
