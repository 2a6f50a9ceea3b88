"""A plain loop over one sequence, without scheduler, blocks or drafts: what the engine's bits are compared with."""

import hashlib

import numpy as np

from mpillama.engine.executor import Executor, Segment


class OneSequence:
    """The sequence in slot 0 of an executor, on rank 0; `length` counts its positions."""

    def __init__(self, executor: Executor):
        self.executor = executor
        self.length = 0

    def extend(self, token_ids: np.ndarray | list[int]) -> np.ndarray:
        """Append tokens in chunks and return the logits after the last one, float32 [vocab_size]."""
        ids = np.asarray(token_ids, np.int64)
        for first in range(0, len(ids), self.executor.max_tokens):
            chunk = ids[first : first + self.executor.max_tokens]
            is_last = first + len(chunk) == len(ids)
            logits = self.executor.forward([Segment(0, self.length, chunk, int(is_last))])
            self.length += len(chunk)
        result: np.ndarray = logits[0]
        return result

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""
        self.length = min(self.length, length)

    def greedy_digest(self, prompt: list[int], tokens: int, banned: int) -> str:
        """The digest of the logits that each of the likeliest tokens but one is chosen from."""
        digest, new = hashlib.sha256(), prompt
        for _ in range(tokens):
            logits = self.extend(new)
            digest.update(np.ascontiguousarray(logits, "<f4").tobytes())
            allowed = logits.copy()
            allowed[banned] = -np.inf
            new = [int(allowed.argmax())]
        return digest.hexdigest()
