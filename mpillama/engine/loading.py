"""From options to a model that is ready to run on every rank."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from mpillama.comm.start import World
from mpillama.engine.executor import Executor
from mpillama.engine.model_file import ModelFile, open_model
from mpillama.engine.preflight import cache_room, choose_context, measure_host
from mpillama.engine.trial import first_layers
from mpillama.engine.warm_up import choose_reduction, warm_up
from mpillama.errors import UserError
from mpillama.files.contents import refuse_other_contents, sample_digests
from mpillama.kernels.target import Target
from mpillama.model.cache import blocks_for
from mpillama.model.llama import LlamaModel
from mpillama.model.partition import partition
from mpillama.model.weights import load_weights, slice_bytes
from mpillama.options import RunOptions

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Opens a display for a number of bytes; gives the function that is told of each piece."""

DEMO_MODEL = Path("data") / "demo.h5"


@dataclass(frozen=True)
class LoadedModel:
    """A rank's part of a model, and what the file says of it."""

    file: ModelFile
    model: LlamaModel
    bytes_read: int
    seconds: float
    context: int
    cache_room: int
    """Cache blocks that fit every host."""


def model_path(option: str | None) -> str:
    """The model file: as given, or the demo model of the checkout."""
    if option:
        return option
    checkout = Path(__file__).resolve().parents[2] / DEMO_MODEL
    return str(DEMO_MODEL if DEMO_MODEL.exists() or not checkout.exists() else checkout)


def load_model(options: RunOptions, world: World, target: Target, progress: Progress) -> LoadedModel:
    """Read the table on rank 0 and every rank's slices; UserError on all ranks if any cannot."""
    comm = world.comm
    file = comm.on_root(lambda: open_model(model_path(options.model), options.weights, options.tokenizer))
    _refuse_other_contents(file, world)
    file = first_layers(file, options.layers)
    _check_sizes(options, file)
    warm_up(file.config, file.specs, world, target, options.kv_type)
    chunk = max(1, min(options.prefill_chunk, file.config.max_position_embeddings))
    choose_reduction(comm, world, file.config.padded_hidden_size, chunk)
    host = measure_host(file, world, options.kv_type, chunk)
    context = choose_context(file, world, options.max_seq_len, host, options.force)
    room = cache_room(world, host)
    part = partition(file.config, comm.size)[comm.rank]
    start = time.perf_counter()

    def read() -> LoadedModel:
        with progress(slice_bytes(file.specs, part)) as on_bytes:
            reader = file.reader(comm.counting(on_bytes), target.threads, options.verify)
            try:
                weights = load_weights(
                    file.config, file.specs, part, reader.read, reader.at_once, target.threads, comm.attend
                )
            finally:
                reader.close()
        model = LlamaModel(file.config, weights, comm, target.threads)
        return LoadedModel(file, model, reader.bytes_read, time.perf_counter() - start, context, room)

    return comm.together(read, "the end of loading")


def _refuse_other_contents(file: ModelFile, world: World) -> None:
    """UserError on all ranks if one sees other files than rank 0."""
    comm = world.comm
    digests = comm.gather(comm.together(lambda: sample_digests(file.files)))
    refuse_other_contents(file.files, digests, comm.gather(world.host))


def _check_sizes(options: RunOptions, file: ModelFile) -> None:
    """UserError for a context that the model does not have, and for chunks of nothing."""
    known = file.config.max_position_embeddings
    if options.max_seq_len is not None and not 1 <= options.max_seq_len <= known:
        raise UserError(f"--max-seq-len is {options.max_seq_len}: this model's context holds 1 to {known} tokens.")
    if options.prefill_chunk < 1:
        raise UserError(f"--prefill-chunk is {options.prefill_chunk}: it must be at least 1.")


def open_executor(options: RunOptions, loaded: LoadedModel) -> Executor:
    """Allocate the KV cache of one sequence, for the context that was found to fit."""
    return Executor(loaded.model, loaded.context, options.kv_type, min(options.prefill_chunk, loaded.context))


def open_shared_executor(
    options: RunOptions, loaded: LoadedModel, sequences: int, drafts: int, cache_tokens: int | None
) -> Executor:
    """Allocate a cache that up to `sequences` sequences share, each of up to the whole context.

    It holds `cache_tokens` positions, or as many as they can need and the hosts have room for.
    """
    longest = blocks_for(loaded.context)
    wanted = sequences * longest if cache_tokens is None else blocks_for(cache_tokens)
    room = wanted if cache_tokens is not None else min(wanted, loaded.cache_room)
    tokens = max(options.prefill_chunk, sequences * (1 + drafts))
    blocks = max(longest, room)
    return Executor(loaded.model, loaded.context, options.kv_type, tokens, sequences, blocks)
