"""GGML's Q6_K: 6 bits and for every 16 an int8 scale; 256 have a float16 step in common.

Format: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.k_types import STEP, SUPER_BLOCK, SymmetricType
from mpillama.quant.nibbles import SIX_BIT_BYTES, pack_six_bit_values, pairs_of, unpack_six_bit_values
from mpillama.quant.scale_search import SuperBlocks
from mpillama.quant.weight_type import LANES, Blocks, LaneArray


@dataclass(frozen=True)
class Q6K(SymmetricType):
    """value = step * scale * (integer - 32)."""

    form, zero = SuperBlocks(group=16, most=31, most_scale=127), 32
    lanes = (LaneArray("", "|u1", SIX_BIT_BYTES), LaneArray(".scales", "|i1", 2 * LANES), STEP)

    def take_apart(self, blocks: np.ndarray) -> Blocks:
        step = np.ascontiguousarray(blocks[:, :, 208:]).view("<f2")
        packed = blocks[:, :, :128].reshape(*blocks.shape[:2], 2, 64)
        low = np.concatenate([packed & 15, packed >> 4], axis=3)
        high = pairs_of(blocks[:, :, 128:192].reshape(*blocks.shape[:2], 2, 32))
        scales = np.ascontiguousarray(blocks[:, :, 192:208]).view(np.int8)
        return self.values_of(low | high.reshape(low.shape) << 4), scales, step[:, :, 0]

    def pack_steps(self, steps: np.ndarray) -> np.ndarray:
        return pack_six_bit_values(steps)

    def unpack_steps(self, steps: np.ndarray) -> np.ndarray:
        return unpack_six_bit_values(steps)

    def pack_scales(self, scales: np.ndarray) -> np.ndarray:
        return np.concatenate(list(scales), axis=-1)

    def unpack_scales(self, packed: np.ndarray) -> np.ndarray:
        return np.stack([packed[..., :LANES], packed[..., LANES:]])


Q6_K = Q6K("q6_k", SUPER_BLOCK, 210, ggml=14, number=12)
