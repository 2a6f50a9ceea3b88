"""The KV cache of a rank's heads, in blocks of 64 positions, and the step that reads and writes it."""

from dataclasses import dataclass
from math import prod

import numpy as np

from mpillama.kernels import arguments
from mpillama.models.attention import BLOCK_POSITIONS, KV_TYPES
from mpillama.models.config import ModelConfig
from mpillama.models.partition import Partition

LayerCache = tuple[np.ndarray, ...]
"""What one layer keeps; of grouped-query attention keys, their scales, values, their scales."""


def blocks_for(positions: int) -> int:
    """Cache blocks that hold this many positions."""
    return -(-positions // BLOCK_POSITIONS)


def cache_bytes(config: ModelConfig, part: Partition, blocks: int, kv_type: str) -> int:
    """Bytes of a rank's cache of `blocks` blocks."""
    kind = KV_TYPES[kv_type]
    arrays = (array for block in part.own(config.blocks) for array in block.attention.cache_arrays(part, blocks, kind))
    return sum(prod(shape) * dtype.itemsize for shape, dtype in arrays)


class KVCache:
    """The cache blocks of each layer: arrays [blocks, …] as its kind of attention has them."""

    def __init__(self, config: ModelConfig, part: Partition, blocks: int, kv_type: str):
        kind, own = KV_TYPES[kv_type], part.own(config.blocks)
        # Zeroed memory costs nothing until its pages are written.
        self.layers: list[LayerCache] = [
            tuple(np.zeros(*array) for array in block.attention.cache_arrays(part, blocks, kind)) for block in own
        ]
        self.arguments = [
            block.attention.cache_argument(layer, kind) for block, layer in zip(own, self.layers, strict=True)
        ]
        self.blocks = blocks


@dataclass(frozen=True)
class Step:
    """The tokens that go through the model together, from one or more sequences.

    token_ids, positions int32 [tokens]; slots int64 [tokens]: where each token's key and value go (block * 64 + place);
    segments int64 [sequences, 3]: first token, number of tokens, first position; tables int64 [sequences, blocks]:
    each sequence's cache blocks; logit_rows int64: the tokens whose logits are wanted.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    segments: np.ndarray
    tables: np.ndarray
    logit_rows: np.ndarray

    def describe(self, step: arguments.Step) -> None:
        """Write which tokens there are into a step's arguments; this object must outlive their use."""
        step.slots, step.segments, step.tables = (a.ctypes.data for a in (self.slots, self.segments, self.tables))
        step.segment_count, step.table_width = self.tables.shape

    def rows(self, first: int, last: int) -> "Step":
        """The step of some of the tokens; those before them must have gone through each layer before."""
        starts = np.maximum(self.segments[:, 0], first)
        counts = np.minimum(self.segments[:, 0] + self.segments[:, 1], last) - starts
        held = counts > 0
        segments = np.stack([starts - first, counts, self.segments[:, 2] + starts - self.segments[:, 0]], axis=1)
        wanted = self.logit_rows[(self.logit_rows >= first) & (self.logit_rows < last)] - first
        each = (self.token_ids[first:last], self.positions[first:last], self.slots[first:last])
        return Step(*each, np.ascontiguousarray(segments[held]), np.ascontiguousarray(self.tables[held]), wanted)


def joint_step(
    token_ids: np.ndarray, starts: np.ndarray, counts: np.ndarray, logits: np.ndarray, tables: np.ndarray
) -> Step:
    """Make the step of several sequences' tokens, one sequence after the other in `token_ids`.

    int64 [sequences] each: first position, number of tokens (at least one), how many last tokens' logits are wanted;
    tables int64 [sequences, blocks] are the cache blocks of each.
    """
    ends = np.cumsum(counts)
    firsts = ends - counts
    sequence = np.repeat(np.arange(len(counts)), counts)
    rows = np.arange(len(token_ids))
    positions = rows + (starts - firsts)[sequence]
    blocks = tables[sequence, positions // BLOCK_POSITIONS]
    return Step(
        token_ids=np.ascontiguousarray(token_ids, np.int32),
        positions=positions.astype(np.int32),
        slots=np.ascontiguousarray(blocks * BLOCK_POSITIONS + positions % BLOCK_POSITIONS, np.int64),
        segments=np.stack([firsts, counts, starts], axis=1).astype(np.int64),
        tables=np.ascontiguousarray(tables, np.int64),
        logit_rows=np.flatnonzero(rows >= (ends - logits)[sequence]),
    )


def single_sequence_step(token_ids: np.ndarray, start: int, table: np.ndarray, logits: int) -> Step:
    """Make the step of one sequence's tokens from position `start` on, with the logits of its last `logits` tokens."""
    return joint_step(
        token_ids, np.array([start]), np.array([len(token_ids)]), np.array([logits]), table[None].astype(np.int64)
    )


def decode_step(token_ids: np.ndarray, positions: np.ndarray, tables: np.ndarray) -> Step:
    """Make the step of one token of each of several sequences; tables int64 [sequences, blocks]."""
    ones = np.ones(len(token_ids), np.int64)
    return joint_step(token_ids, positions.astype(np.int64), ones, ones, tables)
