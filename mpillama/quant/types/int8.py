"""Integers of 8 bits with a zero point and a float32 scale for a group of columns, as Hugging Face's INT8 has them.

Scales of any float that files have are float32 here.
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.coded import Coded
from mpillama.quant.grouped import GroupedType, codes_of, steps_of
from mpillama.quant.integers import flushed
from mpillama.quant.scaled_blocks import inverse
from mpillama.quant.weight_type import BLOCK, LANES, Blocks, Float32, LaneArray


@dataclass(frozen=True)
class Int8(GroupedType):
    """value = (int8 - zero) * scale."""

    quantised = True
    values = LaneArray("", "|i1", LANES * BLOCK)
    beside = ("<f4", "|i1")

    def quantise_groups(self, groups: Float32) -> Blocks:
        """The largest magnitude becomes 127 or -127; zero stays 0."""
        scales = flushed(np.abs(groups).max(axis=2) / np.float32(127))
        numbers = np.clip(np.rint(groups * inverse(scales)[:, :, None]), -127, 127)
        return np.nan_to_num(numbers).astype(np.int8), scales, np.zeros(scales.shape, np.int8)

    def dequantise(self, blocks: Blocks) -> Float32:
        numbers, scales, zeros = blocks
        from_zero = (numbers.astype(np.int16) - zeros.astype(np.int16)[:, :, None]).astype(np.float32)
        scaled: Float32 = from_zero * scales[:, :, None]
        return scaled.reshape(len(numbers), -1)

    def codes_to_lanes(self, codes: np.ndarray) -> np.ndarray:
        steps = np.ascontiguousarray(steps_of(codes))
        return steps.reshape(len(steps), codes.shape[1], -1)

    def codes_from_lanes(self, lanes: np.ndarray) -> np.ndarray:
        return codes_of(lanes.reshape(*lanes.shape[:2], -1, LANES, 4))

    def take(self, coded: Coded) -> Blocks:
        assert coded.zeros is not None
        zeros = coded.of_blocks(coded.zeros).astype(np.int8)
        return coded.raised_blocks(np.int8), coded.of_blocks(coded.factors), zeros


INT8 = Int8("int8", 1, 1, number=34)
