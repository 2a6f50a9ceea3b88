"""Floats of 32 and 16 bits. A value is a unit: [groups, k, 16]."""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.weight_type import LANES, Arrays, Blocks, Float32, LaneArray, WeightType, by_group, by_row


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


@dataclass(frozen=True)
class Float32Type(FloatType):
    lanes = (LaneArray("", "<f4", LANES),)


@dataclass(frozen=True)
class Float16Type(FloatType):
    lanes = (LaneArray("", "<f2", LANES),)


@dataclass(frozen=True)
class BFloat16Type(FloatType):
    """The upper half of a float32, as bit patterns."""

    lanes = (LaneArray("", "<u2", LANES),)

    def quantise(self, x: Float32) -> Blocks:
        return (round_to_bfloat16(x),)

    def dequantise(self, blocks: Blocks) -> Float32:
        return (blocks[0].astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 bit patterns (uint16), to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


F32 = Float32Type("f32", 1, 4, ggml=0, safetensors="F32", number=0)
F16 = Float16Type("f16", 1, 2, ggml=1, safetensors="F16", number=1)
BF16 = BFloat16Type("bf16", 1, 2, ggml=30, safetensors="BF16", number=2)
