"""`batch`: a file of requests to a file of answers, each exactly once, through kills and restarts."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillama import __version__
from mpillama.comm.start import World, start_mpi
from mpillama.errors import UserError
from mpillama.options import BatchOptions
from mpillama.tools.batch_progress import Reporter, shown
from mpillama.tools.engines import check_engine_options, model_name, opener, prompter, run_in_groups
from mpillama.tools.output_file import refuse_unwritable
from mpillama.tools.running import (
    Run,
    check_observed,
    choose_target,
    observed,
    run_in_world,
    sampling_options,
)

if TYPE_CHECKING:
    from mpillama.batch.groups import RemoteGroup
    from mpillama.batch.journal import Journal
    from mpillama.batch.results import Provenance
    from mpillama.batch.supervisor import Counts, Group
    from mpillama.batch.worker import Worker
    from mpillama.comm.groups import Post
    from mpillama.comm.watchdog import Watch
    from mpillama.engine.deadline import Deadline, StopRequest

ANSWER_OPTIONS = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "stop", "weights", "kv_type", "layers",
)  # fmt: skip
"""What an answer depends on besides row and model."""


def batch(options: BatchOptions) -> int:
    """Run the command; returns the exit status: 85 if it stopped before the end, 3 if a group of ranks failed."""
    from mpillama.comm.launcher import launched_rank
    from mpillama.engine.deadline import Deadline, StopRequest, ignore_stop_signals

    _check(options)
    stop = StopRequest()
    stop.install() if launched_rank() == 0 else ignore_stop_signals()
    job = BatchJob(options, stop, Deadline.of_run(options.time_limit))
    quiet = options.quiet or options.json
    with start_mpi(options.threads, timeout=options.timeout) as world, observed(options, world, quiet) as monitor:
        target = choose_target(world)
        size = group_size(options, world)
        if size == world.comm.size:
            return run_in_world(options, quiet, job.run, opener(options), world, target, monitor)
        prepare = lambda post, group: job.gather_groups(post, world.comm.size, size, group)  # noqa: E731
        return run_in_groups(options, quiet, world, size, target, monitor, prepare, job.run, job.lead)


def group_size(options: BatchOptions, world: World) -> int:
    """Ranks that share a model: as asked, or as few as the hosts have room for."""
    from mpillama.engine.loading import DEFAULT_BATCH_CONTEXT, model_path
    from mpillama.engine.model_file import open_model
    from mpillama.engine.preflight import smallest_group

    if options.tensor_parallel is not None:
        return options.tensor_parallel
    if world.comm.size == 1:
        return 1
    open_file = lambda: open_model(model_path(options.model), options.weights, options.tokenizer)  # noqa: E731
    file = world.comm.on_root(lambda: world.comm.busy(open_file, "reading the model's table"))
    context = options.max_seq_len or min(file.config.max_position_embeddings, DEFAULT_BATCH_CONTEXT)
    return smallest_group(file, world, context, options.kv_type, options.prefill_chunk)


def _check(options: BatchOptions) -> None:
    """Raise UserError for what is wrong with the options, before MPI starts."""
    sampling_options(options)
    check_engine_options(options)
    check_observed(options)
    refuse_unwritable("OUTPUT", options.output)
    refuse_unwritable("--metrics", options.metrics)
    if not Path(options.input).is_file():
        raise UserError(f"{options.input}: there is no such file: give a file of JSON lines.")
    if Path(options.output).exists() and Path(options.input).samefile(options.output):
        raise UserError(f"{options.output}: is the input too: name another output file.")


class BatchJob:
    """What rank 0 does once the model is loaded; `groups` are those of other ranks."""

    def __init__(self, options: BatchOptions, stop: "StopRequest", deadline: "Deadline"):
        self.options = options
        self.stop = stop
        self.deadline = deadline
        self.groups: list[RemoteGroup] = []
        self.own_watch: Watch | None = None
        self.ranks = 1
        self.post: Post | None = None

    def gather_groups(self, post: "Post", ranks: int, size: int, own: World) -> None:
        """Take the other groups of the job in; this process's own may then retire, too."""
        from mpillama.batch.groups import RemoteGroup

        self.post = post
        self.groups = [RemoteGroup(post, range(first, first + size)) for first in range(size, ranks, size)]
        self.own_watch = own.comm.watch
        self.ranks = ranks

    def run(self, run: Run) -> int:
        """Answer the rows; returns the exit status."""
        from mpillama.comm.failure import USER_ERROR_STATUS

        status = USER_ERROR_STATUS
        try:
            status = self._run(run)
        finally:
            self._end(status)
        return status

    def _end(self, status: int) -> None:
        """Let all ranks of several groups go: leaders, and those whose group has failed, maybe unheard of as yet."""
        from mpillama.comm.retirement import End

        if self.post:
            for rank in range(1, self.ranks):
                self.post.send(rank, End(status))

    def _run(self, run: Run) -> int:
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
        from mpillama.batch.groups import LocalGroup
        from mpillama.batch.rows import read_lines
        from mpillama.batch.supervisor import Supervisor
        from mpillama.comm.retirement import Office

        options, own = self.options, LocalGroup(self.worker(run), self.own_watch)
        collect = Office(self.post, self.groups).collect if self.post else lambda: None
        with shown(options.quiet or options.json) as show:
            size = Path(options.input).stat().st_size
            reporter = Reporter(own.worker.engine, size, options.metrics, show)
            supervisor = Supervisor(
                [own, *self.groups], read_lines(options.input), journal, self.deadline, self.stop, reporter, collect
            )
            try:
                status = supervisor.run()
            finally:
                own.rest.wake()
                run.executor.abandoned = own.failure is not None
        reporter.write_metrics(supervisor.counts)
        self._close(reporter, supervisor.counts, status, [own, *self.groups])
        return status, supervisor.counts

    def lead(self, run: Run, post: "Post") -> int:
        """What the first rank of another group does; returns the exit status."""
        from mpillama.batch.groups import follow_rank_0

        return follow_rank_0(post, self.worker(run))

    def worker(self, run: Run) -> "Worker":
        """The engine of this process's group."""
        from mpillama.batch.worker import Worker
        from mpillama.engine.engine import Engine

        engine = Engine(run.executor, run.tokenizer, self.options.speculate)
        provenance = self._provenance(run, answer_options(self.options, run))
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
            "ranks": (1 + len(self.groups)) * run.world.comm.size,
            "tensor_parallel": run.world.comm.size,
            "threads": run.target.threads,
            "isa": run.target.isa.name,
            "hosts": run.hosts,
            "sequences": self.options.sequences,
            "cache_tokens": run.executor.blocks * 64,
        }

    def _close(self, reporter: Reporter, counts: "Counts", status: int, groups: "list[Group]") -> None:
        """Say how the run ended, and which groups did not see the end."""
        for failure in filter(None, [group.failure for group in groups]):
            sys.stderr.write(f"mpillama: warning: a group of ranks retired, others did its rows: {failure}\n")
        if self.options.json:
            sys.stdout.write(json.dumps({"status": status, **reporter.figures(counts)}) + "\n")
        elif not self.options.quiet:
            why = f"stopped by {self.stop.name}" if self.stop.name else "stopped in time"
            end = "finished" if status != 85 else f"{why}, start the same command again to go on"
            sys.stderr.write(f"mpillama: {end}: {reporter.line(counts)}\n")


def answer_options(options: BatchOptions, run: Run) -> dict[str, Any]:
    """The options that an answer depends on, as they are used."""
    return {**{name: getattr(options, name) for name in ANSWER_OPTIONS}, "max_seq_len": run.executor.max_seq_len}
