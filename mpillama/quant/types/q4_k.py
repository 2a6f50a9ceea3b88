"""GGML's Q4_K: nibbles, and for every 32 a scale and a minimum of 6 bits; 256 have float16 steps of both in common.

Format: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.k_types import SUPER_BLOCK, TWO_STEPS, SixBitScales, six_bit_scales
from mpillama.quant.nibbles import NIBBLE_BYTES, pack_nibbles, unpack_nibbles
from mpillama.quant.scale_search import SuperBlocks
from mpillama.quant.weight_type import Blocks, LaneArray


@dataclass(frozen=True)
class Q4K(SixBitScales):
    """value = step * scale * nibble - step of minimums * minimum."""

    form = SuperBlocks(group=32, most=15, most_scale=63)
    lanes = (LaneArray("", "|u1", NIBBLE_BYTES), LaneArray(".scales", "|u1", 24), TWO_STEPS)

    def take_apart(self, blocks: np.ndarray) -> Blocks:
        steps = np.ascontiguousarray(blocks[:, :, :4]).view("<f2")
        packed = blocks[:, :, 16:].reshape(*blocks.shape[:2], 4, 32)
        values = np.stack([packed & 15, packed >> 4], axis=3)
        return values, *six_bit_scales(blocks[:, :, 4:16]), steps[:, :, 0], steps[:, :, 1]

    def pack_steps(self, steps: np.ndarray) -> np.ndarray:
        return pack_nibbles(steps)

    def unpack_steps(self, steps: np.ndarray) -> np.ndarray:
        return unpack_nibbles(steps)


Q4_K = Q4K("q4_k", SUPER_BLOCK, 144, ggml=12, number=14)
