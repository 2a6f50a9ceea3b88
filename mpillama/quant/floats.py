"""What floats have in common: a value is a unit, [groups, k, 16]."""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.weight_type import Arrays, Blocks, Float32, WeightType, by_group, by_row


@dataclass(frozen=True)
class FloatType(WeightType):
    """A float that NumPy has under the dtype of its only LaneArray."""

    unit, quantised = 1, False

    def blocks_of(self, raw: np.ndarray) -> Blocks:
        return (raw.view(self.lanes[0].dtype),)

    def quantise(self, x: Float32) -> Blocks:
        """Round to nearest even; beyond the range lies infinity."""
        with np.errstate(over="ignore"):
            return (x.astype(self.lanes[0].dtype),)

    def dequantise(self, blocks: Blocks) -> Float32:
        return blocks[0].astype(np.float32)

    def to_lanes(self, blocks: Blocks) -> Arrays:
        return (by_group(blocks[0]),)

    def from_lanes(self, arrays: Arrays) -> Blocks:
        return (by_row(arrays[0]),)
