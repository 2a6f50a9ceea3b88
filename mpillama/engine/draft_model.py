"""A small model that guesses what a large one will say: both keep the same text in their caches, block for block."""

import logging
import time
from collections.abc import Sequence

import numpy as np

from mpillama.engine.block_pool import BlockPool
from mpillama.engine.executor import Executor, Segment, SegmentStates
from mpillama.engine.pace import LEAST_TOKENS
from mpillama.engine.sequence import DraftProgress, EngineSequence
from mpillama.engine.speculation import Drafted, Drafter
from mpillama.errors import UserError
from mpillama.models.attention import BLOCK_POSITIONS
from mpillama.models.cache import STATES_OF_DRAFTS, blocks_for
from mpillama.models.candidates import WHOLE, Candidates
from mpillama.text.sampler import NonFiniteLogits, Sampler, check_finite, wanted_of

LOG = logging.getLogger(__name__)


class DraftModel(Drafter):
    """Drafts by the draft model of an executor, for all sequences of a step together.

    Its cache has a block for each block of the main model's: tables, prefixes that sequences share and preemption are
    the same. What it holds of a sequence may lag behind, and is caught up with before it guesses. Guesses are drawn as
    the sampler will draw, with the random numbers that it will use.
    """

    def __init__(self, executor: Executor, pool: BlockPool, most: int):
        assert executor.draft is not None
        super().__init__(most)
        self.main = executor
        self.executor: Executor = executor.draft
        self.pool = pool
        config = self.executor.model.config
        self.vocab_size: int = config.vocab_size
        self.has_state: bool = config.has_state
        self.most_blocks = blocks_for(self.executor.max_seq_len)
        """Of a sequence, in the draft model's table: the model may have a longer context."""
        self._damaged = False

    # -- what the scheduler asks -----------------------------------------------------------------------------------

    def reserve(self, sequence: EngineSequence, room: int) -> list[int]:
        """As Drafter: places."""
        room = min(self.most, room, self._room(sequence))
        return [0] * self.lengths.limit(sequence, room) if room > 0 else []

    def _room(self, sequence: EngineSequence) -> int:
        """Guesses for which the draft model's own context has room: the last one is drawn, never computed."""
        if not self._takes_part(sequence):
            return 0
        return self.executor.max_seq_len + 1 - len(sequence.tokens)

    def _takes_part(self, sequence: EngineSequence) -> bool:
        """Whether the draft model can read a sequence's text, and has an answer to guess."""
        request = sequence.request
        answers = request.pooling is None and request.sampling.max_tokens != 0
        return answers and request.speculate and not sequence.drafting.unreadable and not self._damaged

    # -- guesses ---------------------------------------------------------------------------------------------------

    def fill(self, shares: Sequence[Drafted]) -> None:
        """As Drafter: one step of the draft model for what it has not read yet, and one for each further guess."""
        start = time.perf_counter()
        readers = [share for share in shares if self._is_due(share)]
        for share in readers:
            self._settle(share.sequence)
        segments, guessing = self._catch_up(readers)
        self._run(segments, guessing)
        self.seconds += time.perf_counter() - start

    def _run(self, segments: list[Segment], guessing: list[Drafted]) -> None:
        """Run the steps on all ranks that hold the draft model."""
        if not segments:
            return
        shared = self.executor.comm.size > 1
        if shared:
            self.main.begin_drafts()
        self._guess(segments, guessing)
        if shared:
            self.executor.end(0)

    def _place(self, segments: list[Segment]) -> None:
        """Whatever a step needs besides."""

    def _is_due(self, share: Drafted) -> bool:
        """Whether the draft model reads on: where it guesses, and along with a prompt."""
        if not self._takes_part(share.sequence):
            return False
        return bool(share.drafts) or (share.count > 1 and self.lengths.best(share.sequence, self.most) > 0)

    def _settle(self, sequence: EngineSequence) -> None:
        """Count the guesses that came true among what the draft model has read; begin with what the cache knows."""
        progress = sequence.drafting.progress
        if progress is None:
            known = 0 if self.has_state else self.pool.drafted(sequence.blocks)
            sequence.drafting.progress = DraftProgress(min(known * BLOCK_POSITIONS, sequence.computed))
            return
        for token in progress.guesses:
            if progress.computed >= len(sequence.tokens) or sequence.tokens[progress.computed] != token:
                break
            progress.computed += 1
        progress.guesses = []

    def _catch_up(self, readers: list[Drafted]) -> tuple[list[Segment], list[Drafted]]:
        """The first step: what of each text is not read yet; and who guesses on from there."""
        room, segments, guessing = self.executor.max_tokens, [], []
        backlog = self._backlog(readers)
        for share in readers:
            sequence = share.sequence
            progress = self._progress(sequence)
            end = min(sequence.computed + share.count, self.executor.max_seq_len)
            ids = sequence.tokens[progress.computed : end][: min(room, 1 + self.most + backlog)]
            sequence.drafting.unreadable = max(ids, default=0) >= self.vocab_size
            if not ids or sequence.drafting.unreadable:
                share.drafts.clear()
                continue
            room -= len(ids)
            backlog -= max(0, len(ids) - 1 - self.most)
            if progress.computed + len(ids) < end:
                share.drafts.clear()
            segments.append(self._segment(sequence, ids, bool(share.drafts), self._states(sequence)))
            progress.computed += len(ids)
            self.pool.mark_drafted(sequence.blocks[: progress.computed // BLOCK_POSITIONS])
            if share.drafts:
                guessing.append(share)
        return segments, guessing

    def _backlog(self, readers: list[Drafted]) -> int:
        """How much may be read in this step beyond what a step without prompts leaves: if answers wait for it, no more
        than it has of prompts anyway.
        """
        if not self.paced:
            return self.executor.max_tokens
        return max(LEAST_TOKENS, sum(share.count for share in readers if share.count > 1))

    def _guess(self, segments: list[Segment], guessing: list[Drafted]) -> None:
        """Run the steps; each sequence has as many guesses as it has places."""
        samplers = {share.sequence.number: self._sampler(share.sequence) for share in guessing}
        found: dict[int, list[int]] = {number: [] for number in samplers}
        while segments:
            self._place(segments)
            rows = [row for piece in self.executor.forward_in_pieces(segments) for row in piece]
            segments, left = [], []
            for share, row in zip(guessing, rows, strict=True):
                sequence, guesses = share.sequence, found[share.sequence.number]
                token = self._draw(sequence, samplers[sequence.number], row)
                if token is None:
                    continue
                guesses.append(token)
                if len(guesses) < len(share.drafts) and token < self.vocab_size:
                    left.append(share)
                    segments.append(self._guessing_segment(sequence, guesses))
            going_on = {share.sequence.number for share in left}
            for share in guessing:
                if share.sequence.number not in going_on:
                    share.drafts[:] = found[share.sequence.number]
            guessing = left

    def _guessing_segment(self, sequence: EngineSequence, guesses: list[int]) -> Segment:
        """The step of the latest guess."""
        progress = self._progress(sequence)
        start = progress.computed + len(guesses) - 1
        if not self.has_state:
            progress.guesses = list(guesses)
        return self._segment(sequence, guesses[-1:], True, self._states(sequence, len(guesses)), start)

    def _segment(
        self, sequence: EngineSequence, ids: list[int], guesses: bool, states: SegmentStates | None,
        start: int | None = None,
    ) -> Segment:  # fmt: skip
        """Tokens of a sequence from `start` on, by default from where the draft model has come to."""
        assert sequence.slot is not None
        progress = self._progress(sequence)
        start = progress.computed if start is None else start
        new, first = sequence.blocks[progress.sent_blocks : self.most_blocks], progress.sent_blocks
        progress.sent_blocks += len(new)
        readable = self.vocab_size <= self.main.model.config.vocab_size
        wanted = wanted_of(sequence.request.sampling, self.vocab_size) if readable else WHOLE
        return Segment(sequence.slot, start, ids, int(guesses), first, new, states, wanted)

    def _states(self, sequence: EngineSequence, guesses: int = 0) -> SegmentStates | None:
        """A recurrent state cannot be rewound: that of the text stays, guesses are computed in a slot of their own."""
        if not self.has_state:
            return None
        assert sequence.slot is not None
        own, beside = STATES_OF_DRAFTS * sequence.slot, STATES_OF_DRAFTS * sequence.slot + 1
        if guesses:
            return SegmentStates(own if guesses == 1 else beside, beside)
        return SegmentStates(own if self._progress(sequence).computed else -1, own)

    @staticmethod
    def _progress(sequence: EngineSequence) -> DraftProgress:
        assert sequence.drafting.progress is not None
        return sequence.drafting.progress

    # -- draws -----------------------------------------------------------------------------------------------------

    def _sampler(self, sequence: EngineSequence) -> Sampler:
        """What draws as the sequence's own sampler will."""
        return sequence.make_sampler(self.main.model.config.vocab_size).ahead()

    def _draw(self, sequence: EngineSequence, sampler: Sampler, row: np.ndarray | Candidates) -> int | None:
        """A guess; None if the draft model's numbers allow none, which is told once, or those of the request."""
        size = self.main.model.config.vocab_size
        try:
            check_finite(row.values if isinstance(row, Candidates) else row)
        except NonFiniteLogits as error:
            self._damaged = True
            LOG.warning("the draft model is left aside: %s", error, extra={"of_run": True})
            return None
        try:
            if isinstance(row, Candidates):
                return sampler.sample_among(row, lambda: _scattered(row, size))
            return sampler.sample(_fitted(row, size))
        except (NonFiniteLogits, UserError):  # bias and penalties, of which the model's own numbers will tell
            sequence.drafting.unreadable = True
            return None


def _fitted(row: np.ndarray, size: int) -> np.ndarray:
    """Logits for a vocabulary of another size: tables of embeddings are padded differently."""
    if len(row) == size:
        return row
    fitted = np.full(size, -np.inf, np.float32)
    fitted[: len(row)] = row[:size]
    return fitted


def _scattered(row: Candidates, size: int) -> np.ndarray:
    """Candidates as a whole row: a guess may do without the others."""
    found = np.full(size, -np.inf, np.float32)
    found[row.ids] = row.values
    return found
