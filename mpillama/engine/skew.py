"""Which rank the others wait for: the time in sums over ranks, by rank and layer, split into waiting and the wire.

The rank that comes last to a sum does not wait for anybody: what it spends there is the wire, and what the others spend
beyond that is waiting for it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpillama.models.decoder import Decoder


class TimedLayer:
    """A decoder layer whose seconds in sums over ranks are added up."""

    def __init__(self, layer: Any, seconds: np.ndarray, number: int):
        self.layer = layer
        self.seconds = seconds
        self.number = number

    def forward(self, *arguments: Any) -> None:
        comm = self.layer.comm
        before = comm.seconds
        self.layer.forward(*arguments)
        self.seconds[self.number] += comm.seconds - before

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


@contextmanager
def timed_layers(model: Decoder, seconds: np.ndarray) -> Iterator[None]:
    """Add what each of a model's layers spends in sums over ranks to float64 [layers]."""
    layers = model.layers
    model.layers = [TimedLayer(layer, seconds, i) for i, layer in enumerate(layers)]  # type: ignore[misc]
    try:
        yield
    finally:
        model.layers = layers


@dataclass(frozen=True)
class RankTimes:
    """A rank's seconds in a step: those of its parts by name, and what it spends outside of sums over ranks (`own`).

    `sums` float64 [steps, layers] are those in each step's and layer's sums; `first_layer` is the first of its stage,
    and `stage_wait` what it waits for other stages.
    """

    rank: int
    host: str
    own: float
    parts: dict[str, float]
    sums: np.ndarray
    first_layer: int = 0
    stage_wait: float = 0.0


@dataclass(frozen=True)
class Skew:
    """What ranks wait for each other, in seconds of a step in the mean.

    `waiting` is that of each rank by layer, `wire` that of each rank's sums without the waiting. `late` are the ranks
    that others wait for, one of each stage; `late_by` is how much longer than the middle rank of its stage each works.
    """

    waiting: list[list[float]]
    wire: list[float]
    late: list[int] = field(default_factory=list)
    late_by: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """What a rank waits in the mean."""
        return float(np.mean([sum(layers) for layers in self.waiting]))


def skew_of(ranks: Sequence[RankTimes]) -> Skew:
    """Compare what all ranks measured of the same steps; those of a stage meet in the same sums."""
    waiting, wire = [list[float]() for _ in ranks], [0.0 for _ in ranks]
    late, late_by = [], []
    for first in dict.fromkeys(rank.first_layer for rank in ranks):
        mates = [i for i, rank in enumerate(ranks) if rank.first_layer == first]
        least = np.min([ranks[i].sums for i in mates], axis=0)
        for i in mates:
            waiting[i] = (ranks[i].sums - least).mean(axis=0).tolist()
            wire[i] = float(least.sum(axis=1).mean())
        last = min(mates, key=lambda i: sum(waiting[i]))
        if len(mates) > 1:
            late.append(ranks[last].rank)
            late_by.append(ranks[last].own - float(np.median([ranks[i].own for i in mates])))
    return Skew(waiting, wire, late, late_by)
