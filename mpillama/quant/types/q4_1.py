"""GGML's Q4_1: nibbles, a float16 scale and minimum for every 32, values and rounding those of the gguf package.

Format: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.nibbles import NIBBLE_BYTES, nibbles_of, pack_nibbles, unpack_nibbles
from mpillama.quant.scaled_blocks import SCALES_AND_MINIMUMS, BlocksWithMinimum, above_minimum
from mpillama.quant.weight_type import BLOCK, Blocks, Float32, LaneArray


@dataclass(frozen=True)
class Q41(BlocksWithMinimum):
    """value = nibble * scale + minimum."""

    lanes = (LaneArray("", "|u1", NIBBLE_BYTES), SCALES_AND_MINIMUMS)

    def values_of(self, packed: np.ndarray) -> np.ndarray:
        return nibbles_of(packed)

    def quantise(self, x: Float32) -> Blocks:
        return above_minimum(x.reshape(len(x), -1, BLOCK), 15)

    def pack_steps(self, steps: np.ndarray) -> np.ndarray:
        return pack_nibbles(steps)

    def unpack_steps(self, steps: np.ndarray) -> np.ndarray:
        return unpack_nibbles(steps)


Q4_1 = Q41("q4_1", BLOCK, 20, ggml=3, number=8)
