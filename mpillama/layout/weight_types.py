"""The weight types and the arrays that hold 16 rows of each."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

LANES = 16
"""Rows of a group: they lie side by side as the lanes of a vector register."""
BLOCK = 32
"""k-values that share a scale; every k is padded to a multiple of this."""


def round_up(count: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below `count`."""
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class WeightType:
    """A way to store weights.

    `stored` is the dtype in the file, `bits` the dtype in which kernels tell the type (bit patterns where NumPy has
    no such float), `block_bytes` the bytes of 16 rows x 32 k-values, without the 32 bytes of scales of quantised types.
    """

    name: str
    stored: str
    bits: str
    block_bytes: int
    quantised: bool = False

    def __reduce__(self) -> tuple[Callable[[str], "WeightType"], tuple[str]]:
        # What another rank sends is again the one object that `is` tells apart.
        return _named, (self.name,)

    def value_shape(self, k: int) -> tuple[int, ...]:
        """Shape of one group of 16 rows with `k` columns."""
        return (k // BLOCK, self.block_bytes) if self.quantised else (k, LANES)

    def view(self, array: np.ndarray) -> np.ndarray:
        """Return `array` (of the stored dtype) in the dtype that the kernels know the type by."""
        return array.view(self.bits)

    def group_bytes(self, k: int) -> int:
        """Bytes of one group of 16 rows with `k` columns, scales included."""
        return k // BLOCK * (self.block_bytes + (2 * LANES if self.quantised else 0))


def _named(name: str) -> WeightType:
    return WEIGHT_TYPES[name]


F32 = WeightType("f32", "<f4", "<f4", 2048)
F16 = WeightType("f16", "<f2", "<i2", 1024)
BF16 = WeightType("bf16", "<u2", "<u2", 1024)
Q8_0 = WeightType("q8_0", "|i1", "|i1", 512, quantised=True)
Q4_0 = WeightType("q4_0", "|u1", "|u1", 256, quantised=True)
WEIGHT_TYPES = {t.name: t for t in (F32, F16, BF16, Q8_0, Q4_0)}

SCALES_DTYPE: DTypeLike = "<f2"
