"""Running a model file in this process on one rank."""

from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np

from mpillama.comm.communicator import Communicator
from mpillama.formats.native.reader import NativeModel
from mpillama.formats.native.table import read_table
from mpillama.kernels.library import Team
from mpillama.kernels.target import prepare, requested_isa
from mpillama.loading.model_file import ModelFile
from mpillama.models.cache import KVCache, Step, blocks_for, joint_step, single_sequence_step
from mpillama.models.decoder import Decoder
from mpillama.models.mtp import MtpDecoder
from mpillama.models.weights import load_weights
from mpillama.quant.weight_type import LANES

Chunks = list[np.ndarray]


@cache
def team(threads: int) -> Team:
    """So many threads, started once."""
    return prepare(requested_isa(), threads).team


def load(path: str | Path, threads: int) -> Decoder:
    """The whole model of a native file on one rank."""
    return load_file(read_table(str(path)), threads)


def load_file(file: ModelFile, threads: int, context: int | None = None) -> Decoder:
    """The whole model on one rank, for sequences of up to `context` tokens."""
    part = file.config.partition(1)[0]
    reader = file.reader(lambda count: None)
    try:
        weights = load_weights(file.config, file.specs, part, reader.read, team=team(threads))
    finally:
        reader.close()
    assert weights.bytes == reader.bytes_read or not isinstance(file, NativeModel)
    make = MtpDecoder if file.config.mtp else Decoder
    return make(file.config.for_context(context), weights, Communicator.alone(), team(threads))


def new_cache(model: Decoder, blocks: int, kv_type: str) -> KVCache:
    """A cache that holds NaN wherever nothing was written: reading too far shows."""
    cache = KVCache(model.config, model.part, blocks, kv_type)
    for array in (array for layer in cache.layers for array in layer if array.dtype != np.uint16):  # but for scales
        array[:] = np.nan if kv_type == "f32" else np.float16(np.nan).view(np.int16)
    return cache


def all_logits(model: Decoder, chunks: Chunks, kv_type: str = "f32") -> np.ndarray:
    """Logits of every token of a sequence that goes through the model in chunks: [tokens, vocab_size]."""
    blocks = blocks_for(sum(map(len, chunks)))
    cache, table, start, logits = new_cache(model, blocks, kv_type), np.arange(blocks)[::-1].copy(), 0, []
    for chunk in chunks:
        logits.append(model.forward(single_sequence_step(chunk, start, table, len(chunk)), cache))
        start += len(chunk)
    return np.concatenate(logits)


def chosen_experts(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Which experts each token takes, in ascending order: int64 [layers with a router, tokens, chosen]."""
    found: list[np.ndarray] = []
    kinds = {
        id(layer.mlp): layer.block.mlp.router.count for layer in model.layers if hasattr(layer.block.mlp, "router")
    }

    def mlp_half(layer, step, total):
        done = half(layer, step, total)
        if id(layer) in kinds:
            matrix = layer.router.matrix
            logits = np.empty((step.tokens, matrix.groups * LANES), np.float32)
            model.team.column_parallel(matrix, step.hidden, logits)
            chosen, _ = model.team.choose_experts(layer.router, kinds[id(layer)], logits)
            found.append(np.sort(chosen, axis=1))
        return done

    half = model.team.mlp_half
    with patch.object(model.team, "mlp_half", mlp_half):
        all_logits(model, [tokens])
    return np.stack(found)


def chosen_positions(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Which positions each token sees, int32 [layers with an indexer, tokens, chosen]; early ones do not choose."""
    found: list[np.ndarray] = []

    def latent_half(layer, step, total):
        done = half(layer, step, total)
        if layer.indexer.k.groups:
            found.append(model.workspace.for_tokens(step.tokens).chosen.copy())
        return done

    half = model.team.latent_half
    with patch.object(model.team, "latent_half", latent_half):
        all_logits(model, [tokens])
    return np.stack(found)


def cut(tokens: np.ndarray, size: int) -> Chunks:
    """Tokens in chunks of `size`."""
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


def all_logits_step(parts: list[tuple[np.ndarray, int, np.ndarray]]) -> Step:
    """One step of several sequences' (token ids, first position, cache blocks), with all logits."""
    counts = np.array([len(tokens) for tokens, _, _ in parts])
    width = max(len(table) for _, _, table in parts)
    tables = np.stack([np.pad(table, (0, width - len(table))) for _, _, table in parts])
    starts = np.array([start for _, start, _ in parts])
    return joint_step(np.concatenate([tokens for tokens, _, _ in parts]), starts, counts, counts, tables)
