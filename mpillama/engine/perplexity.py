"""The perplexity of a long text, in windows.

Windows of `context` tokens, each beginning with BOS if the model wants one, advance by `stride`. Only tokens with
at least half a window before them count (all new ones, if the stride is shorter): with stride = context that is the
definition of llama.cpp's perplexity tool, so that the figures compare.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from mpillama.engine.executor import Executor
from mpillama.engine.step_plan import Segment
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
    executor: Executor, ids: list[int], bos: int | None, context: int, stride: int, on_window: Callable[[], None]
) -> Score:
    """Score `ids` (without BOS), as many windows at a time as the executor has slots.

    UserError for a text shorter than a window.
    """
    if len(ids) < context:
        raise UserError(f"the text has {len(ids)} tokens, a window {context}: give more text or a smaller --context.")
    score, places = Score(), windows(len(ids), context, stride)
    while batch := list(islice(places, executor.slots)):
        texts = [window_ids(ids, start, context, bos) for start, _ in batch]
        following = [np.array(ids[start + 1 : start + context]) for start, _ in batch]
        for lost in _score(executor, texts, following, [first for _, first in batch]):
            score.add(lost)
            on_window()
    return score


def window_ids(ids: list[int], start: int, context: int, bos: int | None) -> np.ndarray:
    """The tokens of a window that predict others: all but its last, BOS in place of the first."""
    window = np.array(ids[start : start + context - 1])
    if bos is not None:
        window[0] = bos
    return window


def _score(
    executor: Executor, texts: list[np.ndarray], following: list[np.ndarray], firsts: list[int]
) -> list[np.ndarray]:
    """Run sequences of one length side by side; the losses of what follows each token, from those at `firsts` on."""
    found: list[list[np.ndarray]] = [[] for _ in texts]
    share = max(1, executor.max_tokens // len(texts))
    for start in range(0, len(texts[0]), share):
        parts = [text[start : start + share] for text in texts]
        wanted = [min(len(p), max(0, start + len(p) - f)) for p, f in zip(parts, firsts, strict=True)]
        segments = [Segment(i, start, p, w) for i, (p, w) in enumerate(zip(parts, wanted, strict=True))]
        targets = [f[start + len(p) - w : start + len(p)] for f, p, w in zip(following, parts, wanted, strict=True)]
        lost = _losses_in_pieces(executor.forward_in_pieces(segments), np.concatenate(targets))
        for rows, part in zip(found, np.split(lost, np.cumsum(wanted)[:-1]), strict=True):
            rows.append(part)
    return [np.concatenate(rows) for rows in found]


def _losses_in_pieces(pieces: Iterator[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """The losses of all targets, without the logits of all of them at a time."""
    lost, first = [np.empty(0)], 0
    for logits in pieces:
        lost.append(losses(logits, targets[first : first + len(logits)]))
        first += len(logits)
    return np.concatenate(lost)


def losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] in float64: logits float32 [tokens, vocab_size], targets [tokens]."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    total = np.log(np.exp(wide - top[:, None]).sum(axis=1)) + top
    return np.asarray(total - wide[np.arange(len(targets)), targets])
