"""Which units of the model belong to which rank."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


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
class Partition:
    """One rank's units of every split of the model."""

    ranges: Mapping[Split, range]

    def __getitem__(self, split: Split) -> range:
        return self.ranges[split]

    def is_idle(self) -> bool:
        """Whether some part of the model has nothing for this rank to do."""
        return not all(self.ranges.values())


def partitions(splits: Iterable[Split], size: int, weights: Sequence[float] | None = None) -> list[Partition]:
    """Each rank's part of a model that is divided so."""
    of_split = {split: split.ranges(size, weights) for split in splits}
    return [Partition({split: ranges[rank] for split, ranges in of_split.items()}) for rank in range(size)]
