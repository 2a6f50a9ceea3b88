"""The tensors of a model: their names, stored shapes, and which slice of each a rank owns.

Every stored array is split along one axis only: the first, or the second after the experts. A rank's slice is one
extent of the file, or one for each expert.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpillama.models.partition import Partition, Split
from mpillama.quant.types.f32 import F32
from mpillama.quant.weight_type import LANES, WeightType, round_up

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
EH_PROJ, EMBEDDING_NORM, HIDDEN_NORM = "model.eh_proj.weight", "model.enorm.weight", "model.hnorm.weight"
"""What a layer that drafts tokens makes its input with."""
EXPERTS = "mlp.experts."
LAYER_PREFIX = "model.layers.{}."


@dataclass(frozen=True)
class ArraySpec:
    """One stored array: `entries` of its first axis belong to each unit; with experts, of the second."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    entries: int
    experts: int = 0

    def slice_shape(self, units: int) -> tuple[int, ...]:
        """The shape of this many units."""
        if self.experts:
            return (self.experts, units * self.entries, *self.shape[2:])
        return (units * self.entries, *self.shape[1:])


@dataclass(frozen=True)
class PartOfHeads:
    """Where a matrix is inside one that a checkpoint may have in its place: some rows of each head.

    Of the `of` rows of a head they are the `rows` from `first` on; `turned`, their columns are the matrix's rows.
    """

    name: str
    heads: int
    of: int
    first: int
    rows: int
    turned: bool = False


@dataclass(frozen=True)
class TensorSpec:
    """A tensor: weight matrix [rows, columns] in row lanes, or a float32 vector [rows] (`vector`, columns 1).

    `rows` and `columns` are padded, `source_shape` is that of the checkpoint. Column-parallel matrices are stored
    [groups, …], row-parallel ones (`panel` set) [panels, groups, …]; a unit is `unit` rows, or one panel. Without a
    `split` every rank holds the whole. With `experts`, as many matrices follow each other under one name, of which a
    token meets `chosen`; source_shape is that of each. Checkpoints may hold it as a part of another matrix (`part_of`).
    """

    name: str
    split: Split | None
    rows: int
    columns: int
    weight_type: WeightType
    unit: int
    source_shape: tuple[int, ...]
    panel: int | None = None
    row_chunks: int = 1
    column_chunks: int = 1
    vector: bool = False
    experts: int = 0
    chosen: int = 1
    part_of: PartOfHeads | None = None

    def pad(self, source: np.ndarray) -> np.ndarray:
        """Return the checkpoint's tensor (source_shape) as float32 [rows, columns], zeros in the padding.

        Heads are padded one by one: rows and columns consist of `row_chunks` and `column_chunks` equal parts.
        """
        width = 1 if self.vector else self.source_shape[1]
        chunked = source.reshape(self.row_chunks, -1, self.column_chunks, width // self.column_chunks)
        padded = np.zeros(
            (self.row_chunks, self.rows // self.row_chunks, self.column_chunks, self.columns // self.column_chunks),
            np.float32,
        )
        padded[:, : chunked.shape[1], :, : chunked.shape[3]] = chunked
        return padded.reshape(self.rows) if self.vector else padded.reshape(self.rows, self.columns)

    @property
    def column_chunk(self) -> int:
        """The columns of the checkpoint that are padded by themselves, 0 if all are together."""
        return self.source_shape[1] // self.column_chunks if self.column_chunks > 1 else 0

    @property
    def source_names(self) -> tuple[str, ...]:
        """The checkpoint's names of the tensor: one, or one for each expert."""
        before, _, after = self.name.partition(EXPERTS)
        return tuple(f"{before}{EXPERTS}{e}.{after}" for e in range(self.experts)) if self.experts else (self.name,)

    @property
    def layer(self) -> int | None:
        """The decoder layer that it belongs to, None for the embedding, the last norm and the head."""
        found = re.match(LAYER_PREFIX.format("([0-9]+)"), self.name)
        return int(found[1]) if found else None

    @property
    def units(self) -> int:
        """Number of units that can be dealt to ranks."""
        return self.split.count if self.split else 1

    @property
    def checksums(self) -> int:
        """Number of units of all experts: each has a checksum of its own."""
        return self.units * max(1, self.experts)

    def arrays(self) -> tuple[ArraySpec, ...]:
        """The stored arrays: one for a vector, those of its weight type for a matrix."""
        lead: tuple[int, ...] = (self.experts,) if self.experts else ()
        if self.vector:
            return (ArraySpec(self.name, self.weight_type.lanes[0].dtype, (*lead, self.rows), self.unit, self.experts),)
        k, groups = self.panel or self.columns, self.rows // LANES
        lead += (self.columns // self.panel, groups) if self.panel else (groups,)
        unit = 1 if self.panel else self.unit // LANES
        return tuple(
            ArraySpec(self.name + a.suffix, a.dtype, (*lead, a.entries(k), a.entry), unit, self.experts)
            for a in self.weight_type.lanes
        )

    def units_of(self, part: Partition) -> range:
        """The units that a rank with this partition owns."""
        if part.layers is not None and not part.holds(self.layer, self.name):
            return range(0)
        return part[self.split] if self.split else range(1)


@dataclass(frozen=True)
class WeightTypes:
    """The weight type of each matrix: one for all, or by name."""

    default: WeightType
    by_name: Mapping[str, WeightType] | None = None

    def of(self, name: str) -> WeightType:
        """The type of the matrix `name`."""
        return (self.by_name or {}).get(name, self.default)


def whole_vector(name: str, size: int, padded: int) -> TensorSpec:
    """A vector that every rank holds in full."""
    return TensorSpec(name, None, padded, 1, F32, padded, (size,), vector=True)


def whole_matrix(
    name: str, rows: int, columns: int, weight_type: WeightType, part_of: PartOfHeads | None = None
) -> TensorSpec:
    """A matrix that every rank holds in full; columns are padded to blocks of 32, rows to groups."""
    padded, source = round_up(rows, LANES), (rows, columns)
    return TensorSpec(name, None, padded, round_up(columns, 32), weight_type, padded, source, part_of=part_of)


def whole_rows(name: str, rows: int, columns: int, types: WeightTypes) -> TensorSpec:
    """As whole_matrix, in the model's type; rows are padded to blocks of 32, since they are columns to what follows."""
    padded = round_up(rows, 32)
    return TensorSpec(name, None, padded, round_up(columns, 32), types.of(name), padded, (rows, columns))


def layer_prefix(layer: int) -> str:
    """The name that the tensors of a layer begin with."""
    return LAYER_PREFIX.format(layer)
