"""Floats of 8 bits (E4M3) with a float32 scale for each row and 128 k-values, as FP8 checkpoints have them.

One scale for a block of rows, a row or a whole tensor stands at each row. They meet float32 activations, so nothing but
the weights is rounded. Format: https://arxiv.org/abs/2209.05433; in files 0x7f and 0xff are no numbers and refused.
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.coded import E4M3, Coded
from mpillama.quant.grouped import GroupedType
from mpillama.quant.weight_type import BLOCK, LANES, Blocks, Float32, LaneArray, by_group, by_row

MAGNITUDES = E4M3[:127]


@dataclass(frozen=True)
class Fp8(GroupedType):
    """value = e4m3[code] * scale."""

    quantised = False
    values = LaneArray("", "|u1", LANES * BLOCK)
    beside = ("<f4",)

    def quantise_groups(self, groups: Float32) -> Blocks:
        """Scales are powers of two, such that the largest magnitude, rounded to its four bits, is from 128 to 240."""
        largest = np.abs(groups).max(axis=2)
        usable = np.isfinite(largest) & (largest >= np.float32(2.0**-118))
        fraction, exponent = np.frexp(np.where(usable, largest, np.float32(1)))
        exponent = exponent + (np.rint(fraction * 16) == 16)
        scale = np.where(usable, np.ldexp(np.float32(1), exponent - 8), np.float32(0)).astype(np.float32)
        scale = np.where(np.isfinite(largest), scale, np.float32(np.nan))
        inverse = np.ldexp(np.float32(1), 8 - exponent).astype(np.float32)
        return as_e4m3(np.where(usable[:, :, None], groups, np.float32(0)) * inverse[:, :, None]), scale

    def dequantise(self, blocks: Blocks) -> Float32:
        codes, scales = blocks
        scaled: Float32 = E4M3[codes] * scales[:, :, None]
        return scaled.reshape(len(codes), -1)

    def codes_to_lanes(self, codes: np.ndarray) -> np.ndarray:
        """16 rows of a k-value lie side by side, as those of other floats."""
        lanes = by_group(codes.reshape(len(codes), -1))
        return lanes.reshape(len(lanes), codes.shape[1], -1)

    def codes_from_lanes(self, lanes: np.ndarray) -> np.ndarray:
        rows = by_row(lanes.reshape(len(lanes), -1, LANES))
        return rows.reshape(len(rows), -1, BLOCK)

    def take(self, coded: Coded) -> Blocks:
        return coded.code_blocks(), coded.of_blocks(coded.factors)


def as_e4m3(x: Float32) -> np.ndarray:
    """The codes nearest to float32 up to 448 in magnitude; ties go to even codes."""
    magnitudes = np.abs(x)
    upper = np.clip(np.searchsorted(MAGNITUDES, magnitudes), 1, len(MAGNITUDES) - 1)
    middle = (MAGNITUDES[upper] + MAGNITUDES[upper - 1]) / 2
    above = (magnitudes > middle) | ((magnitudes == middle) & (upper % 2 == 0))
    codes: np.ndarray = np.where(above, upper, upper - 1).astype(np.uint8) | np.signbit(x).astype(np.uint8) << 7
    return codes


FP8 = Fp8("fp8", 1, 1, number=30)
