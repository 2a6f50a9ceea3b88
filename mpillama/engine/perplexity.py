"""The perplexity of a long text, in windows.

Windows of `context` tokens, each beginning with BOS if the model wants one, advance by `stride`. Only tokens with
at least half a window before them count (all new ones, if the stride is shorter): with stride = context that is the
definition of llama.cpp's perplexity tool, so that the figures compare.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from mpillama.engine.engine import Engine
from mpillama.engine.sequence import EngineSequence, Request
from mpillama.errors import UserError
from mpillama.text.sampling_params import SamplingParams

NOTHING = SamplingParams(max_tokens=0)
"""Sampling where only a prompt is to be computed."""


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
    engine: Engine, ids: list[int], bos: int | None, context: int, stride: int, on_window: Callable[[], None]
) -> Score:
    """Score `ids` (without BOS), as many windows at a time as the engine has slots.

    UserError for a text shorter than a window.
    """
    if len(ids) < context:
        raise UserError(f"the text has {len(ids)} tokens, a window {context}: give more text or a smaller --context.")
    score, places = Score(), windows(len(ids), context, stride)
    running = deque[EngineSequence]()
    while True:
        for start, first in islice(places, engine.executor.slots - len(running)):
            request = Request(
                window_ids(ids, start, context, bos), NOTHING, on_prompt_logits=Losses(), prompt_logits_from=first
            )
            running.append(engine.submit(request))
        if not running:
            return score
        engine.step()
        while running and running[0].finished:
            score.add(losses_of(running.popleft()))
            on_window()


def window_ids(ids: list[int], start: int, context: int, bos: int | None) -> list[int]:
    """The tokens of a window, BOS in place of the first."""
    window = ids[start : start + context]
    return window if bos is None else [bos, *window[1:]]


class Losses:
    """Notes the loss of each token of a prompt, in nats."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def __call__(self, logits: np.ndarray, token: int) -> None:
        """A token stands where float32 [vocab_size] logits were computed."""
        self.found.append(float(losses(logits[None], np.array([token]))[0]))


def losses_of(sequence: EngineSequence) -> np.ndarray:
    """The losses of a sequence whose prompt's logits went to `Losses`, float64; UserError if it failed."""
    if sequence.error is not None:
        raise UserError(sequence.error)
    assert isinstance(sequence.request.on_prompt_logits, Losses)
    return np.array(sequence.request.on_prompt_logits.found)


def losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] in float64: logits float32 [tokens, vocab_size], targets [tokens]."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    total = np.log(np.exp(wide - top[:, None]).sum(axis=1)) + top
    return np.asarray(total - wide[np.arange(len(targets)), targets])
