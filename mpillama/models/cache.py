"""A rank's cache: keys and values in blocks of 64 positions, states of sequences; and the step that uses it."""

from dataclasses import dataclass
from math import prod

import numpy as np

from mpillama.kernels import arguments
from mpillama.models.attention import BLOCK_POSITIONS, KV_TYPES
from mpillama.models.attention_pieces import PIECE_BLOCKS
from mpillama.models.config import ModelConfig
from mpillama.models.partition import Partition

STATES_OF_DRAFTS = 2
"""State slots of a draft model for each sequence: the state after the text, and the one behind guesses."""
NO_SNAPSHOTS = np.zeros((0, 2), np.int64)
LayerCache = tuple[np.ndarray, ...]
"""What one layer keeps; of grouped-query attention keys, their scales, values, their scales."""


def blocks_for(positions: int) -> int:
    """Cache blocks that hold this many positions."""
    return -(-positions // BLOCK_POSITIONS)


def held_blocks(positions: int, holders: int) -> int:
    """The most blocks of a sequence that one of `holders` ranks has: they lie on ranks in pieces of PIECE_BLOCKS."""
    blocks = blocks_for(positions)
    pieces = -(-blocks // PIECE_BLOCKS)
    return min(blocks, -(-pieces // holders) * PIECE_BLOCKS)


def held_positions(blocks: int, holders: int) -> int:
    """How long a sequence may be of which each of `holders` ranks holds up to `blocks` blocks."""
    whole = blocks // PIECE_BLOCKS * PIECE_BLOCKS * holders if holders > 1 else blocks
    return BLOCK_POSITIONS * (whole or blocks)


def dealt_blocks(sequences: int, positions: int, holders: int) -> np.ndarray:
    """Block tables of so many sequences, int64 [sequences, blocks], whose pieces go to the holders in turn."""
    place = np.arange(blocks_for(positions))
    piece, within = np.divmod(place, PIECE_BLOCKS)
    own = piece // holders * PIECE_BLOCKS + within
    first = np.arange(sequences)[:, None] * held_blocks(positions, holders)
    tables: np.ndarray = (first + own) * holders + piece % holders
    return tables


def cache_bytes(config: ModelConfig, part: Partition, blocks: int, kv_type: str) -> int:
    """Bytes of a rank's cache of `blocks` blocks, of which it holds its part."""
    kind, own = KV_TYPES[kv_type], -(-blocks // part.holders)
    arrays = (array for block in part.own(config.blocks) for array in block.attention.cache_arrays(part, own, kind))
    return sum(prod(shape) * dtype.itemsize for shape, dtype in arrays)


def cache_read_bytes(config: ModelConfig, part: Partition, positions: int, kv_type: str) -> int:
    """Bytes that a rank reads of its part of a cache for a token that sees up to so many positions."""
    kind, found = KV_TYPES[kv_type], 0
    for block in part.own(config.blocks):
        arrays = block.attention.cache_arrays(part, 1, kind)
        for (shape, dtype), read in zip(arrays, block.attention.positions_read(positions), strict=True):
            found += prod(shape) * dtype.itemsize * read
    return found // (BLOCK_POSITIONS * part.holders)


def state_bytes(config: ModelConfig, part: Partition, states: int) -> int:
    """Bytes of a rank's states of so many sequences."""
    arrays = (array for block in part.own(config.blocks) for array in block.attention.state_arrays(part))
    return states * sum(prod(shape) * dtype.itemsize for shape, dtype in arrays)


class KVCache:
    """The cache of each layer, as its kind of attention has it: arrays of blocks, and of states in slots.

    Block b is on rank b % holders, there with the number b // holders.
    """

    def __init__(self, config: ModelConfig, part: Partition, blocks: int, kv_type: str, states: int = 1):
        kind, own = KV_TYPES[kv_type], part.own(config.blocks)
        # Zeroed memory costs nothing until its pages are written.
        self.layers: list[LayerCache] = [
            tuple(
                np.zeros(*array)
                for array in (
                    *block.attention.cache_arrays(part, -(-blocks // part.holders), kind),
                    *(((states, *shape), dtype) for shape, dtype in block.attention.state_arrays(part)),
                )
            )
            for block in own
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
    each sequence's cache blocks; logit_rows int64: the tokens whose logits are wanted. Where layers keep states: states
    int64 [sequences, 2]: the slots that a sequence's is read from, -1 at its beginning, and written to; snapshots int64
    [count, 2]: tokens in ascending order, and a slot that also gets the state behind each. In a step no slot is written
    twice, or read by one sequence and written by another.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    segments: np.ndarray
    tables: np.ndarray
    logit_rows: np.ndarray
    states: np.ndarray
    snapshots: np.ndarray

    def describe(self, step: arguments.Step) -> None:
        """Write which tokens there are into a step's arguments; this object must outlive their use."""
        for name in ("slots", "segments", "tables", "states", "snapshots"):
            setattr(step, name, arguments.address(getattr(self, name)))
        step.segment_count, step.table_width = self.tables.shape
        step.snapshot_count = len(self.snapshots)

    def rows(self, first: int, last: int) -> "Step":
        """The step of some of the tokens; those before them must have gone through each layer before."""
        starts = np.maximum(self.segments[:, 0], first)
        counts = np.minimum(self.segments[:, 0] + self.segments[:, 1], last) - starts
        held = counts > 0
        segments = np.stack([starts - first, counts, self.segments[:, 2] + starts - self.segments[:, 0]], axis=1)
        wanted = self.logit_rows[(self.logit_rows >= first) & (self.logit_rows < last)] - first
        each = (self.token_ids[first:last], self.positions[first:last], self.slots[first:last])
        states = self.states[held]  # where an earlier part has begun the sequence, its state is where that wrote it
        begun = self.segments[held, 0] < first
        states[begun, 0] = states[begun, 1]
        snapshots = self.snapshots[(self.snapshots[:, 0] >= first) & (self.snapshots[:, 0] < last)]
        snapshots[:, 0] -= first
        return Step(*each, segments[held], self.tables[held], wanted, states, snapshots)


def joint_step(
    token_ids: np.ndarray, starts: np.ndarray, counts: np.ndarray, logits: np.ndarray, tables: np.ndarray,
    states: np.ndarray | None = None, snapshots: np.ndarray | None = None,
) -> Step:  # fmt: skip
    """Make the step of several sequences' tokens, one sequence after the other in `token_ids`.

    int64 [sequences] each: first position, number of tokens (at least one), how many last tokens' logits are wanted;
    tables int64 [sequences, blocks] are the cache blocks of each. `states` and `snapshots` are those of Step; without
    them a sequence's state is in the slot of its own number.
    """
    if len(counts) == 1:
        return _step_of_one(token_ids, int(starts[0]), int(logits[0]), tables, states, snapshots)
    ends = np.cumsum(counts)
    firsts = ends - counts
    sequence = np.repeat(np.arange(len(counts)), counts)
    rows = np.arange(len(token_ids))
    positions = rows + (starts - firsts)[sequence]
    blocks = tables[sequence, positions // BLOCK_POSITIONS]
    if states is None:
        own = np.arange(len(counts))
        states = np.stack([np.where(starts == 0, -1, own), own], axis=1)
    return Step(
        token_ids=np.ascontiguousarray(token_ids, np.int32),
        positions=positions.astype(np.int32),
        slots=np.ascontiguousarray(blocks * BLOCK_POSITIONS + positions % BLOCK_POSITIONS, np.int64),
        segments=np.stack([firsts, counts, starts], axis=1).astype(np.int64),
        tables=np.ascontiguousarray(tables, np.int64),
        logit_rows=np.flatnonzero(rows >= (ends - logits)[sequence]),
        states=np.ascontiguousarray(states, np.int64),
        snapshots=NO_SNAPSHOTS if snapshots is None else np.ascontiguousarray(snapshots, np.int64),
    )


def _step_of_one(
    token_ids: np.ndarray, start: int, logits: int, tables: np.ndarray, states: np.ndarray | None,
    snapshots: np.ndarray | None,
) -> Step:  # fmt: skip
    """As joint_step, for one sequence: decoding is nothing else for most users, and small arrays cost time, too."""
    count = len(token_ids)
    positions = np.arange(start, start + count)
    blocks = tables[0, positions // BLOCK_POSITIONS]
    return Step(
        token_ids=np.ascontiguousarray(token_ids, np.int32),
        positions=positions.astype(np.int32),
        slots=blocks * BLOCK_POSITIONS + positions % BLOCK_POSITIONS,
        segments=np.array([[0, count, start]], np.int64),
        tables=np.ascontiguousarray(tables, np.int64),
        logit_rows=np.arange(count - logits, count),
        states=np.array([[0 if start else -1, 0]], np.int64)
        if states is None
        else np.ascontiguousarray(states, np.int64),
        snapshots=NO_SNAPSHOTS if snapshots is None else np.ascontiguousarray(snapshots, np.int64),
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
