"""Which units of the model belong to which rank."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

T = TypeVar("T")


def split_units(units: int, size: int, weights: Sequence[float] | None = None) -> list[range]:
    """Divide range(units) over `size` ranks in contiguous ranges.

    Without weights the sizes differ by at most one and the first ranks have the remainder. With weights (one for each
    rank, not negative, not all 0) the borders lie at the rounded running sums of the shares.
    """
    if weights is None:
        base, rest = divmod(units, size)
        borders = [rank * base + min(rank, rest) for rank in range(size + 1)]
    else:
        total, running, borders = sum(weights), 0.0, [0]
        for weight in weights:
            running += weight
            borders.append(min(units, int(units * running / total + 0.5)))
        borders[-1] = units
    return [range(a, b) for a, b in itertools.pairwise(borders)]


@dataclass(frozen=True)
class Split:
    """By which units a part of the model is divided over ranks: `count` units of a kind.

    With `group`, what is divided are `group` times as many finer units, and a rank holds every unit that some of its
    own belong to: KV heads follow their query heads, and neighbours may share one.
    """

    kind: str
    count: int
    group: int = 1

    def ranges(self, size: int, weights: Sequence[float] | None = None) -> list[range]:
        """Each rank's units."""
        finer = split_units(self.count * self.group, size, weights)
        if self.group == 1:
            return finer
        return [range(own.start // self.group, own[-1] // self.group + 1) if own else range(0) for own in finer]


@dataclass(frozen=True)
class Division:
    """How `ranks` ranks divide a model.

    The ranks of a stage divide each of its layers, evenly or by their `shares` (one for each rank of all stages). The
    `stages` are groups of equal size that hold layers one after the other: the last ranks have the first layers, and
    rank 0, which samples, is of the group that has the last layers and the head. If they are `context_parallel`, each
    rank of a stage holds the cache of all heads for some of the positions.
    """

    ranks: int
    shares: tuple[float, ...] | None = None
    stages: int = 1
    context_parallel: bool = False

    @property
    def group(self) -> int:
        """Ranks of a stage."""
        return self.ranks // self.stages

    @property
    def holders(self) -> int:
        """Over how many ranks the positions of a cache are divided."""
        return self.group if self.context_parallel else 1

    def stage_of(self, rank: int) -> int:
        """0 for the stage that embeds the tokens."""
        return self.stages - 1 - rank // self.group

    def mates_of(self, rank: int) -> range:
        """The ranks of the same stage."""
        first = rank // self.group * self.group
        return range(first, first + self.group)


@dataclass(frozen=True)
class Partition:
    """One rank's units of every split of the model, in the layers of its stage.

    Of what is in no layer it holds the tensors named in `outer`. Without `layers` it is of a single stage. With several
    `holders` it has the cache of all heads for its part of the positions, instead of all positions for its heads.
    """

    ranges: Mapping[Split, range]
    layers: range | None = None
    outer: frozenset[str] = frozenset()
    is_first: bool = True
    is_last: bool = True
    holders: int = 1

    def __getitem__(self, split: Split) -> range:
        return self.ranges[split]

    def holds(self, layer: int | None, name: str) -> bool:
        """Whether it has a part of a tensor: of a layer, or the one named so if that is None."""
        if self.layers is None:
            return True
        return name in self.outer if layer is None else layer in self.layers

    def own(self, layers: Sequence[T]) -> Sequence[T]:
        """Of something for each layer, those of this stage."""
        return layers if self.layers is None else layers[self.layers.start : self.layers.stop]

    def is_idle(self) -> bool:
        """Whether some part of the model has nothing for this rank to do."""
        return not all(self.ranges.values())


def partitions(splits: Iterable[Split], size: int, weights: Sequence[float] | None = None) -> list[Partition]:
    """Each rank's part of a model that is divided so."""
    of_split = {split: split.ranges(size, weights) for split in splits}
    return [Partition({split: ranges[rank] for split, ranges in of_split.items()}) for rank in range(size)]


MICRO_TOKENS = 16
"""The fewest tokens of a step that go through the stages by themselves: fewer read the weights again for too little."""
ROWS_OF_STEP = 4
"""The fewest sequences for which a step of their own is worth it."""


def steps_at_once(sequences: int, stages: int) -> int:
    """In how many steps under way at the same time so many sequences go through a pipeline: up to one for each stage.

    Each reads the weights again, and so few as ROWS_OF_STEP take about as long as one.
    """
    return max(1, min(stages, sequences // ROWS_OF_STEP))


def micro_batches(tokens: int, stages: int) -> int:
    """In how many parts a step goes through a pipeline: more keep the stages busier, until each has too few tokens."""
    return max(1, min(4 * stages, tokens // MICRO_TOKENS)) if stages > 1 else 1


@cache
def divide_layers(costs: tuple[int, ...], before: int, after: int, stages: int) -> tuple[range, ...]:
    """Contiguous layers of each stage, so that the most costly stage costs least; at least one layer each.

    `before` is what the first stage has besides its layers, `after` the last.
    """
    sums = [0, *itertools.accumulate(costs)]
    count = len(costs)
    best: list[tuple[int, tuple[int, ...]]] = [(before + sums[end], (end,)) for end in range(count + 1)]
    for stage in range(1, stages):
        more = after if stage == stages - 1 else 0
        best = [
            min(
                (
                    (max(best[start][0], sums[end] - sums[start] + more), (*best[start][1], end))
                    for start in range(stage, end)
                ),
                default=(sums[-1] * (count + 1) + before + after + 1, ()),
            )
            for end in range(count + 1)
        ]
    ends = best[count][1]
    return tuple(range(a, b) for a, b in itertools.pairwise((0, *ends)))
