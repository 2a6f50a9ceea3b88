"""Integers of 4 bits with a bfloat16 scale for a group of columns, as compressed-tensors' symmetric INT4 has them.

Format: https://github.com/vllm-project/compressed-tensors (pack-quantized).
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.coded import Coded, as_float32
from mpillama.quant.integers import Nibbles, flushed
from mpillama.quant.scaled_blocks import inverse
from mpillama.quant.types.bf16 import round_to_bfloat16
from mpillama.quant.weight_type import Blocks, Float32


@dataclass(frozen=True)
class Int4(Nibbles):
    """value = (nibble - 8) * scale."""

    beside = ("<u2",)

    def quantise_groups(self, groups: Float32) -> Blocks:
        """The largest magnitude becomes 7 or -7."""
        scales = round_to_bfloat16(flushed(np.abs(groups).max(axis=2) / np.float32(7)))
        factor = inverse(as_float32(scales, "BF16"))
        nibbles = np.clip(np.rint(groups * factor[:, :, None]), -8, 7) + 8
        return np.nan_to_num(nibbles).astype(np.uint8), scales

    def dequantise(self, blocks: Blocks) -> Float32:
        nibbles, scales = blocks
        numbers = (nibbles.astype(np.int8) - np.int8(8)).astype(np.float32)
        scaled: Float32 = numbers * as_float32(scales, "BF16")[:, :, None]
        return scaled.reshape(len(nibbles), -1)

    def take(self, coded: Coded) -> Blocks:
        return coded.raised_blocks(), coded.of_blocks(coded.scales)


INT4 = Int4("int4", 1, 1, number=31)
