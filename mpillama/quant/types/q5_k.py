"""GGML's Q5_K: 5 bits, and for every 32 a scale and a minimum of 6 bits; 256 have float16 steps of both in common.

Format: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.k_types import SUPER_BLOCK, TWO_STEPS, SixBitScales, six_bit_scales
from mpillama.quant.nibbles import FIVE_BIT_BYTES, pack_five_bits, unpack_five_bits
from mpillama.quant.scale_search import SuperBlocks
from mpillama.quant.weight_type import Blocks, LaneArray


@dataclass(frozen=True)
class Q5K(SixBitScales):
    """value = step * scale * integer - step of minimums * minimum."""

    form = SuperBlocks(group=32, most=31, most_scale=63)
    lanes = (LaneArray("", "|u1", FIVE_BIT_BYTES), LaneArray(".scales", "|u1", 24), TWO_STEPS)

    def take_apart(self, blocks: np.ndarray) -> Blocks:
        steps = np.ascontiguousarray(blocks[:, :, :4]).view("<f2")
        fifth = blocks[:, :, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
        packed = blocks[:, :, 48:].reshape(*blocks.shape[:2], 4, 32)
        low = np.stack([packed & 15, packed >> 4], axis=3).reshape(fifth.shape)
        return low | fifth << 4, *six_bit_scales(blocks[:, :, 4:16]), steps[:, :, 0], steps[:, :, 1]

    def pack_steps(self, steps: np.ndarray) -> np.ndarray:
        return pack_five_bits(steps)

    def unpack_steps(self, steps: np.ndarray) -> np.ndarray:
        return unpack_five_bits(steps)


Q5_K = Q5K("q5_k", SUPER_BLOCK, 176, ggml=13, number=13)
