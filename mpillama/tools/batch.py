"""`batch`: a file of requests to a file of answers, each exactly once, through kills and restarts."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillama import __version__
from mpillama.errors import UserError
from mpillama.options import BatchOptions, EngineOptions
from mpillama.tools.batch_progress import Reporter, shown
from mpillama.tools.output_file import refuse_unwritable
from mpillama.tools.running import Run, check_speculation, run_on_all_ranks, sampling_options

if TYPE_CHECKING:
    from mpillama.batch.journal import Journal
    from mpillama.batch.results import Provenance
    from mpillama.batch.supervisor import Counts
    from mpillama.engine.executor import Executor
    from mpillama.engine.loading import LoadedModel

ANSWER_OPTIONS = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "stop", "weights", "kv_type", "layers",
)  # fmt: skip
"""What an answer depends on besides row and model."""


def batch(options: BatchOptions) -> int:
    """Run the command; returns the exit status: 85 if it stopped before the end, 3 if a group of ranks failed."""
    from mpillama.batch.deadline import Deadline, StopRequest, ignore_stop_signals
    from mpillama.comm.launcher import launched_rank

    _check(options)
    stop = StopRequest()
    stop.install() if launched_rank() == 0 else ignore_stop_signals()
    deadline = Deadline.of_run(options.time_limit)
    job = BatchJob(options, stop, deadline)
    return run_on_all_ranks(options, options.quiet or options.json, job.run, opener(options))


def opener(options: EngineOptions) -> "Callable[[LoadedModel], Executor]":
    """What makes the executor of many sequences."""

    def open_(loaded: "LoadedModel") -> "Executor":
        from mpillama.engine.loading import open_shared_executor

        return open_shared_executor(options, loaded, options.sequences, options.speculate, options.cache_tokens)

    return open_


def _check(options: BatchOptions) -> None:
    """Raise UserError for what is wrong with the options, before MPI starts."""
    sampling_options(options)
    check_engine_options(options)
    refuse_unwritable("OUTPUT", options.output)
    refuse_unwritable("--metrics", options.metrics)
    if not Path(options.input).is_file():
        raise UserError(f"{options.input}: there is no such file: give a file of JSON lines.")
    if Path(options.output).exists() and Path(options.input).samefile(options.output):
        raise UserError(f"{options.output}: is the input too: name another output file.")


def check_engine_options(options: EngineOptions) -> None:
    """UserError for numbers out of range."""
    if options.sequences < 1:
        raise UserError(f"--sequences is {options.sequences}: give at least 1.")
    check_speculation(options)
    if options.cache_tokens is not None and options.cache_tokens < 1:
        raise UserError(f"--cache-tokens is {options.cache_tokens}: give at least 1.")


class BatchJob:
    """What rank 0 does once the model is loaded."""

    def __init__(self, options: BatchOptions, stop: Any, deadline: Any):
        self.options = options
        self.stop = stop
        self.deadline = deadline

    def run(self, run: Run) -> int:
        """Answer the rows; returns the exit status."""
        from mpillama.batch.journal import Journal
        from mpillama.batch.runs import last_options, record

        used = answer_options(self.options, run)
        journal = Journal(self.options.output, self._provenance(run, used), used, last_options(self.options.output))
        try:
            record(self.options.output, "start", {**self._facts(run), "options": used})
            status, counts = self._answer(run, journal)
            record(self.options.output, "end", {"status": status, "rows": counts.rows, "errors": counts.errors})
        finally:
            journal.close()
        return status

    def _answer(self, run: Run, journal: "Journal") -> tuple[int, "Counts"]:
        from mpillama.batch.rows import read_lines
        from mpillama.batch.supervisor import Supervisor
        from mpillama.batch.worker import LocalGroup

        options = self.options
        group = LocalGroup(self._worker(run, journal.provenance))
        with shown(options.quiet or options.json) as show:
            size = Path(options.input).stat().st_size
            reporter = Reporter(group.worker.engine, size, options.metrics, show)
            lines = read_lines(options.input)
            supervisor = Supervisor([group], lines, journal, self.deadline, self.stop, reporter)
            status = supervisor.run()
        reporter.write_metrics(supervisor.counts)
        self._close(reporter, supervisor.counts, status)
        return status, supervisor.counts

    def _worker(self, run: Run, provenance: "Provenance") -> Any:
        from mpillama.batch.worker import Worker
        from mpillama.engine.engine import Engine

        engine = Engine(run.executor, run.tokenizer, self.options.speculate)
        return Worker(engine, prompter(run, self.options), model_name(run), self.options.seed, provenance)

    def _provenance(self, run: Run, used: dict[str, Any]) -> "Provenance":
        from mpillama.batch.results import Provenance
        from mpillama.batch.runs import options_digest

        return Provenance(run.loaded.file.metadata_sha256, options_digest(used), __version__)

    def _facts(self, run: Run) -> dict[str, Any]:
        """What stays the same during a run."""
        return {
            "mpillama": __version__,
            "model": run.loaded.file.path,
            "model_sha256": run.loaded.file.metadata_sha256,
            "ranks": run.world.comm.size,
            "threads": run.target.threads,
            "isa": run.target.isa.name,
            "hosts": run.hosts,
            "sequences": self.options.sequences,
            "cache_tokens": run.executor.blocks * 64,
        }

    def _close(self, reporter: Reporter, counts: "Counts", status: int) -> None:
        """Say how the run ended."""
        if self.options.json:
            sys.stdout.write(json.dumps({"status": status, **reporter.figures(counts)}) + "\n")
        elif not self.options.quiet:
            why = f"stopped by {self.stop.name}" if self.stop.name else "stopped in time"
            end = "finished" if status != 85 else f"{why}, start the same command again to go on"
            sys.stderr.write(f"mpillama: {end}: {reporter.line(counts)}\n")


def answer_options(options: BatchOptions, run: Run) -> dict[str, Any]:
    """The options that an answer depends on, as they are used."""
    return {**{name: getattr(options, name) for name in ANSWER_OPTIONS}, "max_seq_len": run.executor.max_seq_len}


def model_name(run: Run) -> str:
    """The model's name in answers."""
    return Path(run.loaded.file.path).name


def prompter(run: Run, options: Any) -> Any:
    """What turns bodies into requests, with the command's sampling options as defaults."""
    from mpillama.api.prompts import Defaults, Prompter
    from mpillama.engine.answer import Limits

    defaults = Defaults(sampling_options(options), Limits(options.max_tokens, options.stop))
    vocab_size = run.loaded.file.config.vocab_size
    return Prompter(run.tokenizer, run.cached_chat_template, vocab_size, defaults)
