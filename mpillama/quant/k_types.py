"""What GGML's K-types have in common: small integers, small integers as scales of 32 or 16 of them, and float16 steps.

Their numbers are (values [rows, k/32, 32], scales [rows, k/32, sub-blocks of 32], …, steps [rows, k/32]): what a
super-block of 256 has in common stands at each of its blocks. In row lanes it lies in ".supers".
Format: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpillama.quant.nibbles import PLACES
from mpillama.quant.scale_search import SuperBlocks, quantise_symmetric, quantise_with_minimums
from mpillama.quant.weight_type import BLOCK, LANES, Arrays, Blocks, Float32, LaneArray, WeightType, by_group, by_row

SUPER_BLOCK = 256
STEP = LaneArray(".supers", "<f2", LANES, SUPER_BLOCK)
TWO_STEPS = LaneArray(".supers", "<f2", 2 * LANES, SUPER_BLOCK)
"""16 steps of scales, then 16 of minimums."""


@dataclass(frozen=True)
class SuperBlockType(WeightType):
    """A type whose files have super-blocks of 256 values."""

    unit, quantised, weighs = BLOCK, True, True

    def blocks_of(self, raw: np.ndarray) -> Blocks:
        blocks = raw.reshape(len(raw), -1, self.block_bytes)
        values, *scales = self.take_apart(blocks)
        steps = [np.repeat(each, SUPER_BLOCK // BLOCK, axis=1) for each in scales if each.ndim == 2]
        small = [each.reshape(*steps[0].shape, -1) for each in scales if each.ndim > 2]
        return values.reshape(*steps[0].shape, BLOCK), *small, *steps

    def quantise(self, x: Float32) -> Blocks:
        return self.quantise_within(x, x.shape[1])

    def to_lanes(self, blocks: Blocks) -> Arrays:
        values, *scales = blocks
        groups, count = len(values) // LANES, values.shape[1]
        codes = self.codes_of(values).reshape(groups, LANES, count, 8, 4).transpose(0, 2, 3, 1, 4)
        packed = np.ascontiguousarray(self.pack_steps(codes)).reshape(groups, count, -1)
        small = [each.reshape(groups, LANES, count, -1).transpose(3, 0, 2, 1) for each in scales if each.ndim > 2]
        steps = [by_group(each) for each in scales if each.ndim == 2]
        return packed, self.pack_scales(np.concatenate(small)), np.concatenate(steps, axis=2)

    def from_lanes(self, arrays: Arrays) -> Blocks:
        lanes, packed, supers = arrays
        groups, count = lanes.shape[:2]
        codes = self.unpack_steps(lanes.reshape(groups, count, -1, LANES, 4))
        values = self.values_of(codes.transpose(0, 3, 1, 2, 4).reshape(groups * LANES, count, BLOCK))
        steps = [by_row(supers[:, :, i : i + LANES]) for i in range(0, supers.shape[2], LANES)]
        unpacked = self.unpack_scales(packed)
        of_each = len(unpacked) // len(steps)
        small = [
            unpacked[i : i + of_each].transpose(1, 3, 2, 0).reshape(groups * LANES, count, of_each)
            for i in range(0, len(unpacked), of_each)
        ]
        return values, *small, *steps

    @abstractmethod
    def take_apart(self, blocks: np.ndarray) -> Blocks:
        """Return the numbers of a file's blocks, uint8 [rows, blocks, block_bytes].

        They are values [rows, blocks, 256], scales [rows, blocks, sub-blocks], minimums if there are any, and the steps
        of both [rows, blocks].
        """

    @abstractmethod
    def codes_of(self, values: np.ndarray) -> np.ndarray:
        """What row lanes have for values, uint8."""

    @abstractmethod
    def values_of(self, codes: np.ndarray) -> np.ndarray:
        """Undo codes_of."""

    @abstractmethod
    def pack_steps(self, steps: np.ndarray) -> np.ndarray:
        """Return steps of bytes [groups, blocks, steps, 16, 4] from the codes' eight."""

    @abstractmethod
    def unpack_steps(self, steps: np.ndarray) -> np.ndarray:
        """Undo pack_steps."""

    @abstractmethod
    def pack_scales(self, scales: np.ndarray) -> np.ndarray:
        """Return bytes [groups, blocks, entry] from the small numbers of each block's 16 rows, [numbers, …, 16]."""

    @abstractmethod
    def unpack_scales(self, packed: np.ndarray) -> np.ndarray:
        """Undo pack_scales."""


@dataclass(frozen=True)
class SymmetricType(SuperBlockType):
    """value = step * scale * integer, all signed."""

    form: ClassVar[SuperBlocks]
    zero: ClassVar[int]
    """The code of 0."""

    def quantise_within(self, x: Float32, width: int, importance: Float32 | None = None) -> Blocks:
        found = quantise_symmetric(x, self.form, width, importance)
        return in_blocks(x, self.form, found.values, (found.scales,), (found.d,))

    def dequantise(self, blocks: Blocks) -> Float32:
        values, scales, steps = blocks
        factors = steps.astype(np.float32)[:, :, None] * scales.astype(np.float32)
        parts = self.integers(values).astype(np.float32).reshape(*factors.shape, -1)
        scaled: Float32 = factors[:, :, :, None] * parts
        return scaled.reshape(len(values), -1)

    def integers(self, values: np.ndarray) -> np.ndarray:
        """What scales are multiplied by."""
        return values

    def codes_of(self, values: np.ndarray) -> np.ndarray:
        return (values + np.int8(self.zero)).astype(np.uint8)

    def values_of(self, codes: np.ndarray) -> np.ndarray:
        return codes.astype(np.int8) - np.int8(self.zero)


@dataclass(frozen=True)
class TypeWithMinimums(SuperBlockType):
    """value = step * scale * integer - step of minimums * minimum, no small number negative."""

    form: ClassVar[SuperBlocks]

    def quantise_within(self, x: Float32, width: int, importance: Float32 | None = None) -> Blocks:
        found = quantise_with_minimums(x, self.form, width, importance)
        return in_blocks(x, self.form, found.values, (found.scales, found.minimums), (found.d, found.least))

    def dequantise(self, blocks: Blocks) -> Float32:
        values, scales, minimums, steps, least = blocks
        factors = steps.astype(np.float32)[:, :, None] * scales.astype(np.float32)
        lowest = least.astype(np.float32)[:, :, None] * minimums.astype(np.float32)
        parts = values.astype(np.float32).reshape(*factors.shape, -1)
        scaled: Float32 = factors[:, :, :, None] * parts - lowest[:, :, :, None]
        return scaled.reshape(len(values), -1)

    def codes_of(self, values: np.ndarray) -> np.ndarray:
        return values

    def values_of(self, codes: np.ndarray) -> np.ndarray:
        return codes


class SixBitScales(TypeWithMinimums):
    """Scales and minimums have 6 bits, for every 32 values."""

    def pack_scales(self, scales: np.ndarray) -> np.ndarray:
        return pack_six_bits(scales)

    def unpack_scales(self, packed: np.ndarray) -> np.ndarray:
        return unpack_six_bits(packed)


def in_blocks(
    x: Float32, form: SuperBlocks, values: np.ndarray, small: tuple[np.ndarray, ...], steps: tuple[np.ndarray, ...]
) -> Blocks:
    """A type's numbers from those of sub-blocks [rows, sub-blocks, …] and of super-blocks [rows, super-blocks]."""
    rows, count = len(x), x.shape[1] // BLOCK
    of_blocks = (each.reshape(rows, count, BLOCK // form.group) for each in small)
    repeated = (np.repeat(each, count // max(1, each.shape[1]), axis=1) for each in steps)
    return values.reshape(rows, count, BLOCK), *of_blocks, *repeated


# -- how small numbers are packed -------------------------------------------------------------------------------------


def six_bit_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minimums [rows, blocks, 8] from the 12 bytes that q4_k and q5_k have of them."""
    low, middle, high = packed[:, :, :4], packed[:, :, 4:8], packed[:, :, 8:]
    scales = np.concatenate([low & 63, high & 15 | low >> 2 & 48], axis=2)
    minimums = np.concatenate([middle & 63, high >> 4 | middle >> 2 & 48], axis=2)
    return scales, minimums


def pack_six_bits(scales: np.ndarray) -> np.ndarray:
    """Two numbers below 64 of 16 rows, [2, …, 16], in 24 bytes: lower nibbles, then 4 bits of each row."""
    first, second = scales
    return np.concatenate([first & 15 | (second & 15) << 4, pack_row_nibbles(first >> 4 | second >> 4 << 2)], axis=-1)


def unpack_six_bits(packed: np.ndarray) -> np.ndarray:
    """Undo pack_six_bits."""
    low, high = packed[..., :LANES], unpack_row_nibbles(packed[..., LANES:])
    return np.stack([low & 15 | (high & 3) << 4, low >> 4 | high >> 2 << 4])


def pack_row_nibbles(rows: np.ndarray) -> np.ndarray:
    """4 bits of 16 rows in 8 bytes: row i is nibble i / 2 of the 32-bit word i % 2."""
    nibbles = rows.reshape(*rows.shape[:-1], 4, 2, 2)  # byte of a word, nibble of a byte, word
    packed = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
    return np.ascontiguousarray(packed.swapaxes(-1, -2)).reshape(*rows.shape[:-1], 8)


def unpack_row_nibbles(packed: np.ndarray) -> np.ndarray:
    """Undo pack_row_nibbles."""
    words = packed.reshape(*packed.shape[:-1], 2, 4).swapaxes(-1, -2)
    return np.stack([words & 15, words >> 4], axis=-2).reshape(*packed.shape[:-1], LANES)


def pack_row_pairs(rows: np.ndarray) -> np.ndarray:
    """2 bits of 16 rows in 4 bytes, in order."""
    packed: np.ndarray = np.bitwise_or.reduce(rows.reshape(*rows.shape[:-1], 4, 4) << PLACES, axis=-1)
    return packed


def unpack_row_pairs(packed: np.ndarray) -> np.ndarray:
    """Undo pack_row_pairs."""
    return (packed[..., None] >> PLACES & 3).reshape(*packed.shape[:-1], LANES)
