"""The likeliest tokens of a row of logits, as ranks tell rank 0 of them: enough to sample from, a fraction of the row.

Each rank has the logits of some neighbouring tokens. Of these it tells the largest, and what the rest weighs together.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
TAIL_NUMBERS = 2
"""float32 places that the weight of the rest takes in a message."""


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a row: its `count` largest logits, 0 for all; the rest is weighed at `temperature`."""

    count: int = 0
    temperature: float = 0.0


WHOLE = Wanted()
"""All of a row."""


@dataclass(frozen=True)
class Candidates:
    """Logits float32 [n] and their tokens, ids ascending: the largest of each rank, among them the largest of the row.

    The others of each rank weigh `tails` float64 [ranks]: sums of exp((logit - peak) / temperature), with the rank's
    largest logit in `peaks`. `row` is the token of the last step after which this row comes.
    """

    values: npt.NDArray[np.float32]
    ids: Ids
    tails: Floats
    peaks: Floats
    row: int

    def tail(self, best: float, temperature: float) -> float:
        """What the others weigh, if the logit `best` weighs 1; to a relative sampler.TAIL_ERROR."""
        with np.errstate(over="ignore"):
            return float(np.sum(self.tails * np.exp((self.peaks - best) / temperature)))


def message_numbers(count: int, width: int) -> int:
    """float32 places of a rank's message that has `width` logits of a row, `count` of which are wanted."""
    told = min(count, width)
    return 2 * told + TAIL_NUMBERS if told else 0


def write_candidates(logits: npt.NDArray[np.float32], wanted: Wanted, message: npt.NDArray[np.float32]) -> None:
    """Fill a rank's message: logits, their places, the weight of the rest."""
    count = min(wanted.count, len(logits))
    best = logits.max()
    message[-TAIL_NUMBERS:] = 0
    if not np.isfinite(best):  # an error, or nothing that could be sampled: rank 0 looks at the first
        message[:count], message[count : 2 * count] = best, np.arange(count, dtype=np.int32).view(np.float32)
        return
    places = largest(logits, count) if count > 1 else np.array([logits.argmax()])
    message[:count], message[count : 2 * count] = logits[places], places.astype(np.int32).view(np.float32)
    if wanted.temperature > 0 and count < len(logits):
        with np.errstate(over="ignore"):
            scores = (logits.astype(np.float64) - float(best)) / wanted.temperature
        message[-TAIL_NUMBERS:] = np.array([weight_of_rest(scores, places)]).view(np.float32)


def read_candidates(messages: list[npt.NDArray[np.float32]], firsts: list[int], row: int) -> Candidates:
    """Join the messages of all ranks, each with the id of the rank's first token."""
    values, ids, tails, peaks = [], [], [], []
    for message, first in zip(messages, firsts, strict=True):
        if len(message):
            count = (len(message) - TAIL_NUMBERS) // 2
            values.append(message[:count])
            ids.append(first + message[count : 2 * count].view(np.int32).astype(np.int64))
            tails.append(float(message[-TAIL_NUMBERS:].copy().view(np.float64)[0]))
            peaks.append(float(message[0]))
    joined = np.concatenate(ids)
    order = np.argsort(joined)
    return Candidates(np.concatenate(values)[order], joined[order], np.array(tails), np.array(peaks), row)


def largest(scores: Floats | npt.NDArray[np.float32], count: int) -> Ids:
    """Ids of the `count` largest `scores`, largest first, the lower id first among equals."""
    # `count` columns have their maximum at or above `bound`, so at least `count` scores do: only those are sorted.
    rows = max(1, scores.size // (4 * count))
    columns = scores.size // rows
    maxima = scores[: rows * columns].reshape(rows, columns).max(axis=0)
    bound = np.partition(maxima, columns - count)[columns - count]
    return descending(scores, np.flatnonzero(scores >= bound))[:count]


def descending(scores: Floats | npt.NDArray[np.float32], ids: Ids) -> Ids:
    """Ascending `ids` reordered by descending score, the lower id first among equals."""
    return ids[np.argsort(-scores[ids], kind="stable")]


def weight_of_rest(scores: Floats, head: Ids) -> float:
    """Sum of exp(`scores`) outside `head`, to a relative sampler.TAIL_ERROR.

    In float32, which is twice as fast as float64 with AVX-512 and 5 to 8 times without.
    """
    with np.errstate(over="ignore"):
        rest = scores.astype(np.float32)
    rest[head] = -np.inf
    return float(np.exp(rest).sum(dtype=np.float64))
