"""GGML's IQ4_XS: iq4_nl's values, for every 32 a scale of 6 bits, and for 256 a float16 step.

Format and quantiser: https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.k_types import (
    STEP,
    SUPER_BLOCK,
    SymmetricType,
    in_blocks,
    pack_row_nibbles,
    pack_row_pairs,
    unpack_row_nibbles,
    unpack_row_pairs,
)
from mpillama.quant.nibbles import NIBBLE_BYTES, pack_nibbles, pairs_of, unpack_nibbles
from mpillama.quant.scale_search import SuperBlocks
from mpillama.quant.scaled_blocks import as_float16, inverse, largest_of
from mpillama.quant.types.iq4_nl import CODEBOOK, nearest, searched_scales
from mpillama.quant.weight_type import BLOCK, Blocks, Float32, LaneArray


@dataclass(frozen=True)
class IQ4XS(SymmetricType):
    """value = step * (scale - 32) * codebook[nibble]."""

    form, zero = SuperBlocks(group=BLOCK, most=15, most_scale=31), 0
    lanes = (LaneArray("", "|u1", NIBBLE_BYTES), LaneArray(".scales", "|u1", 12), STEP)

    def take_apart(self, blocks: np.ndarray) -> Blocks:
        step = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")
        low = np.stack([blocks[:, :, 4:8] & 15, blocks[:, :, 4:8] >> 4], axis=3).reshape(*blocks.shape[:2], 8)
        high = pairs_of(blocks[:, :, 2:4, None]).reshape(*blocks.shape[:2], 8)
        packed = blocks[:, :, 8:].reshape(*blocks.shape[:2], 8, 16)
        values = np.concatenate([packed & 15, packed >> 4], axis=3)
        return values, (low | high << 4).astype(np.int8) - np.int8(32), step[:, :, 0]

    def quantise_within(self, x: Float32, width: int, importance: Float32 | None = None) -> Blocks:
        """Scales as iq4_nl finds them; that of largest magnitude becomes -32, and the values are chosen anew."""
        blocks = x.reshape(len(x), -1, BLOCK)
        scales = searched_scales(blocks, importance).reshape(len(x), -1, self.form.count(width))
        with np.errstate(all="ignore"):
            step = largest_of(np.where(np.isfinite(scales), scales, np.float32(np.inf))) / np.float32(-32)
            whole = np.clip(np.rint(scales * inverse(step)[:, :, None]), -32, 31)
            whole = np.nan_to_num(whole).astype(np.int8).reshape(len(x), -1)
            step = np.where(np.isfinite(step), step, np.float32(np.nan))
            factors = np.repeat(step, scales.shape[2], axis=1) * whole.astype(np.float32)
            values = nearest(blocks * inverse(factors)[:, :, None])
        return in_blocks(x, self.form, values, (whole,), (as_float16(step),))

    def integers(self, values: np.ndarray) -> np.ndarray:
        chosen: np.ndarray = CODEBOOK[values]
        return chosen

    def codes_of(self, values: np.ndarray) -> np.ndarray:
        return values

    def values_of(self, codes: np.ndarray) -> np.ndarray:
        return codes

    def pack_steps(self, steps: np.ndarray) -> np.ndarray:
        return pack_nibbles(steps)

    def unpack_steps(self, steps: np.ndarray) -> np.ndarray:
        return unpack_nibbles(steps)

    def pack_scales(self, scales: np.ndarray) -> np.ndarray:
        codes: np.ndarray = (scales[0] + np.int8(32)).astype(np.uint8)
        return np.concatenate([pack_row_nibbles(codes & 15), pack_row_pairs(codes >> 4)], axis=-1)

    def unpack_scales(self, packed: np.ndarray) -> np.ndarray:
        codes = unpack_row_nibbles(packed[..., :8]) | unpack_row_pairs(packed[..., 8:]) << 4
        scales: np.ndarray = codes.astype(np.int8)[None] - np.int8(32)
        return scales


IQ4_XS = IQ4XS("iq4_xs", SUPER_BLOCK, 136, ggml=23, number=15)
