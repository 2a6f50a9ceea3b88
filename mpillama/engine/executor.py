"""Steps on all ranks: rank 0 says what goes through the model, the others follow."""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import psutil

from mpillama.comm.communicator import Communicator
from mpillama.engine.step_plan import Order, Segment, StepPlan
from mpillama.models.cache import KVCache
from mpillama.models.decoder import Decoder
from mpillama.text.token_ids import check_token_ids

LOGIT_BYTES = 32 << 20
"""Logits that a rank holds at once where a step wants those of many positions."""


class Executor:
    """A model and a cache for up to `slots` sequences of up to `max_seq_len` positions, steps of up to `max_tokens`.

    The cache has `blocks` blocks, which rank 0 gives to sequences with the segments; without that number each slot has
    the blocks that it may need, and none need be given. On rank 0 call forward, memory_per_rank and end; on the other
    ranks call follow once.
    """

    def __init__(
        self, model: Decoder, max_seq_len: int, kv_type: str, max_tokens: int, slots: int = 1,
        blocks: int | None = None,
    ):  # fmt: skip
        self.model = model
        self.comm: Communicator = model.comm
        self.max_seq_len = max_seq_len
        self.max_tokens = max_tokens
        self.slots = slots
        self.plan = StepPlan(max_tokens, slots, max_seq_len)
        if blocks is None:
            blocks = self.plan.tables.size
            self.plan.tables.reshape(-1)[:] = np.arange(blocks)
        self.blocks = blocks
        self.piece = max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
        self.abandoned = False
        self.cache = KVCache(model.config, model.part, blocks, kv_type)

    # -- rank 0 ----------------------------------------------------------------------------------------------------

    def forward(self, segments: Sequence[Segment]) -> np.ndarray:
        """Run a step and return the wanted logits, float32 [rows, vocab_size], in the order of the segments.

        UserError for a token that the model does not have; nothing is run then.
        """
        pieces = list(self.forward_in_pieces(segments))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [self._no_logits()])

    def forward_in_pieces(self, segments: Sequence[Segment]) -> Iterator[np.ndarray]:
        """As forward, with up to `piece` rows at a time; take them all, since all ranks compute them together."""
        for segment in segments:
            check_token_ids(segment.token_ids, self.model.config.vocab_size)
        blocks_first, rest = self.plan.fit(segments)
        for segment in blocks_first:
            self._run([segment])
        return self._run(rest)

    def hidden_states(self, first: int, count: int) -> np.ndarray:
        """The last hidden states of tokens of the last step, float32 [count, hidden_size]."""
        return self.model.hidden_states(first, count)

    def _no_logits(self) -> np.ndarray:
        return np.empty((0, self.model.config.vocab_size), np.float32)

    def _run(self, segments: Sequence[Segment]) -> Iterator[np.ndarray]:
        self.plan.write(segments)
        self.comm.broadcast_plan(self.plan.buffer)
        return self._execute()

    def end(self, status: int) -> None:
        """Let the other ranks leave follow() with an exit status; nothing happens if they have given up."""
        if not self.abandoned:
            self._order(Order.END, status)

    def memory_per_rank(self) -> list[int]:
        """Resident bytes of every rank's process, in order of rank."""
        self._order(Order.REPORT_MEMORY)
        return self._gather_memory()

    def _order(self, order: Order, status: int = 0) -> None:
        self.plan.write_order(order, status)
        self.comm.broadcast_plan(self.plan.buffer)

    # -- all ranks -------------------------------------------------------------------------------------------------

    def follow(self, patient: bool = False) -> int:
        """Execute rank 0's plans until it ends; returns the exit status. The `patient` wait for each for ever."""
        while True:
            if patient:
                self.comm.watch.allow_silence()
            self.comm.broadcast_plan(self.plan.buffer)
            if self.plan.order == Order.END:
                return self.plan.status
            if self.plan.order == Order.REPORT_MEMORY:
                self._gather_memory()
            else:
                deque(self._execute(), maxlen=0)

    def _execute(self) -> Iterator[np.ndarray]:
        """Run the step; its logits are computed as they are taken."""
        step = self.plan.step()
        if len(step.token_ids):
            self.model.advance(step, self.cache)
        starts = range(0, len(step.logit_rows), self.piece)
        return (self.model.logits(step.logit_rows[first : first + self.piece]) for first in starts)

    def _gather_memory(self) -> list[int]:
        return self.comm.gather(int(psutil.Process().memory_info().rss))
