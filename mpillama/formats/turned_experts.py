"""Stacked experts as gpt-oss and Llama 4 keep them: matrices transposed, and biases."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpillama.formats.checkpoint import StoredRows, StoredTensor
from mpillama.formats.foreign import damaged
from mpillama.formats.stored_arrays import Source, StoredArray
from mpillama.models.router import MOST_EXPERTS
from mpillama.quant.weight_type import StoredType


@dataclass(frozen=True, kw_only=True)
class TurnedTensor(StoredTensor):
    """A matrix whose rows are places of the array's lines, or a vector of an array of one line.

    `places` of a line; row i is place `first` + `step` * i of each.
    """

    places: int
    first: int = 0
    step: int = 1

    @property
    def is_wide(self) -> bool:
        return True

    def read(self, source: Source, rows: range, columns: range) -> StoredRows:
        """Some rows and columns; of a vector a range of its numbers, which are called columns."""
        lines, wanted = (columns, rows) if len(self.shape) == 2 else (rows, columns)
        kind: StoredType = self.type
        array = StoredArray(self.name, str(kind.safetensors), self.shape, self.file, self.offset)
        place = range(self.first + self.step * wanted.start, self.first + self.step * (wanted.stop - 1) + 1)
        height = self.shape[1] if len(self.shape) == 2 else 1
        raw = array.read(source, lines, place if wanted else range(0), (height, self.places))[:, :: self.step]
        values = np.ascontiguousarray(raw.T if len(self.shape) == 2 else raw)
        return StoredRows(kind, values.view(np.uint8).reshape(len(values), -1))


def turned_experts(
    path: str, prefix: str, tensor: StoredTensor, parts: tuple[str, ...], by_turns: bool
) -> Iterator[StoredTensor]:
    """Cut [experts, columns, rows], or biases [experts, rows], into those of each expert and part.

    The rows of the parts are there by turns, or one part behind the other.
    """
    is_bias = len(tensor.shape) == 2
    if len(tensor.shape) not in (2, 3) or tensor.shape[0] > MOST_EXPERTS or tensor.shape[-1] % len(parts):
        raise damaged(path, f"tensor {tensor.name!r} of stacked experts has shape {tensor.shape}")
    experts, places, rows = tensor.shape[0], tensor.shape[-1], tensor.shape[-1] // len(parts)
    shape = (rows,) if is_bias else (rows, tensor.shape[1])
    size = tensor.bytes // experts
    for expert in range(experts):
        for number, part in enumerate(parts):
            first, step = (number, len(parts)) if by_turns else (number * rows, 1)
            yield TurnedTensor(
                name=f"{prefix}{expert}.{part}.{'bias' if is_bias else 'weight'}", shape=shape, stored=tensor.stored,
                file=tensor.file, offset=tensor.offset + expert * size, places=places, first=first, step=step,
            )  # fmt: skip
