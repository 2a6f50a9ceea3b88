"""What `generate` and `chat` share: starting the ranks, texts of a model, statistics of a run."""

import gc
import logging
import select
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from mpillama.cli.display import in_number, in_units, load_progress, stages
from mpillama.cli.logs import OF_RUN, logged
from mpillama.cli.options import RunOptions
from mpillama.cli.values import parse_bytes
from mpillama.comm.failure import USER_ERROR_STATUS, stop_printing
from mpillama.engine.engine import Engine, EngineCounts
from mpillama.engine.executor import Executor
from mpillama.engine.sequence import EngineSequence
from mpillama.errors import UserError
from mpillama.job.monitor import Monitor
from mpillama.job.start import World
from mpillama.kernels.target import Target, prepare, requested_isa
from mpillama.loading.load import LoadedModel, load_model, open_executor
from mpillama.loading.memory import RankUsage
from mpillama.loading.model_file import ModelFile, make_chat_template, make_tokenizer
from mpillama.loading.settings import SpeculationSettings
from mpillama.text.chat_template import ChatTemplate
from mpillama.text.sampler import NonFiniteLogits
from mpillama.text.tokenizer import Tokenizer

OpenExecutor = Callable[[LoadedModel], Executor]
LOG = logging.getLogger(__name__)
BUSY_READER_SECONDS = 1
"""How long rank 0 tries to print before it tells the others that it waits for whoever reads its output."""


@dataclass(frozen=True)
class Run:
    """A loaded model and what rank 0 needs to answer; the other ranks just follow."""

    world: World
    target: Target
    loaded: LoadedModel
    executor: Executor
    tokenizer: Tokenizer
    """On rank 0 only."""
    hosts: list[str]

    @property
    def is_root(self) -> bool:
        """Whether this rank leads those that share the model."""
        return self.world.comm.is_root

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return self.chat_template

    def cached_chat_template(self) -> ChatTemplate:
        """The model's own template, compiled when first asked for."""
        return self._chat_template

    def write(self, text: str) -> None:
        """Print on standard output; a reader that takes its time (a pager, a stopped terminal) is waited for."""
        ready = select.poll()
        ready.register(sys.stdout.fileno(), select.POLLOUT)
        goes_at_once = len(text) < select.PIPE_BUF // 4 and ready.poll(BUSY_READER_SECONDS * 1000)
        with nullcontext() if goes_at_once else self.world.comm.idle():
            sys.stdout.write(text)
            sys.stdout.flush()

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's own template; UserError if it has none."""
        return make_chat_template(self.loaded.file, self.tokenizer)


@dataclass
class Job:
    """A rank of a run: its options, the ranks of the job, its kernels, and the status to exit with."""

    options: RunOptions
    world: World
    target: Target
    monitor: Monitor
    status: int = 0


@contextmanager
def running(options: RunOptions, world: World) -> Iterator[Job]:
    """Log and monitor a run as its options say, tell on rank 0 what takes long, and set up the kernels."""
    check_observed(options)
    quiet = options.is_quiet
    world.comm.watch.display = stages(world.comm.is_root, quiet)
    with (
        logged(world, quiet, options.log_dir, options.log_level),
        Monitor(options.monitor, _memory_floor(options), world.neighbours.is_root) as monitor,
    ):
        yield Job(options, world, choose_target(world), monitor)


def choose_target(world: World) -> Target:
    """This rank's kernels and threads; UserError on all ranks if one cannot have what is asked for."""
    return world.comm.together(lambda: prepare(requested_isa(), world.threads, world.comm.yields))


@contextmanager
def loaded(job: Job, open_: OpenExecutor | None = None, world: World | None = None) -> Iterator[Run]:
    """Load the model on all ranks of the job, or of a part of it: the block is for their rank 0 (`run.is_root`).

    The others follow rank 0 when they leave the block, until it leaves its own, and take over its `job.status`.
    `open_` makes the executor; without it, one for a single sequence.
    """
    world = world or job.world
    comm, quiet = world.comm, job.options.is_quiet or not job.world.comm.is_root
    model = load_model(job.options, world, job.target, load_progress(comm.is_root, quiet))
    job.monitor.watch(model.model)
    executor = comm.together(lambda: open_(model) if open_ else open_executor(job.options, model))
    if comm.is_root:
        warn_of_idle_ranks(model.file, comm.size)
        warn_of_requantised(model.file)
        tell_lowered_context(job.options, model, quiet)
    hosts = sorted(set(comm.gather(world.host)))
    build = lambda: make_tokenizer(model.file)  # noqa: E731
    tokenizer = comm.on_root_only(lambda: comm.busy(build, "building the tokenizer"))
    gc.freeze()  # what is loaded stays: the collector need not look at it again
    run = Run(world, job.target, model, executor, cast(Tokenizer, tokenizer), hosts)
    if comm.is_root:
        with leading(run, job):
            yield run
    else:
        yield run
        job.status = executor.follow()
    LOG.info("status %d after %d tokens.", job.status, model.model.tokens_run)


@contextmanager
def leading(run: Run, job: Job) -> Iterator[None]:
    """Rank 0's work; however it ends short of a failure of the program, the other ranks are told."""
    try:
        yield
    except NonFiniteLogits as error:
        run.executor.end(USER_ERROR_STATUS)
        raise UserError(f"{run.loaded.file.path}: {error}") from error
    except UserError:
        run.executor.end(USER_ERROR_STATUS)
        raise
    except BrokenPipeError:
        job.status = stop_printing()
    run.executor.end(job.status)


def check_observed(options: RunOptions) -> None:
    """UserError for what --monitor and --memory-floor cannot be."""
    if options.monitor is not None and not options.monitor > 0:
        raise UserError(f"--monitor is {options.monitor}: give a number of seconds above 0.")
    _memory_floor(options)


def _memory_floor(options: RunOptions) -> int | None:
    return None if options.memory_floor is None else parse_bytes("--memory-floor", options.memory_floor)


def warn_of_idle_ranks(file: ModelFile, size: int) -> None:
    """Say so if the model has too few heads, FFN panels or vocabulary groups for all ranks."""
    if any(part.is_idle() for part in file.config.partition(size)):
        LOG.warning(
            "the model is too small for %d ranks, some have nothing to do in parts of it; more than %d gain nothing.",
            size, file.config.most_busy_ranks, extra=OF_RUN,
        )  # fmt: skip


def tell_lowered_context(options: RunOptions, loaded: LoadedModel, quiet: bool) -> None:
    """Say so if the model's own context does not fit and a shorter one was taken."""
    known = loaded.file.config.max_position_embeddings
    if options.max_seq_len is None and loaded.context < known:
        sentence = (
            f"the context is {loaded.context} of the model's {known} tokens, the longest that fits the memory: "
            "--max-seq-len chooses another, --kv-type q8 makes room for more."
        )
        LOG.info("%s", sentence)
        if not quiet:
            sys.stderr.write(f"mpillama: {sentence}\n")


def warn_of_requantised(file: ModelFile) -> None:
    """Say which weights become larger and lose a little, since no kernel knows the type they are stored in."""
    types = file.weight_types
    for stored, (kept, count) in file.requantised().items():
        if kept not in (types.by_name or {}).values():
            kept = types.default
        LOG.warning(
            "%s weights stored as %s have no kernel and become %s: %s in memory.",
            f"{count:,}", stored, kept.name, in_units(count * kept.group_bytes(256) / 4096), extra=OF_RUN,
        )  # fmt: skip


def check_speculation(flags: SpeculationSettings) -> None:
    """UserError for fewer than 0 drafts."""
    if flags.speculate < 0:
        raise UserError(f"--speculate is {flags.speculate}: give 0 (off) or more.")


def pieces_of(run: Run, engine: Engine, sequence: EngineSequence) -> Generator[str, None, None]:
    """The text of an answer as it comes; until it begins, whoever watches is told how much of the prompt is read.

    NonFiniteLogits if the answer cannot be sampled. If the iterator is closed early, the answer is cancelled.
    """
    updates = engine.run(sequence)
    with run.world.comm.doing("reading the prompt") as tell:
        for update in updates:
            if update.token_ids or sequence.finished:
                break
            tell(f"{sequence.computed:,} of {len(sequence.request.prompt_ids):,} tokens")
    yield update.text
    for update in updates:
        yield update.text
    if sequence.error is not None:
        raise NonFiniteLogits(sequence.error)


def closing_line(run: Run, counts: EngineCounts, memory: list[RankUsage]) -> str:
    """Speed, communication, and the fullest rank's memory in one line."""
    fullest = max(range(len(memory)), key=lambda rank: memory[rank].process)
    m = memory[fullest]
    return (
        f"prefill {counts.prefill.tokens} tokens, {counts.prefill.tokens_per_second:.0f} tok/s | "
        f"decode {counts.decode.tokens} tokens, {counts.decode.tokens_per_second:.1f} tok/s | "
        f"communication {100 * communication_share(run, counts):.0f} % of the time | "
        f"memory{f' of rank {fullest}' if len(memory) > 1 else ''}: weights {in_units(m.weights)}, "
        f"KV cache {in_units(m.kv_cache_filled)} of {in_units(m.kv_cache)}, buffers {in_units(m.buffers)}, "
        f"whole process {in_units(m.process)} | "
        f"{in_number(run.world.comm.size, 'rank')} x {in_number(run.target.threads, 'thread')}, {run.target.isa.name}"
    )


def communication_share(run: Run, counts: EngineCounts) -> float:
    """The share of rank 0's step time that went into collectives, waiting for other ranks included."""
    return run.world.comm.seconds / counts.model_seconds if counts.model_seconds else 0.0
