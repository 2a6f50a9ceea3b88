"""What types of blocks of 32 small integers with a scale have in common.

Their numbers are (values [rows, k/32, 32], scales [rows, k/32]). In row lanes a block of 16 rows is steps of 64 bytes,
16 rows x 4 k-values; the 16 scales lie in an array of their own.
"""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from mpillama.quant.coded import Coded
from mpillama.quant.weight_type import BLOCK, LANES, Arrays, Blocks, Float32, LaneArray, WeightType, by_group, by_row

SCALES = LaneArray(".scales", "<f2", LANES)
SCALES_AND_MINIMUMS = LaneArray(".scales", "<f2", 2 * LANES)
"""16 scales, then 16 minimums."""


@dataclass(frozen=True)
class ScaledBlocks(WeightType):
    """A block in a file is its scale and then its values, as GGML has them."""

    unit, quantised = BLOCK, True

    def blocks_of(self, raw: np.ndarray) -> Blocks:
        kind, each = np.dtype(self.lanes[1].dtype), self.lanes[1].entry // LANES
        blocks, size = raw.reshape(len(raw), -1, self.block_bytes), each * kind.itemsize
        scales = np.ascontiguousarray(blocks[:, :, :size]).view(kind)
        return self.values_of(blocks[:, :, size:]), *(scales[:, :, i] for i in range(each))

    def dequantise(self, blocks: Blocks) -> Float32:
        values, scales = blocks
        numbers = self.integers(values).astype(np.float32)
        scaled: Float32 = numbers * self.factors(scales)[:, :, None]
        return scaled.reshape(len(values), -1)

    def to_lanes(self, blocks: Blocks) -> Arrays:
        values, *scales = blocks
        groups, count = len(values) // LANES, values.shape[1]
        steps = self.pack_steps(values.reshape(groups, LANES, count, 8, 4).transpose(0, 2, 3, 1, 4))
        packed = np.ascontiguousarray(steps).reshape(groups, count, -1)
        return packed, np.concatenate([by_group(each) for each in scales], axis=2)

    def from_lanes(self, arrays: Arrays) -> Blocks:
        lanes, scales = arrays
        groups, count = lanes.shape[:2]
        steps = self.unpack_steps(lanes.reshape(groups, count, -1, LANES, 4))
        values = steps.transpose(0, 3, 1, 2, 4).reshape(groups * LANES, count, BLOCK)
        return values, *(by_row(scales[:, :, i : i + LANES]) for i in range(0, scales.shape[2], LANES))

    @abstractmethod
    def values_of(self, packed: np.ndarray) -> np.ndarray:
        """Return values [rows, blocks, 32] from a file's bytes, uint8 [rows, blocks, bytes without the scale]."""

    def take(self, coded: Coded) -> Blocks:
        """The numbers of a checkpoint that has the same in arrays of their own."""
        values = coded.code_blocks() if coded.zeros is None else coded.raised_blocks()
        return values, coded.of_blocks(coded.scales)

    @abstractmethod
    def integers(self, values: np.ndarray) -> np.ndarray:
        """What scales are multiplied by."""

    def factors(self, scales: np.ndarray) -> Float32:
        """Scales as float32."""
        factors: Float32 = scales.astype(np.float32)
        return factors

    def pack_steps(self, steps: np.ndarray) -> np.ndarray:
        """Return steps of bytes [groups, blocks, steps, 16, 4] from the values' eight."""
        return steps

    def unpack_steps(self, steps: np.ndarray) -> np.ndarray:
        """Undo pack_steps."""
        return steps


class BlocksWithMinimum(ScaledBlocks):
    """A minimum stands behind the scale, and is added to every value; the numbers have it as a third array."""

    def integers(self, values: np.ndarray) -> np.ndarray:
        return values

    def dequantise(self, blocks: Blocks) -> Float32:
        values, scales, minimums = blocks
        scaled: Float32 = values.astype(np.float32) * self.factors(scales)[:, :, None]
        raised: Float32 = scaled + self.factors(minimums)[:, :, None]
        return raised.reshape(len(values), -1)


def above_minimum(blocks: Float32, most: int) -> Blocks:
    """Return integers of 0 (each block's smallest element) to `most` (its largest), scales and minimums."""
    with np.errstate(over="ignore", invalid="ignore"):  # what is beyond float32 shows in the scale
        minimum = blocks.min(axis=2)
        scale = (blocks.max(axis=2) - minimum) / np.float32(most)
        values = shifted_to_integers(blocks - minimum[:, :, None], scale, 0.5, most)
    return values, as_float16(scale), as_float16(minimum)


def largest_of(blocks: Float32) -> Float32:
    """Return each block's element of largest magnitude, the first of them, [rows, blocks]."""
    largest: Float32 = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
    return largest


def shifted_to_integers(blocks: Float32, scale: np.ndarray, shift: float, most: int) -> np.ndarray:
    """Return blocks / scale + shift, cut to integers of 0 to `most`.

    Product and sum are rounded to float32 one after the other, as in the gguf package; weights that were bfloat16 often
    lie just on a border, where more precision would decide otherwise.
    """
    shifted = blocks * inverse(scale)[:, :, None] + np.float32(shift)
    integers: np.ndarray = np.clip(np.trunc(shifted), 0, most).astype(np.uint8)
    return integers


def inverse(scale: np.ndarray) -> np.ndarray:
    """Return 1 / scale, 0 where that is not finite (a block of zeros, or of numbers too tiny for float16 scales)."""
    with np.errstate(divide="ignore", over="ignore"):
        found = np.float32(1) / scale
    return np.where(np.isfinite(found), found, np.float32(0))


def as_float16(scale: np.ndarray) -> np.ndarray:
    """Round scales to float16; a scale beyond its range becomes infinity, as in GGML."""
    with np.errstate(over="ignore"):
        return scale.astype(np.float16)
