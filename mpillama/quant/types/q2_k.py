"""GGML's Q2_K: 2 bits, and for every 16 a scale and a minimum of 4 bits; 256 have float16 steps of both in common.

Format: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.k_types import SUPER_BLOCK, TWO_STEPS, TypeWithMinimums
from mpillama.quant.nibbles import PAIR_BYTES, pack_pairs, pairs_of, unpack_pairs
from mpillama.quant.scale_search import SuperBlocks
from mpillama.quant.weight_type import LANES, Blocks, LaneArray


@dataclass(frozen=True)
class Q2K(TypeWithMinimums):
    """value = step * scale * integer - step of minimums * minimum."""

    form = SuperBlocks(group=16, most=3, most_scale=15)
    lanes = (LaneArray("", "|u1", PAIR_BYTES), LaneArray(".scales", "|u1", 2 * LANES), TWO_STEPS)

    def take_apart(self, blocks: np.ndarray) -> Blocks:
        steps = np.ascontiguousarray(blocks[:, :, 80:]).view("<f2")
        small = blocks[:, :, :16]
        values = pairs_of(blocks[:, :, 16:80].reshape(*blocks.shape[:2], 2, 32))
        return values, small & 15, small >> 4, steps[:, :, 0], steps[:, :, 1]

    def pack_steps(self, steps: np.ndarray) -> np.ndarray:
        return pack_pairs(steps)

    def unpack_steps(self, steps: np.ndarray) -> np.ndarray:
        return unpack_pairs(steps)

    def pack_scales(self, scales: np.ndarray) -> np.ndarray:
        first, last, of_first, of_last = scales
        return np.concatenate([first | of_first << 4, last | of_last << 4], axis=-1)

    def unpack_scales(self, packed: np.ndarray) -> np.ndarray:
        halves = np.stack([packed[..., :LANES], packed[..., LANES:]])
        return np.concatenate([halves & 15, halves >> 4])


Q2_K = Q2K("q2_k", SUPER_BLOCK, 84, ggml=10, number=10)
