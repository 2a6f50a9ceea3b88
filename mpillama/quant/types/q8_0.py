"""GGML's Q8_0: int8 and a float16 scale for every 32, value for value and rounding for rounding as the gguf package.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.scaled_blocks import SCALES, ScaledBlocks, as_float16, inverse
from mpillama.quant.weight_type import BLOCK, LANES, Blocks, Float32, LaneArray


@dataclass(frozen=True)
class Q80(ScaledBlocks):
    """value = int8 * scale."""

    lanes = (LaneArray("", "|i1", LANES * BLOCK), SCALES)

    def values_of(self, packed: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(packed).view(np.int8)

    def quantise(self, x: Float32) -> Blocks:
        blocks = x.reshape(len(x), -1, BLOCK)
        scale = np.abs(blocks).max(axis=2) / np.float32(127)
        values = _round_half_away(blocks * inverse(scale)[:, :, None])
        return values.astype(np.int8), as_float16(scale)

    def integers(self, values: np.ndarray) -> np.ndarray:
        return values


def _round_half_away(x: Float32) -> Float32:
    """Round to the nearest integer, halves away from zero, as C's roundf."""
    magnitude = np.abs(x)
    whole = np.floor(magnitude)
    rounded: Float32 = np.copysign(whole + (magnitude - whole >= 0.5), x)
    return rounded


Q8_0 = Q80("q8_0", BLOCK, 34, ggml=8, number=3)
