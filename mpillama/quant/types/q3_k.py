"""GGML's Q3_K: 3 bits and for every 16 a scale of 6 bits; 256 have a float16 step in common.

Format: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.k_types import STEP, SUPER_BLOCK, SymmetricType, pack_six_bits, unpack_six_bits
from mpillama.quant.nibbles import THREE_BIT_BYTES, pack_three_bits, pairs_of, unpack_three_bits
from mpillama.quant.scale_search import SuperBlocks
from mpillama.quant.weight_type import Blocks, LaneArray


@dataclass(frozen=True)
class Q3K(SymmetricType):
    """value = step * (scale - 32) * (integer - 4)."""

    form, zero = SuperBlocks(group=16, most=3, most_scale=31), 4
    lanes = (LaneArray("", "|u1", THREE_BIT_BYTES), LaneArray(".scales", "|u1", 24), STEP)

    def take_apart(self, blocks: np.ndarray) -> Blocks:
        step = np.ascontiguousarray(blocks[:, :, 108:]).view("<f2")
        third = blocks[:, :, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
        low = pairs_of(blocks[:, :, 32:96].reshape(*blocks.shape[:2], 2, 32))
        nibbles, pairs = blocks[:, :, 96:104], pairs_of(blocks[:, :, None, 104:108])
        scales = np.concatenate([nibbles & 15, nibbles >> 4], axis=2) | pairs.reshape(*blocks.shape[:2], 16) << 4
        values = low.reshape(*blocks.shape[:2], 256) | third.reshape(*blocks.shape[:2], 256) << 2
        return self.values_of(values), scales.astype(np.int8) - np.int8(32), step[:, :, 0]

    def pack_steps(self, steps: np.ndarray) -> np.ndarray:
        return pack_three_bits(steps)

    def unpack_steps(self, steps: np.ndarray) -> np.ndarray:
        return unpack_three_bits(steps)

    def pack_scales(self, scales: np.ndarray) -> np.ndarray:
        return pack_six_bits((scales + np.int8(32)).astype(np.uint8))

    def unpack_scales(self, packed: np.ndarray) -> np.ndarray:
        return unpack_six_bits(packed).astype(np.int8) - np.int8(32)


Q3_K = Q3K("q3_k", SUPER_BLOCK, 110, ggml=11, number=11)
