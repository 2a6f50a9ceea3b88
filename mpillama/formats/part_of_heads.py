"""A matrix that a checkpoint has as some rows of every head of another one, perhaps turned."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mpillama.formats.checkpoint import StoredRows, StoredTensor
from mpillama.formats.stored_arrays import Source, StoredArray
from mpillama.models.tensors import PartOfHeads, TensorSpec
from mpillama.quant.coded import Coded
from mpillama.quant.types.f32 import F32
from mpillama.quant.weight_type import WeightType


@dataclass(frozen=True, kw_only=True)
class HeadsTensor(StoredTensor):
    """Of each head's rows of `whole` those that `part` says; turned ones are read as values."""

    whole: StoredTensor
    part: PartOfHeads

    @property
    def bytes(self) -> int:
        return self.whole.bytes * self.part.rows // self.part.of

    @property
    def parts(self) -> tuple[StoredArray, ...]:
        return self.whole.parts

    @property
    def block(self) -> int:
        return 1 if self.part.turned else self.whole.block

    @property
    def loses(self) -> bool:
        return self.whole.loses

    def held_as(self, chunk: int = 0) -> WeightType:
        """As the whole; but blocks and scales of a matrix that is turned would lie across it, and become float32."""
        kind = self.whole.held_as(0 if self.part.turned else chunk)
        return F32 if self.part.turned and len(kind.lanes) > 1 else kind

    def keeps(self, weight_type: WeightType, chunk: int = 0) -> bool:
        return not self.part.turned and self.whole.keeps(weight_type, chunk)

    def read(self, source: Source, rows: range, columns: range) -> StoredRows | Coded:
        of_head = self.shape[0] // self.part.heads
        heads = range(rows.start // of_head, -(-rows.stop // of_head))
        wanted = slice(rows.start - heads.start * of_head, rows.stop - heads.start * of_head)
        if not self.part.turned:
            return joined([self._head(source, head, columns) for head in heads], self.whole).rows(wanted)
        every = range(self.whole.shape[1])
        turned = [self._head(source, head, every).decode().T[:, columns.start : columns.stop] for head in heads]
        values = np.concatenate([np.zeros((0, len(columns)), np.float32), *turned])
        return StoredRows(F32, np.ascontiguousarray(values).view(np.uint8)).rows(wanted)

    def _head(self, source: Source, head: int, columns: range) -> StoredRows | Coded:
        """What a head has in the whole."""
        start = head * self.part.of + self.part.first
        return self.whole.read(source, range(start, start + self.part.rows), columns)


def joined(pieces: list[StoredRows | Coded], whole: StoredTensor) -> StoredRows | Coded:
    """Rows of the same columns, one below the other."""
    first = pieces[0] if pieces else StoredRows(whole.type, np.empty((0, 0), np.uint8))
    if isinstance(first, StoredRows):
        return replace(
            first, raw=np.concatenate([first.raw[:0], *(p.raw for p in pieces if isinstance(p, StoredRows))])
        )
    coded = [piece for piece in pieces if isinstance(piece, Coded)]
    zeros = [piece.zeros for piece in coded if piece.zeros is not None]
    return replace(
        first, codes=np.concatenate([piece.codes for piece in coded]),
        scales=np.concatenate([piece.scales for piece in coded]), zeros=np.concatenate(zeros) if zeros else None,
    )  # fmt: skip


def part_of_heads(spec: TensorSpec, table: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """A tensor as a part of the one that the table has in its place; None if it has none, or one of another shape."""
    part = spec.part_of
    whole = table.get(part.name) if part else None
    if part is None or whole is None:
        return None
    columns = spec.source_shape[0] // part.heads if part.turned else spec.source_shape[1]
    if whole.shape != (part.heads * part.of, columns):
        return None
    return HeadsTensor(
        name=spec.name, shape=spec.source_shape, stored=whole.stored, file=whole.file, offset=whole.offset,
        whole=whole, part=part,
    )  # fmt: skip
