"""What commands that run a model share: logs and monitor, loading it, text and statistics of a run."""

import gc
import logging
import select
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from mpillama.cli.display import in_number, in_units, load_progress, stages
from mpillama.cli.logs import OF_RUN, logged
from mpillama.cli.options import RunOptions
from mpillama.comm.communicator import Communicator
from mpillama.comm.failure import USER_ERROR_STATUS, stop_printing
from mpillama.engine.sequence import EngineSequence
from mpillama.errors import UserError
from mpillama.job.monitor import Monitor
from mpillama.job.start import World
from mpillama.kernels.target import Target
from mpillama.loading.load import LoadedModel, open_executor
from mpillama.loading.memory import RankUsage
from mpillama.loading.model_file import ModelFile
from mpillama.loading.session import OpenExecutor, Session, choose_target, open_session
from mpillama.models.partition import Division
from mpillama.text.sampler import NonFiniteLogits

LOG = logging.getLogger(__name__)
BUSY_READER_SECONDS = 1
"""How long rank 0 tries to print before it tells the others that it waits for whoever reads its output."""


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
    """Set up a run: logs, monitor, rank 0's display of long operations, kernels."""
    quiet = options.is_quiet
    world.comm.watch.display = stages(world.comm.is_root, quiet)
    with (
        logged(world, quiet, options.log_dir, options.log_level),
        Monitor(options.monitor, options.memory_floor_bytes, world.neighbours.is_root) as monitor,
    ):
        yield Job(options, world, choose_target(world), monitor)


@contextmanager
def loaded(job: Job, open_: OpenExecutor | None = None, world: World | None = None) -> Iterator[Session]:
    """Load the model on all ranks of the job, or of a part of it: the block is for their rank 0 (`session.is_root`).

    The others follow rank 0 when they leave the block, until it leaves its own, and take over its `job.status`.
    `open_` makes the executor; without it, one for a single sequence.
    """
    world = world or job.world
    is_root, quiet = world.comm.is_root, job.options.is_quiet or not job.world.comm.is_root
    open_ = open_ or partial(open_executor, job.options)
    session = open_session(job.options, world, job.target, open_, load_progress(is_root, quiet))
    file, model = session.loaded.file, session.loaded.model
    job.monitor.watch(model)
    if is_root:
        warn_of_idle_ranks(file, model.division)
        tell_shares(session.loaded, quiet)
        warn_of_requantised(file)
        tell_lowered_context(job.options, session.loaded, quiet)
    gc.freeze()  # what is loaded stays: the collector need not look at it again
    try:
        if is_root:
            with leading(session, job):
                yield session
        else:
            yield session
            job.status = session.executor.follow()
    except Exception:
        session.executor.abandon()  # a replica that fails need not be the end of the process
        raise
    LOG.info("status %d after %d tokens.", job.status, model.tokens_run)


@contextmanager
def leading(session: Session, job: Job) -> Iterator[None]:
    """Rank 0's work. However it ends, short of a crash, the other ranks are told."""
    try:
        yield
    except NonFiniteLogits as error:
        session.executor.end(USER_ERROR_STATUS)
        raise session.failed(error) from error
    except UserError:
        session.executor.end(USER_ERROR_STATUS)
        raise
    except BrokenPipeError:
        job.status = stop_printing()
    if not session.executor.abandoned:
        session.engine.save_cache()
    session.executor.end(job.status)


def write(comm: Communicator, text: str) -> None:
    """Print on standard output, and wait for a slow reader (a pager, a stopped terminal)."""
    ready = select.poll()
    ready.register(sys.stdout.fileno(), select.POLLOUT)
    goes_at_once = len(text) < select.PIPE_BUF // 4 and ready.poll(BUSY_READER_SECONDS * 1000)
    with nullcontext() if goes_at_once else comm.idle():
        sys.stdout.write(text)
        sys.stdout.flush()


def warn_of_idle_ranks(file: ModelFile, division: Division) -> None:
    """Say so if the model has too few heads, FFN panels or vocabulary groups for all ranks."""
    if division.shares is None and any(part.is_idle() for part in file.config.partition(division)):
        LOG.warning(
            "the model is too small for %d ranks, some have nothing to do in parts of it; more than %d gain nothing.",
            division.group, file.config.most_busy_ranks, extra=OF_RUN,
        )  # fmt: skip


def tell_shares(loaded: LoadedModel, quiet: bool) -> None:
    """Say what each rank takes if the shares were measured, and what that gains."""
    shares, gain = loaded.model.division.shares, loaded.gain
    if shares is None or gain is None:
        return
    listed = ", ".join(f"{100 * share:.0f}" for share in shares[:16]) + (", …" if shares[16:] else "")
    sentence = (
        f"the ranks take {listed} % of the model by bandwidth and memory (--shares): the slowest reads its part "
        f"{gain:.2f} times as fast as with even shares."
    )
    LOG.info("%s", sentence)
    if not quiet:
        sys.stderr.write(f"mpillama: {sentence}\n")


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


def pieces_of(session: Session, sequence: EngineSequence) -> Generator[str, None, None]:
    """The text of an answer as it comes; until it begins, a display shows how much of the prompt is read.

    UserError if the answer cannot be sampled. If the iterator is closed early, the answer is cancelled.
    """
    updates = session.engine.run(sequence)
    with session.world.comm.doing("reading the prompt") as tell:
        for update in updates:
            if update.token_ids or sequence.finished:
                break
            tell(f"{sequence.computed:,} of {len(sequence.request.prompt_ids):,} tokens")
    yield update.text
    for update in updates:
        yield update.text
    if sequence.error is not None:
        raise session.failed(sequence.error)


def closing_line(session: Session, memory: list[RankUsage]) -> str:
    """Speed, communication, and the fullest rank's memory in one line."""
    counts, target = session.engine.counts, session.target
    fullest = max(range(len(memory)), key=lambda rank: memory[rank].process)
    m = memory[fullest]
    return (
        f"prefill {counts.prefill.tokens} tokens, {counts.prefill.tokens_per_second:.0f} tok/s | "
        f"decode {counts.decode.tokens} tokens, {counts.decode.tokens_per_second:.1f} tok/s | "
        f"communication {100 * communication_share(session):.0f} % of the time | "
        f"memory{f' of rank {fullest}' if len(memory) > 1 else ''}: weights {in_units(m.weights)}, "
        f"KV cache {in_units(m.kv_cache_filled)} of {in_units(m.kv_cache)}, "
        f"{f'states {in_units(m.states)}, ' if m.states else ''}buffers {in_units(m.buffers)}, "
        f"{f'draft model {in_units(m.draft)}, ' if m.draft else ''}"
        f"whole process {in_units(m.process)} | "
        f"{in_number(session.world.comm.size, 'rank')} x {in_number(target.threads, 'thread')}, {target.isa.name}"
    )


def communication_share(session: Session) -> float:
    """The share of rank 0's step time that went into collectives, waiting for other ranks included."""
    seconds = session.engine.counts.model_seconds
    return session.executor.model.communication_seconds / seconds if seconds else 0.0
