"""A matrix whose values are spread over several arrays of a checkpoint: codes, scales, zero points."""

from dataclasses import dataclass, replace
from math import gcd

import numpy as np

from mpillama.errors import UserError
from mpillama.formats.checkpoint import StoredTensor
from mpillama.formats.stored_arrays import Integers, Scales, Source, StoredArray, read_whole
from mpillama.quant.coded import Coded, as_float32
from mpillama.quant.grouped import GroupedType
from mpillama.quant.types.f32 import F32
from mpillama.quant.types.q8_0 import Q8_0
from mpillama.quant.weight_type import BLOCK, Float32, WeightType


@dataclass(frozen=True, kw_only=True)
class ScaledTensor(StoredTensor):
    """value = (code - zero) * scale * whole, each as its array says; what is absent does not count.

    `kept` is the type that holds such numbers, for groups of `within` columns that share a scale (0: all of a row do).
    `table` gives the codes' values; without one they are integers, of which `zero` is 0, or that of `zeros` plus
    `zero_offset`. Both are held less `middle`. `whole` is a single number; `reciprocal` says that values are divided by
    it. `group_index` says which scale each column has; `ordered` that it says nothing new. Row 0 is row `first_row` of
    the arrays, which may have more rows.
    """

    codes: Integers
    scales: Scales
    kept: WeightType
    within: int
    table: Float32 | None = None
    zero: int = 0
    zeros: Integers | None = None
    zero_offset: int = 0
    middle: int = 0
    whole: StoredArray | None = None
    reciprocal: bool = False
    group_index: StoredArray | None = None
    ordered: bool = True
    first_row: int = 0

    @property
    def block(self) -> int:
        return 1

    @property
    def parts(self) -> tuple[StoredArray, ...]:
        of_matrix = (part.array for part in (self.codes, self.scales, self.zeros) if part is not None)
        return (*of_matrix, *(array for array in (self.whole, self.group_index) if array is not None))

    @property
    def bytes(self) -> int:
        """Those of codes, scales and zero points that belong to this matrix."""
        whole = sum(part.bytes for part in (self.codes, self.scales, self.zeros) if part is not None)
        return whole * self.shape[0] // self.codes.shape[0]

    def some_rows(self, name: str, first: int, count: int) -> "ScaledTensor":
        return replace(self, name=name, shape=(count, self.shape[1]), first_row=self.first_row + first)

    @property
    def loses(self) -> bool:
        return not self.ordered

    @property
    def is_wide(self) -> bool:
        return self.codes.transposed

    def held_as(self, chunk: int = 0) -> WeightType:
        """The type that keeps the numbers, if blocks of 32 of every chunk of columns lie within a group each.

        Else float32, which has room for their values (also of groups below 32, but for types that have halves of
        blocks); and 8 bits where every column has its own group.
        """
        if not self.ordered:
            return Q8_0
        return self._as_kept if self._fits(chunk) else F32

    @property
    def _as_kept(self) -> WeightType:
        return self.kept.for_groups(self.within) if isinstance(self.kept, GroupedType) else self.kept

    def keeps(self, weight_type: WeightType, chunk: int = 0) -> bool:
        return self.ordered and self._fits(chunk) and weight_type == self._as_kept

    def _fits(self, chunk: int) -> bool:
        if self.within == 0:
            return True
        if BLOCK % self.within == 0 and not isinstance(self.kept, GroupedType):
            return chunk % self.within == 0
        return gcd(self.within, chunk) % BLOCK == 0

    def read(self, source: Source, rows: range, columns: range) -> Coded:
        """Some rows and columns; UserError for numbers that are none."""
        if not rows or not columns:
            return Coded(np.zeros((len(rows), len(columns)), np.int8), np.zeros((len(rows), 0)), "F32",
                         np.zeros(len(columns), int), self.table, np.zeros((len(rows), 0), np.int16))  # fmt: skip
        rows = range(rows.start + self.first_row, rows.stop + self.first_row)
        of_scales, group = columns, self.scales.blocks_of(columns)
        if self.group_index is not None:
            group = self._group_index(source, columns)
            if not self.ordered:
                of_scales = range(self.shape[1])
            else:
                self._refuse_order(source, group, columns)
                group = self.scales.blocks_of(columns)
        scales = self.scales.read(source, rows, of_scales)
        codes = self.codes.read(source, rows, columns)
        values = as_float32(scales, self.scales.array.dtype)
        self._refuse_not_finite(source, ~np.isfinite(values), rows, self.scales.array)
        found = Coded(codes, scales, self.scales.array.dtype, group, self.table, whole=self._whole(source))
        if self.table is None:
            return self._integers(source, found, rows, of_scales)
        none = np.isnan(self.table)
        if none.any():
            self._refuse_not_finite(source, none[codes], rows, self.codes.array)
        return found

    def _integers(self, source: Source, found: Coded, rows: range, of_scales: range) -> Coded:
        """With zero points taken off."""
        if self.zeros is None:
            zeros = np.full((len(rows), found.scales.shape[1]), self.zero, np.int16)
        else:
            width = self.scales.block[1]
            groups = range(of_scales.start // width, -(-of_scales.stop // width))
            zeros = self.zeros.read(source, rows, groups).astype(np.int16) + np.int16(self.zero_offset)
        numbers = found.codes.astype(np.int16) - zeros[:, found.group]
        return replace(found, codes=numbers, zeros=zeros - np.int16(self.middle))

    def _whole(self, source: Source) -> np.float32 | None:
        if self.whole is None:
            return None
        whole = as_float32(read_whole(source, self.whole).reshape(1), self.whole.dtype)
        with np.errstate(divide="ignore"):
            whole = np.float32(1) / whole if self.reciprocal else whole
        if not np.isfinite(whole[0]):
            raise UserError(
                f"{source.path(self.whole.file)}: tensor {self.whole.name} is no number that weights can be scaled by: "
                "the file is damaged, download it again."
            )
        return np.float32(whole[0])

    def _group_index(self, source: Source, columns: range) -> np.ndarray:
        assert self.group_index is not None
        found: np.ndarray = self.group_index.read(source, range(1), columns, (1, self.shape[1]))[0].astype(np.int64)
        if found.max(initial=0) >= self.scales.count[1]:
            raise UserError(
                f"{source.path(self.group_index.file)}: tensor {self.group_index.name} names group {found.max()}, but "
                f"there are scales for {self.scales.count[1]}: the file is damaged, download it again."
            )
        return found

    def _refuse_order(self, source: Source, index: np.ndarray, columns: range) -> None:
        assert self.group_index is not None
        if not np.array_equal(index, np.arange(columns.start, columns.stop) // self.scales.block[1]):
            raise UserError(
                f"{source.path(self.group_index.file)}: the groups of tensor {self.group_index.name} are no runs of "
                "columns, against what quantization_config says: set desc_act there to true if the model was made so."
            )

    def _refuse_not_finite(self, source: Source, bad: np.ndarray, rows: range, array: StoredArray) -> None:
        if not bad.any():
            return
        row = rows[int(np.flatnonzero(bad.any(axis=1))[0])]
        raise UserError(
            f"{source.path(array.file)}: tensor {array.name} holds NaN or an infinity for row {row} of {self.name}: "
            "the file is damaged, download it again."
        )
