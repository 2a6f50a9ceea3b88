"""The message that rank 0 sends before each step: what goes through the model, and which cache blocks it uses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from mpillama.models.cache import Step, blocks_for, joint_step

HEADER = 4
"""Numbers at the beginning of the message: order, tokens (or an exit status), segments, block ids."""
FIELDS = 6
"""Numbers of a segment: slot, first position, tokens, wanted logits, first table place, new block ids."""


class Order(IntEnum):
    """What a message asks for."""

    FORWARD = 1
    END = 2
    REPORT_MEMORY = 3


@dataclass(frozen=True)
class Segment:
    """New tokens of one sequence, from position `start` on, with the logits after the last `logits` of them.

    `slot` is the sequence's row in the block tables, which every rank keeps; `blocks` are written into that row from
    place `table_start` on before the step. Without tokens only the table is written.
    """

    slot: int
    start: int
    token_ids: Sequence[int] | np.ndarray
    logits: int = 0
    table_start: int = 0
    blocks: Sequence[int] | np.ndarray = ()


class StepPlan:
    """The message's buffer, int64, of a size fixed by the most tokens and sequences of a step: no pickling, no sizes.

    `tables` int64 [slots, blocks of the longest sequence] are the block tables of this rank.
    """

    def __init__(self, max_tokens: int, slots: int, max_seq_len: int):
        self.max_tokens = max_tokens
        self.slots = slots
        self.max_blocks = blocks_for(max_tokens) + 2 * slots
        self.buffer = np.zeros(HEADER + FIELDS * slots + max_tokens + self.max_blocks, np.int64)
        self.tables = np.zeros((slots, blocks_for(max_seq_len)), np.int64)
        # What was never written must not be read; a slot that has no such block keeps pointing at block 0.

    # -- rank 0 ----------------------------------------------------------------------------------------------------

    def write_order(self, order: Order, status: int = 0) -> None:
        """Make the message an order without a step."""
        self.buffer[:HEADER] = order, status, 0, 0

    def fit(self, segments: Sequence[Segment]) -> tuple[list[Segment], list[Segment]]:
        """Split off blocks that do not fit one message: segments of blocks alone, each a message, and the rest.

        A step needs few new blocks, unless a sequence begins with a long text that the cache knows.
        """
        before, rest, room = [], [], self.max_blocks
        for s in segments:
            while len(s.blocks) > room:
                before.append(Segment(s.slot, 0, (), 0, s.table_start, s.blocks[: self.max_blocks]))
                s = replace(s, table_start=s.table_start + self.max_blocks, blocks=s.blocks[self.max_blocks :])
            room -= len(s.blocks)
            rest.append(s)
        return before, rest

    def write(self, segments: Sequence[Segment]) -> None:
        """Make the message a step; ValueError if it does not hold that many tokens, sequences or blocks."""
        ids = np.concatenate([np.asarray(s.token_ids, np.int64) for s in segments])
        blocks = [block for s in segments for block in s.blocks]
        if len(ids) > self.max_tokens or len(segments) > self.slots or len(blocks) > self.max_blocks:
            raise ValueError(f"a step of {len(ids)} tokens, {len(segments)} sequences, {len(blocks)} new blocks")
        self.buffer[:HEADER] = Order.FORWARD, len(ids), len(segments), len(blocks)
        at = HEADER + FIELDS * len(segments)
        self.buffer[HEADER:at] = [
            number
            for s in segments
            for number in (s.slot, s.start, len(s.token_ids), s.logits, s.table_start, len(s.blocks))
        ]
        self.buffer[at : at + len(ids)] = ids
        self.buffer[at + len(ids) : at + len(ids) + len(blocks)] = blocks

    # -- all ranks -------------------------------------------------------------------------------------------------

    @property
    def order(self) -> int:
        """What the message asks for."""
        return int(self.buffer[0])

    @property
    def status(self) -> int:
        """The exit status of an END."""
        return int(self.buffer[1])

    def step(self) -> Step:
        """Write the message's blocks into the tables and return the step that it describes."""
        tokens, count, _ = (int(n) for n in self.buffer[1:HEADER])
        at = HEADER + FIELDS * count
        fields = self.buffer[HEADER:at].reshape(count, FIELDS)
        self._write_tables(fields, self.buffer[at + tokens :])
        fields = fields[fields[:, 2] > 0]
        slots, starts, counts, logits = fields[:, 0], fields[:, 1], fields[:, 2], fields[:, 3]
        width = blocks_for(int((starts + counts).max())) if len(fields) else 0
        return joint_step(self.buffer[at : at + tokens], starts, counts, logits, self.tables[slots, :width])

    def _write_tables(self, fields: np.ndarray, blocks: np.ndarray) -> None:
        first = 0
        for slot, _, _, _, place, count in fields[fields[:, 5] > 0].tolist():
            self.tables[slot, place : place + count] = blocks[first : first + count]
            first += count
