"""Integers of 4 bits with a scale of 16 bits for a group of columns, as Hugging Face's INT4, AWQ and GPTQ have them."""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from mpillama.quant.coded import Coded
from mpillama.quant.grouped import GroupedType, codes_of, steps_of
from mpillama.quant.nibbles import NIBBLE_BYTES, pack_nibbles, unpack_nibbles
from mpillama.quant.scaled_blocks import inverse
from mpillama.quant.weight_type import LANES, Blocks, Float32, LaneArray

LEAST = np.float32(2.0**-126)
"""Scales below are 0."""


@dataclass(frozen=True)
class Nibbles(GroupedType):
    """Nibbles in row lanes lie as those of Q4_0."""

    quantised = True
    values = LaneArray("", "|u1", NIBBLE_BYTES)

    def codes_to_lanes(self, codes: np.ndarray) -> np.ndarray:
        steps = pack_nibbles(steps_of(codes))
        return np.ascontiguousarray(steps).reshape(len(steps), codes.shape[1], -1)

    def codes_from_lanes(self, lanes: np.ndarray) -> np.ndarray:
        return codes_of(unpack_nibbles(lanes.reshape(*lanes.shape[:2], -1, LANES, 4)))


class NibblesWithZero(Nibbles):
    """value = (nibble - zero) * scale."""

    @abstractmethod
    def scale_bits(self, scales: Float32) -> np.ndarray:
        """Round scales to the type's own."""

    @abstractmethod
    def factors(self, scales: np.ndarray) -> Float32:
        """Scales as float32."""

    def quantise_groups(self, groups: Float32) -> Blocks:
        """From the least to the largest, of which the range reaches to zero."""
        least, largest = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
        scales = self.scale_bits(flushed((largest - least) / np.float32(15)))
        factor = inverse(self.factors(scales))
        zeros = np.clip(np.rint(-least * factor), 0, 15)
        nibbles = np.clip(np.rint(groups * factor[:, :, None]) + zeros[:, :, None], 0, 15)
        return np.nan_to_num(nibbles).astype(np.uint8), scales, np.nan_to_num(zeros).astype(np.uint8)

    def dequantise(self, blocks: Blocks) -> Float32:
        nibbles, scales, zeros = blocks
        numbers = (nibbles.astype(np.int16) - zeros.astype(np.int16)[:, :, None]).astype(np.float32)
        scaled: Float32 = numbers * self.factors(scales)[:, :, None]
        return scaled.reshape(len(nibbles), -1)

    def take(self, coded: Coded) -> Blocks:
        assert coded.zeros is not None
        zeros = coded.of_blocks(coded.zeros).astype(np.uint8)
        return coded.raised_blocks(), coded.of_blocks(coded.scales), zeros


def flushed(scales: Float32) -> Float32:
    """Scales that are not too small to be divided by."""
    return np.where(scales < LEAST, np.float32(0), scales)
