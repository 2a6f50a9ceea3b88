"""Heads in the order in which llama.cpp repeats groups: the first of every group, then the second of every group."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpillama.formats.checkpoint import StoredRows, StoredTensor
from mpillama.formats.part_of_heads import joined
from mpillama.formats.stored_arrays import Source
from mpillama.models.family import TiledHeads
from mpillama.quant.coded import Coded
from mpillama.quant.weight_type import BLOCK, Blocks, Float32, WeightType


@dataclass(frozen=True)
class ReorderedRows(StoredRows):
    """Rows whose columns are heads of `size`, taken as `heads` says."""

    heads: Sequence[int] = ()
    size: int = 1

    def rows(self, index: slice) -> "ReorderedRows":
        return replace(self, raw=self.raw[index])

    def decode(self) -> Float32:
        return self._taken(super().decode(), self.size)

    def blocks(self) -> Blocks:
        assert isinstance(self.type, WeightType)
        units = self.size // self.type.unit
        return tuple(self._taken(numbers, units) for numbers in super().blocks())

    def _taken(self, whole: np.ndarray, width: int) -> np.ndarray:
        """The heads of [rows, heads * width, …]."""
        by_head = whole.reshape(len(whole), -1, width, *whole.shape[2:])
        return by_head[:, list(self.heads)].reshape(len(whole), -1, *whole.shape[2:])


@dataclass(frozen=True, kw_only=True)
class TiledTensor(StoredTensor):
    """A tensor whose heads are read in the order of their groups."""

    tiled: TiledHeads

    @property
    def size(self) -> int:
        """Rows or columns of a head."""
        return self.shape[1 if self.tiled.columns else 0] // (self.tiled.groups * self.tiled.of_group)

    @property
    def _has_columns(self) -> bool:
        return self.tiled.columns or len(self.shape) == 1

    @property
    def block(self) -> int:
        return self.size if self._has_columns else super().block

    def keeps(self, weight_type: WeightType, chunk: int = 0) -> bool:
        return super().keeps(weight_type, chunk) and (not self._has_columns or self.size % BLOCK == 0)

    def read(self, source: Source, rows: range, columns: range) -> StoredRows | Coded:
        """Of columns the whole rows are read: blocks may reach over several heads."""
        wanted = columns if self._has_columns else rows
        heads = range(wanted.start // self.size, -(-wanted.stop // self.size))
        stored = [head % self.tiled.of_group * self.tiled.groups + head // self.tiled.of_group for head in heads]
        if self._has_columns:
            found = super().read(source, rows, range(self.shape[-1]))
            assert isinstance(found, StoredRows)
            return ReorderedRows(found.type, found.raw, found.factor, stored, self.size)
        read = super().read
        pieces = [read(source, range(head * self.size, (head + 1) * self.size), columns) for head in stored]
        first = heads.start * self.size
        return joined(pieces, self).rows(slice(rows.start - first, rows.stop - first))


def with_tiled_heads(tensor: StoredTensor, tiled: TiledHeads | None) -> StoredTensor:
    """The tensor, as its heads stand."""
    if (
        tiled is None
        or tiled.of_group == 1
        or len(tensor.shape) <= tiled.columns
        or tensor.shape[1 if tiled.columns else 0] % (tiled.groups * tiled.of_group)
    ):
        return tensor
    plain = {name: getattr(tensor, name) for name in StoredTensor.__dataclass_fields__}
    return TiledTensor(**plain, tiled=tiled)
