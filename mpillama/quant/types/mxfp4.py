"""GGML's MXFP4: floats of 4 bits (E2M1) and a power of two for every 32, values and rounding those of the gguf package.

Format: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf; as in GGML, the exponent
255 is a power of two like the others.
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.nibbles import NIBBLE_BYTES, nibbles_of, pack_nibbles, unpack_nibbles
from mpillama.quant.scaled_blocks import ScaledBlocks
from mpillama.quant.weight_type import BLOCK, LANES, Blocks, Float32, LaneArray

DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int8)
"""Twice the floats: integers, to be multiplied by half of the power of two."""
INTEGERS = np.concatenate([DOUBLED, -DOUBLED])


@dataclass(frozen=True)
class MxFp4(ScaledBlocks):
    """value = integers[nibble] * 2^(exponent - 128)."""

    lanes = (LaneArray("", "|u1", NIBBLE_BYTES), LaneArray(".scales", "|u1", LANES))

    def values_of(self, packed: np.ndarray) -> np.ndarray:
        return nibbles_of(packed)

    def quantise(self, x: Float32) -> Blocks:
        """The largest magnitude gets the exponent of 4 to 6, what is beyond is 6; ties go to the smaller magnitude.

        A block with what is no number becomes the largest integers times the largest power, which is infinite.
        """
        blocks = x.reshape(len(x), -1, BLOCK)
        largest = np.abs(blocks).max(axis=2)
        usable = np.isfinite(largest) & (largest > 0)
        powers = np.frexp(np.where(usable, largest, 1))[1] - 1  # exact; a float32 log2 rounds up just below a power
        exponents = np.where(usable, np.clip(powers + 125, 0, 254), 0).astype(np.uint8)
        with np.errstate(invalid="ignore", over="ignore"):
            magnitudes = np.abs(blocks) / self.factors(exponents)[:, :, None]
        codes = np.searchsorted((DOUBLED[1:] + DOUBLED[:-1]) / np.float32(2), magnitudes).astype(np.uint8)
        codes |= ((blocks < 0) & (codes > 0)).astype(np.uint8) << 3
        lost = ~np.isfinite(largest)
        return np.where(lost[:, :, None], np.uint8(7), codes), np.where(lost, np.uint8(255), exponents)

    def integers(self, values: np.ndarray) -> np.ndarray:
        chosen: np.ndarray = INTEGERS[values]
        return chosen

    def factors(self, scales: np.ndarray) -> Float32:
        found: Float32 = np.ldexp(np.float32(1), scales.astype(np.int32) - 128).astype(np.float32)
        return found

    def pack_steps(self, steps: np.ndarray) -> np.ndarray:
        return pack_nibbles(steps)

    def unpack_steps(self, steps: np.ndarray) -> np.ndarray:
        return unpack_nibbles(steps)


MXFP4 = MxFp4("mxfp4", BLOCK, 17, ggml=39, number=7)
