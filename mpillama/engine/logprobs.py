"""The log-probabilities of a request's tokens by the model: before temperature, penalties, bias and grammars."""

import math
from dataclasses import dataclass

import numpy as np

from mpillama.text.sampler import largest

FEWEST = 16
"""To look for fewer of the likeliest tokens than this takes longer."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-probability, the likeliest tokens with theirs, and its place among all of them, from 1 on."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    rank: int


class LogprobRecorder:
    """Notes each token's log-probability, and those of so many `alternatives`."""

    def __init__(self, alternatives: int):
        self.alternatives = alternatives
        self._noted: list[TokenLogprob] = []

    def __call__(self, logits: np.ndarray, token: int) -> None:
        """A token was chosen from float32 [vocab_size] logits, or stands in the prompt where they were computed."""
        best = largest(logits, max(self.alternatives, FEWEST))[: self.alternatives].tolist()
        total = log_sum(logits)
        top = [(one, float(logits[one]) - total) for one in best]
        rank = int(np.count_nonzero(logits > logits[token])) + 1
        self._noted.append(TokenLogprob(token, float(logits[token]) - total, top, rank))

    def take(self) -> list[TokenLogprob]:
        """What was noted since the last call."""
        noted, self._noted = self._noted, []
        return noted


def log_sum(logits: np.ndarray) -> float:
    """The logarithm of the sum of exponentials, in float64."""
    highest = float(logits.max())
    wide = logits.astype(np.float64)
    wide -= highest
    return highest + math.log(float(np.exp(wide, out=wide).sum()))
