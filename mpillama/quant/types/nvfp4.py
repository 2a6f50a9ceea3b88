"""NVFP4: floats of 4 bits (E2M1), one of 8 bits (E4M3) for every 16, and a float32 for the tensor.

In GGUF the tensor's factor is a tensor of its own. Values are those of the gguf package; what we quantise has a factor,
so that small weights have scales of full precision. Format:
https://docs.nvidia.com/deeplearning/cudnn/latest/developer/scale-quantize.html
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.coded import E2M1, E4M3, Coded
from mpillama.quant.grouped import codes_of, steps_of
from mpillama.quant.nibbles import NIBBLE_BYTES, pack_nibbles, unpack_nibbles
from mpillama.quant.types.fp8 import as_e4m3
from mpillama.quant.weight_type import BLOCK, LANES, Arrays, Blocks, Float32, LaneArray, WeightType, by_group, by_row

HALF = BLOCK // 2
BETWEEN = (E2M1[1:8] + E2M1[:7]) / 2
INFINITE = 0xF8
"""The scale of what is no number: bytes are floats with 5 bits of exponent, of which files use 4."""
WHOLE = np.float32(2.0**-8)
"""The tensor's factor, if we quantise: blocks of weights from 2^-14 to 10 are within the range of their scales."""


def _scales() -> Float32:
    codes = np.arange(256)
    found = np.where(codes < 8, codes * 2.0**-9, (8 + codes % 8) * 2.0 ** (codes // 8 - 10))
    return np.where(codes >= INFINITE, np.inf, found).astype(np.float32)


SCALES = _scales()


@dataclass(frozen=True)
class NvFp4(WeightType):
    """value = e2m1[nibble] * scale of its 16 * factor of the tensor, which 16 rows of a group have in common.

    The numbers are (nibbles [rows, blocks, 32], scales [rows, blocks, 2], factors [rows, blocks]).
    """

    unit, quantised = BLOCK, True
    lanes = (
        LaneArray("", "|u1", NIBBLE_BYTES),
        LaneArray(".scales", "|u1", 2 * LANES),
        LaneArray(".supers", "<f4", 1, 0),
    )

    def blocks_of(self, raw: np.ndarray) -> Blocks:
        """Four scales, then 8 bytes for each 16 values: element i in the lower half of byte i, i + 8 in the upper."""
        blocks = raw.reshape(len(raw), -1, self.block_bytes)
        packed = blocks[:, :, 4:].reshape(len(raw), -1, 4, 8)
        nibbles = np.concatenate([packed & 15, packed >> 4], axis=3).reshape(len(raw), -1, BLOCK)
        scales = blocks[:, :, :4].reshape(len(raw), -1, 2)
        scales = np.where(scales == 0x7F, np.uint8(0), scales & 0x7F)  # as GGML
        return nibbles, scales, np.ones(scales.shape[:2], np.float32)

    def times(self, blocks: Blocks, factor: np.float32) -> Blocks:
        nibbles, scales, whole = blocks
        return nibbles, scales, whole * factor

    def quantise(self, x: Float32) -> Blocks:
        blocks = x.reshape(len(x), -1, 2, HALF)
        with np.errstate(all="ignore"):
            largest = np.abs(blocks).max(axis=3) / (6 * WHOLE)
            finite = np.isfinite(largest).all(axis=2, keepdims=True)
            scales = np.where(finite, as_e4m3(np.minimum(largest, np.float32(448))), np.uint8(INFINITE))
            found = SCALES[scales]
            factor = np.where((found > 0) & np.isfinite(found), 1 / (found * WHOLE), 0).astype(np.float32)
            codes = np.searchsorted(BETWEEN, np.abs(blocks) * factor[..., None]).astype(np.uint8)
        codes |= ((blocks < 0) & (codes > 0)).astype(np.uint8) << 3
        codes = np.where((scales == INFINITE)[..., None], np.uint8(7), codes)
        nibbles = codes.reshape(len(x), -1, BLOCK)
        return nibbles, scales.astype(np.uint8), np.full(scales.shape[:2], WHOLE, np.float32)

    def dequantise(self, blocks: Blocks) -> Float32:
        nibbles, scales, whole = blocks
        exact = E2M1[nibbles].reshape(*scales.shape, HALF) * SCALES[scales][..., None]
        values: Float32 = exact * whole[:, :, None, None]
        return values.reshape(len(nibbles), -1)

    def to_lanes(self, blocks: Blocks) -> Arrays:
        nibbles, scales, whole = blocks
        steps = np.ascontiguousarray(pack_nibbles(steps_of(nibbles)))
        halves = [by_group(np.ascontiguousarray(scales[:, :, half])) for half in range(2)]
        return steps.reshape(*steps.shape[:2], -1), np.concatenate(halves, axis=2), by_group(whole)[:, :, :1]

    def from_lanes(self, arrays: Arrays) -> Blocks:
        lanes, scales, whole = arrays
        nibbles = codes_of(unpack_nibbles(lanes.reshape(*lanes.shape[:2], -1, LANES, 4)))
        halves = [by_row(scales[:, :, i : i + LANES]) for i in (0, LANES)]
        return nibbles, np.stack(halves, axis=2), np.repeat(whole[:, :, 0], LANES, axis=0)

    def take(self, coded: Coded) -> Blocks:
        """Scales below 0 become positive, and their codes' signs the other."""
        scales = coded.of_blocks(coded.scales, HALF).reshape(len(coded), -1, 2)
        turned = (scales & 0x80) >> 4
        nibbles = coded.code_blocks().reshape(*scales.shape, HALF) ^ turned[..., None]
        whole = np.full(scales.shape[:2], 1 if coded.whole is None else coded.whole, np.float32)
        return nibbles.reshape(len(coded), -1, BLOCK), scales & 0x7F, whole


NVFP4 = NvFp4("nvfp4", 64, 36, ggml=40, number=35)
assert np.array_equal(SCALES[:127], E4M3[:127])
