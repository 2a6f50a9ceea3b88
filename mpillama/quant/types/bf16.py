"""Bfloat16, the upper half of a float32, as bit patterns."""

import numpy as np

from mpillama.quant.floats import FloatType
from mpillama.quant.weight_type import LANES, Blocks, Float32, LaneArray


class BFloat16Type(FloatType):
    lanes = (LaneArray("", "<u2", LANES, 1),)

    def quantise(self, x: Float32) -> Blocks:
        return (round_to_bfloat16(x),)

    def dequantise(self, blocks: Blocks) -> Float32:
        return (blocks[0].astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 bit patterns (uint16), to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


BF16 = BFloat16Type("bf16", 1, 2, ggml=30, safetensors="BF16", number=2)
