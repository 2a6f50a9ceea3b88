"""What a weight type is: how its values stand in rows of files, and in row lanes.

Row lanes are the one order of weights for native files, memory and kernels. Rows are taken in groups of 16; within a
group k advances and the 16 rows lie side by side. A column-parallel matrix is [groups, …]; a row-parallel one is cut
into panels of columns: [panels, groups, …].
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import ClassVar

import numpy as np

LANES = 16
"""Rows of a group: they lie side by side as the lanes of a vector register."""
BLOCK = 32
"""k-values that share a scale of activations; every k is padded to a multiple of this."""

Float32 = np.ndarray
Blocks = tuple[np.ndarray, ...]
"""Rows as a type's own numbers: arrays [rows, units, …] in the order of the row's elements; zeros are padding."""
Arrays = tuple[np.ndarray, ...]
"""The stored arrays of a matrix in row lanes."""


def round_up(count: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below `count`."""
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class StoredType(ABC):
    """How a file stores rows of weights: whole blocks of `block` values in `block_bytes` bytes.

    `ggml` is the type's number in GGUF, `safetensors` its name there; None where a format does not have it.
    """

    name: str
    block: int
    block_bytes: int
    ggml: int | None = None
    safetensors: str | None = None

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` values; ValueError if they are no whole number of blocks."""
        if columns % self.block:
            raise ValueError(f"rows of {columns} values are no whole number of {self.name} blocks of {self.block}")
        return columns // self.block * self.block_bytes

    def tensor_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a whole tensor; ValueError if a length is not positive or rows are no whole number of blocks."""
        if any(length < 1 for length in shape):
            raise ValueError(f"its shape is {tuple(shape)}")
        return prod(shape[:-1]) * self.row_bytes(shape[-1]) if shape else self.row_bytes(1)

    @abstractmethod
    def decode(self, raw: np.ndarray) -> Float32:
        """Return float32 [rows, columns] from the bytes of rows, uint8 [rows, row_bytes]."""

    @abstractmethod
    def held_as(self) -> "WeightType":
        """The type that such weights have in memory unless the user asks for another."""


@dataclass(frozen=True)
class LaneArray:
    """A stored array of a matrix: `entry` numbers of `dtype` for `unit` k-values of 16 rows; 0: for all of a row.

    `suffix` is "" for the values, ".scales" for what a block of 32 is multiplied by, ".supers" for what several blocks
    have in common. An entry never reaches over the border of a panel: where panels are narrower than the unit, or no
    multiple of it, the array has an entry for every greatest common divisor of both.
    """

    suffix: str
    dtype: str
    entry: int
    unit: int = BLOCK

    @property
    def part(self) -> str:
        """Its name among a matrix's arrays."""
        return self.suffix.removeprefix(".") or "values"

    @property
    def bytes(self) -> int:
        """Bytes of an entry."""
        return self.entry * np.dtype(self.dtype).itemsize

    def columns(self, k: int) -> int:
        """The k-values of an entry, in a matrix or panel of `k` columns."""
        return gcd(self.unit, k) or BLOCK

    def entries(self, k: int) -> int:
        """The number of entries for `k` columns."""
        return k // self.columns(k)


@dataclass(frozen=True)
class WeightType(StoredType):
    """A stored type that kernels take as it is.

    `number` is the kernels' (kernels/src/types). A unit is the k-values that Blocks have an entry of each array for; a
    number that stands for more is repeated there. `quantised` types meet activations that are quantised as well.
    """

    number: int = -1
    unit: ClassVar[int]
    quantised: ClassVar[bool]

    @property
    @abstractmethod
    def lanes(self) -> tuple[LaneArray, ...]:
        """The stored arrays of a matrix, the values first."""

    @abstractmethod
    def blocks_of(self, raw: np.ndarray) -> Blocks:
        """Take the bytes of rows apart, uint8 [rows, row_bytes]."""

    @abstractmethod
    def quantise(self, x: Float32) -> Blocks:
        """Round float32 [rows, k] to what the type holds."""

    def quantise_within(self, x: Float32, width: int, importance: Float32 | None = None) -> Blocks:
        """As quantise, but no number stands for k-values on both sides of a border between `width` columns.

        `importance` float32 [k] weighs the squares of errors; types whose rounding has no choice leave it aside.
        """
        return self.quantise(x)

    @abstractmethod
    def dequantise(self, blocks: Blocks) -> Float32:
        """Return float32 [rows, k]."""

    @abstractmethod
    def to_lanes(self, blocks: Blocks) -> Arrays:
        """Return an array [groups, units, entry] for each of `lanes`, whatever unit that has."""

    @abstractmethod
    def from_lanes(self, arrays: Arrays) -> Blocks:
        """Undo to_lanes."""

    def held_as(self) -> "WeightType":
        return self

    def decode(self, raw: np.ndarray) -> Float32:
        with np.errstate(invalid="ignore", over="ignore"):  # infinite scales are the file's own
            return self.dequantise(self.blocks_of(np.ascontiguousarray(raw)))

    def group_bytes(self, k: int) -> int:
        """Bytes of one group of 16 rows with `k` columns."""
        return sum(a.entries(k) * a.bytes for a in self.lanes)

    def super_columns(self, k: int) -> int:
        """The k-values of an entry of ".supers" in a matrix or panel of `k` columns, as kernels want to know it."""
        return next((a.columns(k) for a in self.lanes if a.part == "supers"), BLOCK)

    def pack(self, x: Float32, panel: int | None = None, importance: Float32 | None = None) -> Arrays:
        """Turn float32 [rows, k] into row lanes; with `panel`, into panels of that many columns.

        rows must be a multiple of 16 and k (and panel) of 32: pad with zeros before.
        """
        return self.pack_blocks(self.quantise_within(x, panel or x.shape[1], importance), panel)

    def pack_blocks(self, blocks: Blocks, panel: int | None = None) -> Arrays:
        """As pack, from the type's own numbers."""
        units = blocks[0].shape[1]
        width = panel // self.unit if panel else units
        return tuple(
            _to_panels(array, width, lane.columns(width * self.unit) // self.unit, panel is not None)
            for lane, array in zip(self.lanes, self.to_lanes(blocks), strict=True)
        )

    def unpack(self, arrays: Sequence[np.ndarray]) -> Float32:
        """Return the float32 matrix [rows, k] that row lanes hold."""
        return self.dequantise(self.unpack_blocks(arrays))

    def unpack_blocks(self, arrays: Sequence[np.ndarray]) -> Blocks:
        """Undo pack_blocks."""
        units = arrays[0].shape[-2] * self.lanes[0].unit // self.unit  # of a panel
        return self.from_lanes(tuple(_from_panels(array, units) for array in arrays))


def by_group(rows: np.ndarray) -> np.ndarray:
    """[rows, units] as [groups, units, 16]."""
    return np.ascontiguousarray(rows.reshape(-1, LANES, rows.shape[1]).swapaxes(1, 2))


def by_row(lanes: np.ndarray) -> np.ndarray:
    """Undo by_group."""
    return lanes.swapaxes(1, 2).reshape(-1, lanes.shape[1])


def _to_panels(lanes: np.ndarray, panel: int, each: int, cut: bool) -> np.ndarray:
    """Of every `each` units' entries take one, and if they are to be `cut`, make panels of [groups, units, …].

    That is [panels, groups, entries of a panel, …].
    """
    groups, units, *rest = lanes.shape
    if each > 1:
        lanes = lanes[:, ::each]
    if not cut:
        return np.ascontiguousarray(lanes)
    entries = panel // each
    return np.ascontiguousarray(lanes.reshape(groups, units // panel, entries, *rest).swapaxes(0, 1))


def _from_panels(lanes: np.ndarray, panel: int) -> np.ndarray:
    """Undo _to_panels, if there are panels: [groups, units, …]."""
    if lanes.shape[-2] != panel and lanes.shape[-2]:
        lanes = np.repeat(lanes, panel // lanes.shape[-2], axis=-2)
    if lanes.ndim == 3:
        return lanes
    panels, groups, units, *rest = lanes.shape
    return lanes.swapaxes(0, 1).reshape(groups, panels * units, *rest)
