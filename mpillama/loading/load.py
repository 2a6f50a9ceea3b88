"""From settings to a model that is ready to run on every rank."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from mpillama.comm.communicator import Communicator
from mpillama.comm.hosts import is_first_of_host
from mpillama.comm.pipeline import join_stages
from mpillama.comm.shared_memory import CAPACITY, SharedReduction
from mpillama.engine.executor import Executor
from mpillama.errors import UserError
from mpillama.formats.checkpoint_model import refuse_headless
from mpillama.formats.contents import refuse_other_contents, sample_digests
from mpillama.formats.reading import changed, modified
from mpillama.job.start import World
from mpillama.kernels.library import Team
from mpillama.kernels.shared_sum import SharedWindow, window_bytes
from mpillama.kernels.target import Target
from mpillama.loading.memory import MemoryModel
from mpillama.loading.model_file import ModelFile, chat_template_source, model_path, open_model
from mpillama.loading.placement import warn_of_shared_cores
from mpillama.loading.preflight import (
    Needs,
    cache_room,
    choose_context,
    measure_host,
    rank_needs,
    refuse_no_room,
    warn_of_hosts,
)
from mpillama.loading.progress import PLACE, AbandonedError, LoadState, LoadWatch
from mpillama.loading.settings import EngineSettings, ModelSettings
from mpillama.loading.shares import by_positions, divide, gain_of, measured_division, on_these_hosts, read_shares
from mpillama.loading.traffic import refuse_coarse_sums
from mpillama.loading.truncated import truncated
from mpillama.models.cache import blocks_for, held_blocks
from mpillama.models.config import ModelConfig
from mpillama.models.decoder import Decoder
from mpillama.models.mtp import MtpDecoder
from mpillama.models.partition import Division
from mpillama.models.tensors import TensorSpec
from mpillama.models.weights import Read, Weights, load_weights


class ReplicatedTensors:
    """Stands before a reader: `read` leaves out on other ranks what `share` then gives to them."""

    def __init__(self, comm: Communicator, read_slice: Read):
        self.comm = comm
        self.read_slice = read_slice
        self.whole: dict[str, Sequence[np.ndarray]] = {}

    def read(self, spec: TensorSpec, units: range, arrays: Sequence[np.ndarray]) -> None:
        """Fill the arrays of a tensor with the given units, unless rank 0 does."""
        if spec.split is None:
            self.whole[spec.name] = arrays
            if not len(units) or not self.comm.is_root:
                return
        self.read_slice(spec, units, arrays)
        logging.getLogger(__name__).debug("%s: units %d to %d are read.", spec.name, units.start, units.stop)

    def share(self) -> int:
        """Broadcast what rank 0 has read; call it on all ranks once all have read. Returns the bytes."""
        arrays = [array for name in sorted(self.whole) for array in self.whole[name]]
        self.comm.broadcast_arrays(arrays)
        return sum(array.nbytes for array in arrays)


def is_read(spec: TensorSpec, comm: Communicator) -> bool:
    """Whether this rank reads its units of a tensor from the file."""
    return comm.is_root or spec.split is not None


def choose_reduction(comm: Communicator, team: Team, hidden_size: int, chunk: int) -> None:
    """Let the ranks of a host add up in shared memory, and hosts exchange sums, where that is faster than MPI."""
    if comm.size > 1 and hidden_size <= CAPACITY:
        with comm.watch.blocking("the making of memory that the ranks share"):
            shared = SharedReduction(comm.mpi, window_bytes, partial(SharedWindow, team), comm.yields)
        sizes = sorted({hidden_size * tokens for tokens in (1, 8, 32, chunk)})
        comm.choose_reduction(shared, sizes)


Progress = Callable[[int], AbstractContextManager[Callable[[LoadState], None]]]
"""Opens a display for a number of bytes of all ranks; gives the function that is told how far they are."""

DEFAULT_BATCH_CONTEXT = 4096
"""Positions of a sequence that a group of ranks must have room for, if the user does not say how many."""
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A rank's part of a model, and what the file says of it."""

    file: ModelFile
    model: Decoder
    bytes_read: int
    seconds: float
    context: int
    cache_room: int
    """Cache blocks that fit every host."""
    gain: float | None = None
    """How much faster the slowest rank reads its weights than with even shares, if --shares is by what was measured."""


def load_model(
    settings: ModelSettings, world: World, target: Target, progress: Progress, beside: Needs | None = None,
    opened: ModelFile | None = None, check: Callable[[ModelFile], None] | None = None,
) -> LoadedModel:  # fmt: skip
    """Read the table on rank 0 and every rank's slices; UserError on all ranks if any cannot.

    `beside` is what this rank needs for something else, which has a block of its own for each block of the cache.
    `opened` is the table, if it is read already. `check` is asked on rank 0, before weights are read, whether the model
    will do.
    """
    comm = world.comm
    start = time.perf_counter()
    open_file = lambda: open_model(model_path(settings.model), settings.weights, settings.tokenizer)  # noqa: E731
    file = opened or comm.on_root(lambda: comm.busy(open_file, "reading the model's table"))
    if file.config.mtp and opened is None:
        raise UserError(f"{file.path}: is a layer that drafts tokens for a model: give it with --draft-model.")
    if settings.needs_head:
        refuse_headless(file.path, file.config.lm_head)
    if settings.needs_template:
        chat_template_source(file)
    _refuse_other_contents(file, world)
    file = truncated(file, settings.layers)
    _check_context(settings, file)
    if check is not None:
        comm.on_root_only(lambda: comm.busy(lambda: check(file), "comparing the draft model's tokens"))
    refuse_coarse_sums(settings.sync, file.config, file.path)
    LOG.info("table of %s with %d tensors after %.1f s.", file.path, len(file.specs), time.perf_counter() - start)
    if settings.warns:
        warn_of_hosts(world)
        warn_of_shared_cores(world, target.threads)
    comm.together(lambda: refuse_no_room(settings.force))
    chunk = max(1, min(settings.prefill_chunk, settings.max_seq_len or file.config.max_position_embeddings))
    division, gain = choose_division(settings, file.config, file.specs, world, chunk)
    pipeline = join_stages(comm, division.stages) if division.stages > 1 else None
    mates = pipeline.group if pipeline else comm
    choose_reduction(mates, target.team, file.config.padded_hidden_size, chunk)
    LOG.info("kernels ready (%s) after %.1f s.", target.isa.name, time.perf_counter() - start)
    needs = rank_needs(file, world, settings, chunk, division)
    needs += (beside or Needs()).for_all_blocks(division.holders)
    host = measure_host(world, needs, division.holders)
    context = choose_context(file, world, settings.max_seq_len, host, settings.force)
    room = cache_room(world, host)
    LOG.info(
        "the ranks of this host need %.3f GB for a context of %d tokens, %.3f GB are available.",
        host.need(context) / 1e9, context, host.available / 1e9,
    )  # fmt: skip
    if host.states:
        LOG.info("of that, %.3f GB are for %d recurrent states.", host.states / 1e9, settings.state_slots)
    start = time.perf_counter()
    weights, bytes_read = _read_weights(settings, file, division, world, mates, target.team, progress)
    seconds = time.perf_counter() - start
    LOG.info("read %d bytes in %.1f s, %.2f GB/s.", bytes_read, seconds, bytes_read / seconds / 1e9)
    config, coarse = file.config.for_context(settings.max_seq_len), settings.sync == "q80"
    make = MtpDecoder if config.mtp else Decoder
    model = make(config, weights, mates, target.team, coarse, division, pipeline)
    return LoadedModel(file, model, bytes_read, time.perf_counter() - start, context, room, gain)


def choose_division(
    settings: ModelSettings, config: ModelConfig, specs: Sequence[TensorSpec], world: World, chunk: int
) -> tuple[Division, float | None]:
    """How the ranks share a model, and what that gains over even shares if it is by what was measured.

    Rank 0 reads --shares; UserError on all ranks if it or the number of ranks does not fit.
    """
    comm, layers = world.comm, config.most_stages
    even = comm.together(lambda: divide(comm.size, settings.pipeline, None, layers))
    if settings.context_parallel:
        even = comm.together(lambda: by_positions(even, config))
    path = settings.shares
    if path is None:
        return even, None
    hosts = comm.gather(world.host)
    found = comm.on_root(lambda: read_shares(path))
    if isinstance(found, tuple):
        given = comm.together(lambda: divide(comm.size, even.stages, found, layers))
        return replace(given, context_parallel=even.context_parallel), None
    model = MemoryModel(config, specs, even, settings.kv_type, chunk)
    measured = comm.together(lambda: on_these_hosts(found, hosts, path))
    context = settings.max_seq_len or config.max_position_embeddings
    division = comm.together(lambda: measured_division(measured, model, context))
    return division, gain_of(model, division, measured)


def _refuse_other_contents(file: ModelFile, world: World) -> None:
    """UserError on all ranks if a host sees other files than rank 0's; its first rank looks for all of them.

    Thousands of ranks that each open hundreds of files at the same moment would keep a file server busy for minutes.
    """
    comm = world.comm
    with comm.watch.blocking("the start of loading"):
        looks = is_first_of_host(comm.mpi)
    digests = comm.gather(comm.together(lambda: sample_digests(file.files) if looks else None))
    refuse_other_contents(file.files, digests, comm.gather(world.host))


def _read_weights(
    settings: ModelSettings,
    file: ModelFile,
    division: Division,
    world: World,
    mates: Communicator,
    team: Team,
    progress: Progress,
) -> tuple[Weights, int]:
    """This rank's slices, and the bytes read of the file; once a rank cannot read its own, all stop.

    `mates` are the ranks of its stage, which hold the same tensors.
    """
    comm = world.comm
    stamps = _stamps(file) if comm.is_root else {}
    reader = comm.together(lambda: file.reader(lambda count: None, team.threads, settings.verify))
    replicated = ReplicatedTensors(mates, reader.read)
    part = file.config.partition(division)[comm.rank]
    total = sum(file.stored_bytes(spec, spec.units_of(part)) for spec in file.specs if is_read(spec, mates))
    sizes = comm.gather((total, world.host))

    def read() -> Weights | None:
        try:
            with progress(sum(size for size, _ in sizes)) as show:
                watch = LoadWatch(comm, [host for _, host in sizes], reader, total, show)
                weights = load_weights(
                    file.config, file.specs, part, replicated.read, reader.at_once, team, watch.attend
                )
            reader.check_unchanged()
            _check_stamps(stamps)
        except AbandonedError:
            return None
        finally:
            reader.close()
        return weights

    weights = cast(Weights, comm.together(read, PLACE))  # None is never alone: another rank raised
    LOG.info("%d bytes of what all ranks hold were broadcast.", replicated.share())
    return weights, reader.bytes_read


def _stamps(file: ModelFile) -> dict[str, tuple[int, int]]:
    """Modification stamps by name, which show whether a file was replaced; one that is gone is read all the same."""
    return {path: modified(Path(path).stat()) for path in file.files if Path(path).exists()}


def _check_stamps(stamps: Mapping[str, tuple[int, int]]) -> None:
    """UserError if a file was replaced since, perhaps before another rank opened it."""
    for path, stamp in stamps.items():
        if Path(path).exists() and modified(Path(path).stat()) != stamp:
            raise changed(path)


def _check_context(settings: ModelSettings, file: ModelFile) -> None:
    """UserError for a context that the model does not have."""
    known = file.config.longest_context
    if settings.max_seq_len is not None and not 1 <= settings.max_seq_len <= known:
        raise UserError(f"--max-seq-len is {settings.max_seq_len}: this model's context holds 1 to {known} tokens.")


def open_executor(settings: ModelSettings, loaded: LoadedModel) -> Executor:
    """Allocate the cache of one sequence, for the context that was found to fit."""
    tokens, states = min(settings.prefill_chunk, loaded.context), settings.state_slots
    return Executor(loaded.model, loaded.context, settings.kv_type, tokens, states=states)


def open_shared_executor(settings: EngineSettings, loaded: LoadedModel) -> Executor:
    """Allocate a cache that all sequences share, each of up to the whole context.

    It holds `cache_tokens` positions, or as many as they can need and the hosts have room for.
    """
    holders = loaded.model.part.holders
    longest = held_blocks(loaded.context, holders) * holders
    if settings.cache_tokens is None:
        room = min(settings.sequences * longest, loaded.cache_room)
    else:
        room = -(-blocks_for(settings.cache_tokens) // holders) * holders
    tokens = max(settings.prefill_chunk, settings.sequences * (1 + settings.draft_tokens))
    blocks = max(longest, room)
    model, context, states = loaded.model, loaded.context, settings.state_slots
    return Executor(model, context, settings.kv_type, tokens, settings.sequences, blocks, states)
