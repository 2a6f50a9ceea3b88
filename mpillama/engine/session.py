"""One sequence: what `generate` and `chat` run."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpillama.engine.executor import Executor
from mpillama.engine.step_plan import Segment
from mpillama.errors import UserError


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
    """The sequence in slot 0 of an executor, on rank 0; `length` counts its positions.

    `on_chunk` is told how many tokens of how many have been run.
    """

    def __init__(self, executor: Executor):
        self.executor = executor
        self.length = 0
        self.prefill, self.decode = Clock(), Clock()
        self.on_chunk: Callable[[int, int], None] = lambda done, tokens: None

    @property
    def max_seq_len(self) -> int:
        """The most positions."""
        return self.executor.max_seq_len

    def extend(self, token_ids: np.ndarray | list[int]) -> np.ndarray:
        """Append tokens to the sequence and return the logits after the last one, float32 [vocab_size].

        UserError if the sequence would become longer than max_seq_len; nothing is changed then.
        """
        result: np.ndarray = self.extend_and_guess(token_ids, [])[0]
        return result

    def extend_and_guess(self, token_ids: np.ndarray | list[int], drafts: list[int]) -> np.ndarray:
        """As extend, and the logits after each draft, as if all drafts before it were true: [1 + drafts, vocab_size].

        Drafts are not part of the sequence until they are kept.
        """
        ids = np.asarray(token_ids, np.int64)
        self._check(len(ids))
        clock, start = self.prefill if len(ids) > 1 else self.decode, time.perf_counter()
        for first in range(0, len(ids), self.executor.max_tokens):
            chunk = ids[first : first + self.executor.max_tokens]
            is_last = first + len(chunk) == len(ids)
            guesses = drafts[: self.executor.max_tokens - len(chunk)] if is_last else []
            segment = Segment(0, self.length, [*chunk, *guesses], (1 + len(guesses)) if is_last else 0)
            logits = self.executor.forward([segment])
            self.length += len(chunk)
            self.on_chunk(first + len(chunk), len(ids))
        clock.seconds += time.perf_counter() - start
        clock.tokens += len(ids)
        return logits

    def keep_draft(self) -> None:
        """The next draft is true: it is part of the sequence."""
        self.length += 1
        self.decode.tokens += 1

    def _check(self, count: int) -> None:
        if not count:
            raise UserError("the prompt is empty: give at least one token.")
        if self.length + count > self.max_seq_len:
            raise UserError(
                f"the prompt has {self.length + count} tokens, but the context holds {self.max_seq_len}: "
                "shorten it or raise --max-seq-len."
            )

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""
        self.length = min(self.length, length)
