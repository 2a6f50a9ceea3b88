"""Arrays of a checkpoint's files that are no rows of weights by themselves: scales, and integers packed into words.

Everything is read by position, and only the rows and columns that are asked for.
"""

from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np

from mpillama.quant.registry import STORED_TYPES

DTYPES = {
    "BOOL": "|u1", "U8": "|u1", "I8": "|i1", "F8_E4M3": "|u1", "F8_E8M0": "|u1", "F16": "<f2", "BF16": "<u2",
    "I32": "<u4", "F32": "<f4", "I64": "<i8",
}  # fmt: skip
"""How NumPy holds the bits of safetensors' types; packed words are unsigned."""


class Source(Protocol):
    """The files of a checkpoint, open for reading by offset."""

    def fill(self, file: int, buffer: memoryview, offset: int, name: str) -> None:
        """Fill a buffer (contiguous bytes) with bytes of the tensor `name`."""

    def path(self, file: int) -> str:
        """Where a file lies."""

    def forget(self, file: int, offset: int, count: int) -> None:
        """These bytes are not wanted again."""


@dataclass(frozen=True)
class StoredArray:
    """One tensor of a file as it lies there; `dtype` is safetensors' name of its type, or that of a stored type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int

    @property
    def bytes(self) -> int:
        """ValueError if a length is not positive."""
        if self.dtype in STORED_TYPES:
            return STORED_TYPES[self.dtype].tensor_bytes(self.shape)
        if any(length < 1 for length in self.shape):
            raise ValueError(f"its shape is {self.shape}")
        return prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize

    def read(self, source: Source, lines: range, places: range, shape: tuple[int, int]) -> np.ndarray:
        """Some lines (steps allowed) and places of the array seen as `shape`, in the dtype that DTYPES gives."""
        kind = np.dtype(DTYPES[self.dtype])
        whole, first = shape[1] * kind.itemsize, places.start * kind.itemsize
        out = np.empty((len(lines), len(places)), kind)
        if not out.size:
            return out
        start = self.offset + lines.start * whole + first
        if len(places) == shape[1]:  # what lies between lines of a step > 1 comes along
            span = np.empty((lines[-1] - lines[0] + 1, shape[1]), kind)
            source.fill(self.file, span.reshape(-1).view(np.uint8).data, start, self.name)
            if lines.step == 1:
                source.forget(self.file, start, span.nbytes)
            return span[:: lines.step]
        for i in range(len(lines)):
            place = start + i * lines.step * whole
            source.fill(self.file, out[i].view(np.uint8).data, place, self.name)
        return out


@dataclass(frozen=True)
class Integers:
    """A matrix of integers in an array: one each, or several in a word.

    `shape` is the matrix's. `order` says at which place of a word, counted from its lowest bits, the elements that
    follow each other stand; without one there is an element for each of the array's. They follow each other along
    `packed`: "columns" or "rows" of the matrix. A `transposed` array has the matrix's columns as its lines, which may
    be longer. Row i of the matrix is row `first` + `step` * i of the array.
    """

    array: StoredArray
    shape: tuple[int, int]
    order: tuple[int, ...] = ()
    packed: str = "columns"
    transposed: bool = False
    first: int = 0
    step: int = 1

    @property
    def bytes(self) -> int:
        """Bytes of the file that belong to the matrix."""
        word, per = np.dtype(DTYPES[self.array.dtype]).itemsize, max(1, len(self.order))
        rows, columns = self.shape
        if self.packed == "rows":
            rows = -(-rows // per)
        else:
            columns = -(-columns // per)
        return rows * columns * word

    def expected_shape(self) -> tuple[int, int]:
        """What the array's shape must be, for a matrix that fills it."""
        per = max(1, len(self.order))
        rows, columns = self.shape
        rows, columns = (-(-rows // per), columns) if self.packed == "rows" else (rows, -(-columns // per))
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self, source: Source, rows: range, columns: range) -> np.ndarray:
        """Elements [rows, columns], unsigned if they are packed."""
        per = max(1, len(self.order))
        rows = range(self.first + self.step * rows.start, self.first + self.step * rows.stop, self.step)
        of_rows, of_columns = rows, columns
        if self.packed == "rows" and per > 1:
            of_rows = range(rows.start // per, -(-rows.stop // per))
        elif per > 1:
            of_columns = range(columns.start // per, -(-columns.stop // per))
        if self.transposed:
            raw = self.array.read(source, of_columns, of_rows, two_lengths(self.array)).T
        else:
            raw = self.array.read(source, of_rows, of_columns, self.expected_shape())
        if per == 1:
            return raw
        return self._unpacked(raw, rows, columns)

    def _unpacked(self, raw: np.ndarray, rows: range, columns: range) -> np.ndarray:
        per, axis = len(self.order), 1 if self.packed == "rows" else 2
        bits = 8 * raw.itemsize // per
        shifts, mask = np.array(self.order, raw.dtype) * raw.dtype.type(bits), raw.dtype.type((1 << bits) - 1)
        elements = np.stack([(raw >> shift & mask).astype(np.uint8) for shift in shifts], axis=axis)
        if axis == 1:
            start = rows.start % per
            return elements.reshape(len(raw) * per, raw.shape[1])[start : start + len(rows)]
        start = columns.start % per
        return elements.reshape(len(raw), raw.shape[1] * per)[:, start : start + len(columns)]


@dataclass(frozen=True)
class Scales:
    """A number for every block of `block` (rows, columns) of a matrix; the array has no other order than its blocks'.

    With `transposed` the array has the matrix's columns as its lines. `first` and `step` are those of Integers.
    """

    array: StoredArray
    shape: tuple[int, int]
    block: tuple[int, int]
    transposed: bool = False
    first: int = 0
    step: int = 1

    @property
    def count(self) -> tuple[int, int]:
        """Blocks of the matrix in both directions."""
        return -(-self.shape[0] // self.block[0]), -(-self.shape[1] // self.block[1])

    @property
    def bytes(self) -> int:
        """Bytes of the file that belong to the matrix."""
        return prod(self.count) * np.dtype(DTYPES[self.array.dtype]).itemsize

    def read(self, source: Source, rows: range, columns: range) -> np.ndarray:
        """The scales [rows, blocks] of rows, for the blocks that these columns lie in."""
        height, width = self.block
        of_rows = range(rows.start // height, -(-rows.stop // height))
        of_columns = range(columns.start // width, -(-columns.stop // width))
        index = np.arange(rows.start, rows.stop) // height - of_rows.start
        of_rows = range(self.first + self.step * of_rows.start, self.first + self.step * of_rows.stop, self.step)
        if self.transposed:
            found = self.array.read(source, of_columns, of_rows, two_lengths(self.array)).T
        else:
            found = self.array.read(source, of_rows, of_columns, self.count)
        return found if height == 1 else found[index]

    def blocks_of(self, columns: range) -> np.ndarray:
        """Which of those scales each column has, int [columns]."""
        width = self.block[1]
        places: np.ndarray = np.arange(columns.start, columns.stop) // width - columns.start // width
        return places


def two_lengths(array: StoredArray) -> tuple[int, int]:
    """The shape of an array of lines."""
    lines, places = array.shape
    return lines, places


def read_whole(source: Source, array: StoredArray) -> np.ndarray:
    """A small array, of any shape."""
    out = np.empty(array.shape, DTYPES[array.dtype])
    source.fill(array.file, out.reshape(-1).view(np.uint8).data, array.offset, array.name)
    return out
