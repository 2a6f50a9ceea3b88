"""Attention where each rank holds some positions of the cache, for all heads (kernels/src/context_parallel.h).

A sequence's positions lie on ranks in pieces of 16 cache blocks, by the numbers of the blocks: block b is on rank
b % ranks. Queries, and new keys and values, go to all ranks; each attends over its own positions and sends every other
one what it has for that rank's heads, span by span, which are combined in the order in which one rank would do it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpillama.comm.communicator import Communicator
from mpillama.kernels import arguments
from mpillama.kernels.library import Team
from mpillama.models.attention import BLOCK_POSITIONS
from mpillama.models.attention_pieces import PIECE_BLOCKS, ROUND_BYTES, Pieces, PieceSizes
from mpillama.models.cache import Step
from mpillama.models.workspace import StepArrays

Array = np.ndarray


@dataclass(frozen=True)
class Round:
    """Tokens first : last of a step, and how many spans each rank holds of what they see."""

    first: int
    last: int
    spans: Array


class ContextParallel:
    """What the ranks of a stage exchange in a step, when each of them holds some positions."""

    def __init__(self, comm: Communicator, team: Team):
        self.comm = comm
        self.team = team
        self._sent = self._received = np.empty(0, np.float32)
        self._tokens = 0

    def begin(self, step: Step, argument: arguments.Step) -> None:
        """Translate a step's block numbers into places of this rank's cache, and into who holds what."""
        ranks, rank = self.comm.size, self.comm.rank
        self._tokens = len(step.positions)
        self._owners = np.ascontiguousarray(step.tables[:, ::PIECE_BLOCKS] % ranks)
        blocks, places = np.divmod(step.slots, BLOCK_POSITIONS)
        self._slots = np.where(blocks % ranks == rank, blocks // ranks * BLOCK_POSITIONS + places, -1)
        self._tables = step.tables // ranks
        self._positions = step.positions.astype(np.int64)
        self._sequence = np.repeat(np.arange(len(step.segments)), step.segments[:, 1])
        self._counted: dict[tuple[int, int, int], Array] = {}
        argument.slots, argument.tables = map(arguments.address, (self._slots, self._tables))

    def attend(self, kind: Pieces, cache: Any, a: StepArrays) -> None:
        """From the residual stream to the attention's context of this rank's heads."""
        message = np.empty((self._tokens, kind.widths[self.comm.rank]), np.float32)
        kind.project(self.team, cache, a.argument, message)
        messages = self.comm.gather_parts(message, kind.widths)
        starts = np.array([0, *(own.stop for own in kind.heads)], np.int64)
        counts = self._counts(kind.sizes)
        pieces = arguments.Pieces(
            ranks=self.comm.size, rank=self.comm.rank, tokens=self._tokens, owner_width=self._owners.shape[1],
            owners=arguments.address(self._owners), head_start=arguments.address(starts),
            counts=arguments.address(counts),
        )  # fmt: skip
        placed = kind.place(messages, pieces)
        for part in self._rounds(counts, kind.sizes):
            self._run(part, kind, a.argument, pieces)
        del placed

    def _run(self, part: Round, kind: Pieces, step: arguments.Step, pieces: arguments.Pieces) -> None:
        """A round: records for everybody, those of everybody, and their combination."""
        record, rank = kind.sizes.record, self.comm.rank
        to_send = [int(part.spans[rank]) * len(heads) * record for heads in kind.heads]
        to_receive = [int(spans) * len(kind.heads[rank]) * record for spans in part.spans]
        self._sent, self._received = _grown(self._sent, sum(to_send)), _grown(self._received, sum(to_receive))
        before = np.cumsum([0, *part.spans[:-1]]).astype(np.int64)
        pieces.first, pieces.last, pieces.received_before = part.first, part.last, arguments.address(before)
        pieces.sent, pieces.received = map(arguments.address, (self._sent, self._received))
        kind.attend(self.team, step, pieces)
        self.comm.exchange(self._sent, to_send, self._received, to_receive)
        kind.combine(self.team, step, pieces)

    def _counts(self, sizes: PieceSizes) -> Array:
        """How many spans each rank holds for the tokens before one: int64 [ranks, tokens + 1]."""
        key = sizes.span, sizes.window, sizes.chunk
        if key not in self._counted:
            held = self._owners[:, :, None] == np.arange(self.comm.size)
            held = np.repeat(held, PIECE_BLOCKS * BLOCK_POSITIONS // sizes.span, axis=1)
            before = np.concatenate([np.zeros_like(held[:, :1], np.int64), np.cumsum(held, axis=1)], axis=1)
            first, last = sizes.first_seen(self._positions) // sizes.span, self._positions // sizes.span + 1
            of_tokens = before[self._sequence, last] - before[self._sequence, first]
            counts = np.zeros((self.comm.size, self._tokens + 1), np.int64)
            np.cumsum(of_tokens, axis=0, out=counts[:, 1:].T)
            self._counted[key] = counts
        return self._counted[key]

    def _rounds(self, counts: Array, sizes: PieceSizes) -> Iterator[Round]:
        """As many tokens at a time as the busiest rank sends about ROUND_BYTES for, at least one."""
        most = ROUND_BYTES // (4 * sizes.record * sizes.heads)
        first = 0
        while first < self._tokens:
            busiest = (counts[:, first:] - counts[:, first : first + 1]).max(axis=0)
            last = first + max(1, int(np.searchsorted(busiest, most, "right")) - 1)
            yield Round(first, last, counts[:, last] - counts[:, first])
            first = last


def _grown(buffer: Array, numbers: int) -> Array:
    """The buffer, or a larger one."""
    return buffer if buffer.size >= numbers else np.empty(numbers, np.float32)
