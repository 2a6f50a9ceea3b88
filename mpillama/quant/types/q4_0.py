"""GGML's Q4_0: nibbles and a float16 scale for every 32, value for value and rounding for rounding as the gguf package.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.nibbles import NIBBLE_BYTES, nibbles_of, pack_nibbles, unpack_nibbles
from mpillama.quant.scale_search import quantise_by_importance
from mpillama.quant.scaled_blocks import SCALES, ScaledBlocks, as_float16, largest_of, shifted_to_integers
from mpillama.quant.weight_type import BLOCK, Blocks, Float32, LaneArray


@dataclass(frozen=True)
class Q40(ScaledBlocks):
    """value = (nibble - 8) * scale."""

    lanes = (LaneArray("", "|u1", NIBBLE_BYTES), SCALES)
    weighs = True

    def values_of(self, packed: np.ndarray) -> np.ndarray:
        return nibbles_of(packed)

    def quantise(self, x: Float32) -> Blocks:
        """The element of largest magnitude becomes -8."""
        blocks = x.reshape(len(x), -1, BLOCK)
        scale = largest_of(blocks) / np.float32(-8)
        return shifted_to_integers(blocks, scale, 8.5, 15), as_float16(scale)

    def quantise_within(self, x: Float32, width: int, importance: Float32 | None = None) -> Blocks:
        """With importance, of some scales the one with the least weighted error, as llama.cpp's."""
        if importance is None:
            return self.quantise(x)
        values, scale = quantise_by_importance(x, BLOCK, 8, importance)
        return values, as_float16(scale)

    def integers(self, values: np.ndarray) -> np.ndarray:
        return values.astype(np.int8) - np.int8(8)

    def pack_steps(self, steps: np.ndarray) -> np.ndarray:
        return pack_nibbles(steps)

    def unpack_steps(self, steps: np.ndarray) -> np.ndarray:
        return unpack_nibbles(steps)


Q4_0 = Q40("q4_0", BLOCK, 18, ggml=2, number=4)
