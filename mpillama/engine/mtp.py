"""Drafts by the model's own layer for them (multi-token prediction), from the hidden states of the step before."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mpillama.engine.block_pool import BlockPool
from mpillama.engine.draft_model import DraftModel
from mpillama.engine.executor import Executor, Segment
from mpillama.engine.sequence import DraftProgress, EngineSequence
from mpillama.engine.speculation import Drafted
from mpillama.models.attention import BLOCK_POSITIONS
from mpillama.models.candidates import Candidates
from mpillama.models.mtp import MtpDecoder


class MtpExecutor(Executor):
    """As Executor, of a model that is such a layer; on rank 0 `rows` int64 [max_tokens] says, before each step, where
    the hidden state of each of its tokens comes from (MtpDecoder.take).
    """

    model: MtpDecoder

    def __init__(
        self, model: MtpDecoder, max_seq_len: int, kv_type: str, max_tokens: int, slots: int, blocks: int
    ):  # fmt: skip
        super().__init__(model, max_seq_len, kv_type, max_tokens, slots, blocks)
        self.rows = np.zeros(max_tokens, np.int64)

    def _execute(self) -> Iterator[list[np.ndarray | Candidates]]:
        self.comm.broadcast_plan(self.rows)
        self.model.take(self.rows[: int(self.plan.buffer[1])])
        return super()._execute()


@dataclass(frozen=True)
class Computed:
    """Positions of a sequence that the last step computed: `count` from `start` on, in its rows from `row` on."""

    sequence: EngineSequence
    slot: int | None
    row: int
    start: int
    count: int


class MtpDrafter(DraftModel):
    """Drafts by such a layer, through which each position goes as long as its hidden state is there, drafts or none.

    At position t of the layer's cache is what it makes of h_t and token t + 1. At the end of a block that others share
    it may be that of another text's next token: their drafts may be worse, their answers are the same.
    """

    executor: MtpExecutor

    def __init__(self, executor: Executor, pool: BlockPool, most: int):
        super().__init__(executor, pool, most)
        self._computed: list[Computed] = []
        self._rows: list[int] = []
        self._last: dict[int, int] = {}
        self._share = self.executor.model.weights.bytes_per_step() / self.main.model.weights.bytes_per_step()
        """Of the bytes that a step of the model reads, those that the layer reads."""

    def note_computed(self, sequence: EngineSequence, row: int, start: int) -> None:
        """As Drafter: remembers where the hidden states of a step are."""
        self._computed.append(Computed(sequence, sequence.slot, row, start, sequence.computed - start))

    def followed(self) -> float:
        """As Drafter: by the bytes that the layer reads, of those of the model."""
        return self._share * sum(found.count for found in self._computed if found.count > 1 + self.most)

    def _room(self, sequence: EngineSequence) -> int:
        """Guesses begin behind a position whose hidden state is there."""
        return super()._room(sequence) if sequence.pending == 1 else 0

    def fill(self, shares: Sequence[Drafted]) -> None:
        """As Drafter: one step for all that the last step computed, and one for each further guess."""
        begin = time.perf_counter()
        drafting = {share.sequence.number: share for share in shares if share.drafts}
        segments, guessing, rows = [], list[Drafted](), list[int]()
        for found in self._computed:
            if not self._follows(found):
                continue
            share = drafting.pop(found.sequence.number, None)
            segments.append(self._next(found, share is not None))
            rows += range(found.row, found.row + found.count)
            guessing += [share] if share else []
        for share in drafting.values():
            share.drafts.clear()
        self._computed, self._rows = [], rows
        self._run(segments, guessing)
        self.seconds += time.perf_counter() - begin

    def _follows(self, found: Computed) -> bool:
        """Whether the layer has all of a sequence's positions before these; it will never have those it missed."""
        sequence, state = found.sequence, found.sequence.drafting
        if sequence.finished or sequence.slot is None or sequence.slot != found.slot or not self._takes_part(sequence):
            return False
        if state.progress is None:
            known = self.pool.drafted(sequence.blocks) * BLOCK_POSITIONS
            state.progress = DraftProgress(found.start if found.start <= known else 0)
        behind = found.start + found.count
        state.unreadable = state.progress.computed != found.start or behind > self.executor.max_seq_len
        return not state.unreadable

    def _next(self, found: Computed, guesses: bool) -> Segment:
        """The step's positions, each with the token behind it."""
        sequence, progress = found.sequence, self._progress(found.sequence)
        ids = sequence.tokens[found.start + 1 : found.start + found.count + 1]
        segment = self._segment(sequence, ids, guesses, None)
        progress.computed += found.count
        self.pool.mark_drafted(sequence.blocks[: progress.computed // BLOCK_POSITIONS])
        return segment

    def _place(self, segments: list[Segment]) -> None:
        """The main model's hidden states first, then the layer's own, of the guess before."""
        rows = self._rows or [-1 - self._last[segment.slot] for segment in segments]
        self._rows = []
        self.executor.rows[: len(rows)] = rows
        ends = np.cumsum([len(segment.token_ids) for segment in segments]).tolist()
        self._last = {segment.slot: end - 1 for segment, end in zip(segments, ends, strict=True)}
