"""The perplexity of a long text, in windows.

Windows of `context` tokens, each beginning with BOS if the model wants one, advance by `stride`. Only tokens with
at least half a window before them count (all new ones, if the stride is shorter): with stride = context that is the
definition of llama.cpp's perplexity tool, so that the figures compare.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from mpillama.engine.session import Session
from mpillama.errors import UserError


@dataclass
class Score:
    """Sums over the tokens that counted; nats."""

    tokens: int = 0
    nll: float = 0.0
    squares: float = field(default=0.0, repr=False)

    def add(self, losses: np.ndarray) -> None:
        """Count some tokens' losses, float64."""
        self.tokens += len(losses)
        self.nll += float(losses.sum())
        self.squares += float((losses**2).sum())

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """e to the mean."""
        return math.exp(self.mean)

    @property
    def standard_error(self) -> float:
        """Of the perplexity, from the spread of the losses."""
        variance = max(self.squares / self.tokens - self.mean**2, 0.0)
        return self.perplexity * math.sqrt(variance / max(self.tokens - 1, 1))


def windows(tokens: int, context: int, stride: int) -> Iterator[tuple[int, int]]:
    """Each window's first token and the first position in it that counts; the last, unfinished window is left out."""
    for start in range(0, tokens - context + 1, stride):
        yield start, context // 2 if start == 0 or stride == context else max(context // 2, context - stride)


def text_perplexity(
    session: Session, ids: list[int], bos: int | None, context: int, stride: int, on_window: Callable[[], None]
) -> Score:
    """Score `ids` (without BOS); UserError for a text shorter than a window or impossible sizes."""
    if not 2 <= context <= session.max_seq_len:
        raise UserError(f"--context is {context}: give 2 to {session.max_seq_len} tokens.")
    if not 1 <= stride <= context:
        raise UserError(f"--stride is {stride}: give 1 to {context} tokens (--context).")
    if len(ids) < context:
        raise UserError(f"the text has {len(ids)} tokens, a window {context}: give more text or a smaller --context.")
    score = Score()
    for start, first in windows(len(ids), context, stride):
        window = np.array(ids[start : start + context])
        targets = window[first + 1 :].copy()
        if bos is not None:
            window[0] = bos
        session.truncate(0)
        logits = session.score(window[:-1], context - 1 - first)
        score.add(losses(logits, targets))
        on_window()
    return score


def losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] in float64: logits float32 [tokens, vocab_size], targets [tokens]."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    total = np.log(np.exp(wide - top[:, None]).sum(axis=1)) + top
    return np.asarray(total - wide[np.arange(len(targets)), targets])
