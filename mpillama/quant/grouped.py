"""What types with a scale for many columns have in common: Hugging Face's integers in groups, and floats of 8 bits.

Their numbers are (codes [rows, blocks, 32], scales [rows, blocks], …): what a group of columns has in common stands at
each of its blocks. In row lanes it lies in ".supers", once for a group.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from mpillama.quant.coded import Coded
from mpillama.quant.weight_type import BLOCK, LANES, Arrays, Blocks, Float32, LaneArray, WeightType, by_group, by_row

GROUPS = (128, 64, 32)
"""Columns that share a scale in memory; the first is what a type has unless its name says another."""


@dataclass(frozen=True)
class GroupedType(WeightType):
    """`group` is the k-values of an entry of ".supers": of each of `beside`'s dtypes one for each of 16 rows."""

    group: int = GROUPS[0]

    unit = BLOCK

    @property
    @abstractmethod
    def values(self) -> LaneArray:
        """The codes in row lanes."""

    @property
    @abstractmethod
    def beside(self) -> tuple[str, ...]:
        """The dtypes of what a group has: its scale, and what else there is."""

    @property
    def lanes(self) -> tuple[LaneArray, ...]:
        size = sum(np.dtype(dtype).itemsize for dtype in self.beside)
        return self.values, LaneArray(".supers", "|u1", size * LANES, self.group)

    def for_groups(self, columns: int) -> Self:
        group = next((g for g in GROUPS if columns % g == 0), BLOCK)
        name = self.name.partition("/")[0]
        return replace(self, group=group, name=name if group == GROUPS[0] else f"{name}/{group}")

    def blocks_of(self, raw: np.ndarray) -> Blocks:
        raise NotImplementedError(f"no file has rows of {self.name}")  # several arrays have: taken from Coded

    def quantise(self, x: Float32) -> Blocks:
        return self.quantise_within(x, x.shape[1])

    def quantise_within(self, x: Float32, width: int, importance: Float32 | None = None) -> Blocks:
        group = self.lanes[1].columns(width)
        with np.errstate(all="ignore"):  # infinities, and what is no number, show in the scale
            blocks = self.quantise_groups(x.reshape(len(x), -1, group))
        codes, *of_groups = blocks
        repeated = (np.repeat(each, group // BLOCK, axis=1) for each in of_groups)
        return codes.reshape(len(x), -1, BLOCK), *repeated

    @abstractmethod
    def quantise_groups(self, groups: Float32) -> Blocks:
        """Round float32 [rows, groups, k] to codes of this shape, and what each group has."""

    def to_lanes(self, blocks: Blocks) -> Arrays:
        codes, *of_blocks = blocks
        as_bytes = [by_group(each).view(np.uint8) for each in of_blocks]
        return self.codes_to_lanes(codes), np.concatenate(as_bytes, axis=2)

    def from_lanes(self, arrays: Arrays) -> Blocks:
        lanes, supers = arrays
        found, start = [], 0
        for dtype in self.beside:
            stop = start + LANES * np.dtype(dtype).itemsize
            found.append(by_row(np.ascontiguousarray(supers[:, :, start:stop]).view(dtype)))
            start = stop
        return self.codes_from_lanes(lanes), *found

    @abstractmethod
    def codes_to_lanes(self, codes: np.ndarray) -> np.ndarray:
        """Row lanes [groups, units, …] of codes [rows, blocks, 32]."""

    @abstractmethod
    def codes_from_lanes(self, lanes: np.ndarray) -> np.ndarray:
        """Undo codes_to_lanes."""

    @abstractmethod
    def take(self, coded: Coded) -> Blocks:
        """The numbers of a checkpoint as they are."""


def steps_of(codes: np.ndarray) -> np.ndarray:
    """Codes [rows, blocks, 32] as steps of row lanes, [groups, blocks, 8, 16, 4]."""
    steps: np.ndarray = codes.reshape(len(codes) // LANES, LANES, codes.shape[1], 8, 4).transpose(0, 2, 3, 1, 4)
    return steps


def codes_of(steps: np.ndarray) -> np.ndarray:
    """Undo steps_of."""
    codes: np.ndarray = steps.transpose(0, 3, 1, 2, 4)
    return codes.reshape(len(steps) * LANES, steps.shape[1], BLOCK)
