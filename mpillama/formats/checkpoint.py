"""What a checkpoint in a foreign format holds, in Hugging Face's names: everything but the weights themselves.

Rank 0 reads it and gives it to the others, who then read the bytes of their own slices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mpillama.formats.stored_arrays import Source, StoredArray
from mpillama.quant.coded import Coded, HasFactor
from mpillama.quant.registry import STORED_TYPES, WEIGHT_TYPES
from mpillama.quant.weight_type import BLOCK, Blocks, Float32, StoredType, WeightType


@dataclass(frozen=True)
class StoredRows:
    """Rows of a tensor in their own bytes, uint8 [rows, bytes]: all columns, or whole blocks of some."""

    type: StoredType
    raw: np.ndarray
    factor: np.float32 = np.float32(1)

    def __len__(self) -> int:
        return len(self.raw)

    def rows(self, index: slice) -> "StoredRows":
        """Some of the rows."""
        return StoredRows(self.type, self.raw[index], self.factor)

    def decode(self) -> Float32:
        """The values."""
        values = self.type.decode(self.raw)
        return values if self.factor == 1 else values * self.factor

    def blocks(self) -> Blocks:
        """The numbers of a type that kernels take."""
        assert isinstance(self.type, WeightType)
        numbers = self.type.blocks_of(self.raw)
        return self.type.times(numbers, self.factor) if isinstance(self.type, HasFactor) else numbers


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: its shape as Hugging Face has it, and where its bytes lie.

    `stored` names the type of the values, one of STORED_TYPES; rows follow each other without gaps. `offset` is the
    64-bit byte offset in file number `file`. A ScaledTensor is spread over several arrays.
    `interleaved` is head_dim where the rows of each head stand as rotary pairs (row 2i of the file is row i of the
    head, row 2i + 1 is row i + head_dim / 2), else 0. All values are multiplied by `factor`. `added` is what a vector's
    stored values lack, as those of norms that count from 1; with `is_logarithm` it is stored as the logarithm of its
    values.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    file: int
    offset: int
    interleaved: int = 0
    factor: np.float32 = np.float32(1)
    added: float = 0.0
    is_logarithm: bool = False

    @property
    def type(self) -> StoredType:
        return STORED_TYPES[self.stored]

    @property
    def bytes(self) -> int:
        """ValueError if the shape is impossible, or rows are no whole number of blocks."""
        return self.type.tensor_bytes(self.shape)

    @property
    def parts(self) -> tuple[StoredArray, ...]:
        """The arrays of the files that it consists of."""
        return (StoredArray(self.name, self.stored, self.shape, self.file, self.offset),)

    @property
    def block(self) -> int:
        """Columns that can be read only together."""
        return self.type.block

    @property
    def loses(self) -> bool:
        """Whether no type of weights has its numbers, so that they are rounded to another."""
        return self.stored not in WEIGHT_TYPES

    @property
    def is_wide(self) -> bool:
        """Whether the file has columns one after the other, so that runs of many rows are better."""
        return False

    def held_as(self, chunk: int = 0) -> WeightType:
        """The type that it has in memory unless the user asks for another.

        `chunk` is the number of columns that are padded to whole blocks of 32 by themselves, 0 for all together.
        """
        return self.type.held_as()

    def keeps(self, weight_type: WeightType, chunk: int = 0) -> bool:
        """Whether the stored numbers go over as they are: the same type, and no block of 32 is cut or padded."""
        return self.type == weight_type and (chunk or self.shape[1]) % BLOCK == 0

    def meant(self, values: Float32) -> Float32:
        """What a vector's stored values stand for."""
        if self.is_logarithm:
            values = np.exp(values.astype(np.float64)).astype(np.float32)
        return values + np.float32(self.added)

    def some_rows(self, name: str, first: int, count: int) -> "StoredTensor":
        """Rows of a matrix, or numbers of a vector, as a tensor with a name of its own."""
        size = self.type.row_bytes(self.shape[1] if len(self.shape) > 1 else 1)
        return replace(self, name=name, shape=(count, *self.shape[1:]), offset=self.offset + first * size)

    def read(self, source: Source, rows: range, columns: range) -> StoredRows | Coded:
        """A range of columns (whole blocks) of a range of rows."""
        whole = self.type.row_bytes(self.shape[-1])
        first, last = (self.type.row_bytes(c) for c in (columns.start, columns.stop))
        raw = np.empty((len(rows), last - first), np.uint8)
        start = self.offset + rows.start * whole + first
        if last - first == whole:
            source.fill(self.file, raw.reshape(-1).data, start, self.name)
            source.forget(self.file, start, raw.nbytes)
        else:  # the rest of each row is for other ranks, perhaps of this host: it may stay in the cache
            for i in range(len(rows) if raw.size else 0):
                source.fill(self.file, raw[i].data, start + i * whole, self.name)
        return StoredRows(self.type, raw, self.factor)


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration in Hugging Face's spelling, its texts by file name, and the table of its tensors."""

    path: str
    kind: str
    config_json: Mapping[str, Any]
    texts: Mapping[str, bytes] = field(repr=False)
    files: tuple[str, ...]
    file_sizes: tuple[int, ...]
    tensors: Mapping[str, StoredTensor] = field(repr=False)


# -- Which of several chat templates counts, for models that come with a list of them ---------------------------------


DEFAULT = "default"


def named_templates(found: Any) -> dict[str, str]:
    """Templates by name, of a tokenizer_config.json's `chat_template`: one text, or a list with names."""
    if isinstance(found, str):
        return {DEFAULT: found} if found else {}
    entries = [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
    pairs = [(entry.get("name"), entry.get("template")) for entry in entries]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str) and text}


def only_template(templates: Mapping[str, str]) -> str:
    """The default one, or the only one; "" if somebody would have to choose."""
    return templates.get(DEFAULT) or (next(iter(templates.values())) if len(templates) == 1 else "")
