"""Integers of 4 bits with a zero point and a bfloat16 scale for a group of columns, as AWQ, GPTQ and INT4 have them."""

import numpy as np

from mpillama.quant.coded import as_float32
from mpillama.quant.integers import NibblesWithZero
from mpillama.quant.types.bf16 import round_to_bfloat16
from mpillama.quant.weight_type import Float32


class Int4Bf16(NibblesWithZero):
    beside = ("<u2", "|u1")

    def scale_bits(self, scales: Float32) -> np.ndarray:
        return round_to_bfloat16(scales)

    def factors(self, scales: np.ndarray) -> Float32:
        return as_float32(scales, "BF16")


INT4_BF16 = Int4Bf16("int4_bf16", 1, 1, number=33)
