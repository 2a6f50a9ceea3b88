"""GGML's Q5_0: 5 bits and a float16 scale for every 32, value for value and rounding for rounding as the gguf package.

Format: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.nibbles import FIVE_BIT_BYTES, five_bits_of, pack_five_bits, unpack_five_bits
from mpillama.quant.scaled_blocks import SCALES, ScaledBlocks, as_float16, largest_of, shifted_to_integers
from mpillama.quant.weight_type import BLOCK, Blocks, Float32, LaneArray


@dataclass(frozen=True)
class Q50(ScaledBlocks):
    """value = (integer - 16) * scale."""

    lanes = (LaneArray("", "|u1", FIVE_BIT_BYTES), SCALES)

    def values_of(self, packed: np.ndarray) -> np.ndarray:
        return five_bits_of(packed)

    def quantise(self, x: Float32) -> Blocks:
        """The element of largest magnitude becomes -16."""
        blocks = x.reshape(len(x), -1, BLOCK)
        scale = largest_of(blocks) / np.float32(-16)
        return shifted_to_integers(blocks, scale, 16.5, 31), as_float16(scale)

    def integers(self, values: np.ndarray) -> np.ndarray:
        return values.astype(np.int8) - np.int8(16)

    def pack_steps(self, steps: np.ndarray) -> np.ndarray:
        return pack_five_bits(steps)

    def unpack_steps(self, steps: np.ndarray) -> np.ndarray:
        return unpack_five_bits(steps)


Q5_0 = Q50("q5_0", BLOCK, 22, ggml=6, number=5)
