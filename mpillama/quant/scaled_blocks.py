"""What types of blocks of 32 small integers with a float16 scale have in common.

Their numbers are (values [rows, k/32, 32], scales float16 [rows, k/32]). In row lanes a block of 16 rows is steps of
64 bytes, 16 rows x 4 k-values; the 16 scales lie in an array of their own.
"""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from mpillama.quant.weight_type import BLOCK, LANES, Arrays, Blocks, Float32, LaneArray, WeightType, by_group, by_row

SCALES = LaneArray(".scales", "<f2", LANES)


@dataclass(frozen=True)
class ScaledBlocks(WeightType):
    """A block in a file is its scale and then its values, as GGML has them."""

    unit, quantised = BLOCK, True

    def blocks_of(self, raw: np.ndarray) -> Blocks:
        blocks = raw.reshape(len(raw), -1, self.block_bytes)
        scales = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0]
        return self.values_of(blocks[:, :, 2:]), scales

    def dequantise(self, blocks: Blocks) -> Float32:
        values, scales = blocks
        numbers = self.integers(values).astype(np.float32)
        return (numbers * scales.astype(np.float32)[:, :, None]).reshape(len(values), -1)

    def to_lanes(self, blocks: Blocks) -> Arrays:
        values, scales = blocks
        groups, count = len(values) // LANES, values.shape[1]
        steps = self.pack_steps(values.reshape(groups, LANES, count, 8, 4).transpose(0, 2, 3, 1, 4))
        return np.ascontiguousarray(steps).reshape(groups, count, -1), by_group(scales)

    def from_lanes(self, arrays: Arrays) -> Blocks:
        lanes, scales = arrays
        groups, count = lanes.shape[:2]
        steps = self.unpack_steps(lanes.reshape(groups, count, -1, LANES, 4))
        return steps.transpose(0, 3, 1, 2, 4).reshape(groups * LANES, count, BLOCK), by_row(scales)

    @abstractmethod
    def values_of(self, packed: np.ndarray) -> np.ndarray:
        """Return values [rows, blocks, 32] from a file's bytes, uint8 [rows, blocks, bytes without the scale]."""

    @abstractmethod
    def integers(self, values: np.ndarray) -> np.ndarray:
        """What scales are multiplied by."""

    def pack_steps(self, steps: np.ndarray) -> np.ndarray:
        """Return steps of bytes [groups, blocks, steps, 16, 4] from the values' eight."""
        return steps

    def unpack_steps(self, steps: np.ndarray) -> np.ndarray:
        """Undo pack_steps."""
        return steps


def inverse(scale: np.ndarray) -> np.ndarray:
    """Return 1 / scale, 0 where that is not finite (a block of zeros, or of numbers too tiny for float16 scales)."""
    with np.errstate(divide="ignore", over="ignore"):
        found = np.float32(1) / scale
    return np.where(np.isfinite(found), found, np.float32(0))


def as_float16(scale: np.ndarray) -> np.ndarray:
    """Round scales to float16; a scale beyond its range becomes infinity, as in GGML."""
    with np.errstate(over="ignore"):
        return scale.astype(np.float16)
