"""One sequence on all ranks: rank 0 decides what goes through the model, the others follow."""

import time
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import psutil

from mpillama.comm.communicator import Communicator
from mpillama.errors import UserError
from mpillama.model.cache import KVCache, blocks_for, single_sequence_step
from mpillama.model.llama import LlamaModel


class Order(IntEnum):
    """What a step plan asks for."""

    FORWARD = 1
    END = 2
    REPORT_MEMORY = 3


HEADER = 4
"""Numbers of a plan before its token ids: order, tokens (or exit status), first position, logit rows."""


@dataclass
class Clock:
    """Tokens and seconds of one kind of step."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """0 if nothing ran."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Session:
    """A sequence whose keys and values lie in the cache; `length` counts its positions.

    On rank 0 call extend, truncate and end; on the other ranks call follow once.
    """

    def __init__(self, model: LlamaModel, max_seq_len: int, kv_type: str, prefill_chunk: int):
        blocks = blocks_for(max_seq_len)
        self.model = model
        self.comm: Communicator = model.comm
        self.max_seq_len = max_seq_len
        self.prefill_chunk = prefill_chunk
        self.cache = KVCache(model.config, model.part, blocks, kv_type)
        self.table = np.arange(blocks, dtype=np.int64)
        self.plan = np.zeros(HEADER + prefill_chunk, np.int64)
        self.length = 0
        self.prefill, self.decode = Clock(), Clock()

    # -- rank 0 ----------------------------------------------------------------------------------------------------

    def extend(self, token_ids: np.ndarray | list[int]) -> np.ndarray:
        """Append tokens to the sequence and return the logits after the last one, float32 [vocab_size].

        UserError if the sequence would become longer than max_seq_len; nothing is changed then.
        """
        ids = np.asarray(token_ids, np.int64)
        if not len(ids):
            raise UserError("the prompt is empty: give at least one token.")
        if self.length + len(ids) > self.max_seq_len:
            raise UserError(
                f"the prompt has {self.length + len(ids)} tokens, but the context holds {self.max_seq_len}: "
                "shorten it or raise --max-seq-len."
            )
        clock, start = self.prefill if len(ids) > 1 else self.decode, time.perf_counter()
        for first in range(0, len(ids), self.prefill_chunk):
            chunk = ids[first : first + self.prefill_chunk]
            is_last = first + len(chunk) == len(ids)
            logits = self._run(chunk, 1 if is_last else 0)
        clock.seconds += time.perf_counter() - start
        clock.tokens += len(ids)
        result: np.ndarray = logits[0]
        return result

    def score(self, token_ids: np.ndarray, rows: int) -> np.ndarray:
        """Append tokens and return the logits after each of the last `rows` of them, float32 [rows, vocab_size]."""
        found = []
        for first in range(0, len(token_ids), self.prefill_chunk):
            chunk = token_ids[first : first + self.prefill_chunk]
            wanted = max(0, first + len(chunk) - max(first, len(token_ids) - rows))
            found.append(self._run(chunk, wanted))
        return np.concatenate(found)

    def _run(self, ids: np.ndarray, logits: int) -> np.ndarray:
        self.plan[:HEADER] = Order.FORWARD, len(ids), self.length, logits
        self.plan[HEADER : HEADER + len(ids)] = ids
        self.comm.broadcast_plan(self.plan)
        return self._execute()

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""
        self.length = min(self.length, length)

    def end(self, status: int) -> None:
        """Let the other ranks leave follow() with an exit status."""
        self.plan[:HEADER] = Order.END, status, 0, 0
        self.comm.broadcast_plan(self.plan)

    def memory_per_rank(self) -> list[int]:
        """Resident bytes of every rank's process, in order of rank."""
        self.plan[:HEADER] = Order.REPORT_MEMORY, 0, 0, 0
        self.comm.broadcast_plan(self.plan)
        return self._gather_memory()

    # -- all ranks -------------------------------------------------------------------------------------------------

    def follow(self) -> int:
        """Execute rank 0's plans until it ends; returns the exit status."""
        while True:
            self.comm.broadcast_plan(self.plan)
            if self.plan[0] == Order.END:
                return int(self.plan[1])
            if self.plan[0] == Order.REPORT_MEMORY:
                self._gather_memory()
            else:
                self._execute()

    def _execute(self) -> np.ndarray:
        _, count, start, logits = (int(v) for v in self.plan[:HEADER])
        step = single_sequence_step(self.plan[HEADER : HEADER + count], start, self.table, logits)
        result = self.model.forward(step, self.cache)
        self.length = start + count
        return result

    def _gather_memory(self) -> list[int]:
        return self.comm.gather(int(psutil.Process().memory_info().rss))
