"""GGML's Q5_1: 5 bits, a float16 scale and minimum for every 32, values and rounding those of the gguf package.

Format: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.nibbles import FIVE_BIT_BYTES, five_bits_of, pack_five_bits, unpack_five_bits
from mpillama.quant.scaled_blocks import SCALES_AND_MINIMUMS, BlocksWithMinimum, above_minimum
from mpillama.quant.weight_type import BLOCK, Blocks, Float32, LaneArray


@dataclass(frozen=True)
class Q51(BlocksWithMinimum):
    """value = integer * scale + minimum."""

    lanes = (LaneArray("", "|u1", FIVE_BIT_BYTES), SCALES_AND_MINIMUMS)

    def values_of(self, packed: np.ndarray) -> np.ndarray:
        return five_bits_of(packed)

    def quantise(self, x: Float32) -> Blocks:
        return above_minimum(x.reshape(len(x), -1, BLOCK), 31)

    def pack_steps(self, steps: np.ndarray) -> np.ndarray:
        return pack_five_bits(steps)

    def unpack_steps(self, steps: np.ndarray) -> np.ndarray:
        return unpack_five_bits(steps)


Q5_1 = Q51("q5_1", BLOCK, 24, ggml=7, number=9)
