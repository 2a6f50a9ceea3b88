"""GGML's Q4_0: nibbles and a float16 scale for every 32, value for value and rounding for rounding as the gguf package.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.scaled_blocks import SCALES, ScaledBlocks, as_float16, inverse
from mpillama.quant.weight_type import BLOCK, LANES, Blocks, Float32, LaneArray


@dataclass(frozen=True)
class Q40(ScaledBlocks):
    """value = (nibble - 8) * scale; in row lanes steps j and j + 4 share the bytes of a step."""

    lanes = (LaneArray("", "|u1", LANES * BLOCK // 2), SCALES)

    def values_of(self, packed: np.ndarray) -> np.ndarray:
        return np.concatenate([packed & 15, packed >> 4], axis=2)

    def quantise(self, x: Float32) -> Blocks:
        """The element of largest magnitude becomes -8.

        Product and sum are rounded to float32 one after the other, as in the gguf package; weights that were bfloat16
        often lie just on a border, where more precision would decide otherwise.
        """
        blocks = x.reshape(len(x), -1, BLOCK)
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
        scale = largest / np.float32(-8)
        shifted = blocks * inverse(scale)[:, :, None] + np.float32(8.5)
        return np.clip(np.trunc(shifted), 0, 15).astype(np.uint8), as_float16(scale)

    def integers(self, values: np.ndarray) -> np.ndarray:
        return values.astype(np.int8) - np.int8(8)

    def pack_steps(self, steps: np.ndarray) -> np.ndarray:
        shared: np.ndarray = steps[:, :, :4] | steps[:, :, 4:] << 4
        return shared

    def unpack_steps(self, steps: np.ndarray) -> np.ndarray:
        return np.concatenate([steps & 15, steps >> 4], axis=2)


Q4_0 = Q40("q4_0", BLOCK, 18, ggml=2, number=4)
