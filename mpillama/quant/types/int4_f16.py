"""Integers of 4 bits with a zero point and a float16 scale for a group of columns, as AWQ, GPTQ and INT4 have them.

Formats: https://github.com/casper-hansen/AutoAWQ, https://github.com/ModelCloud/GPTQModel.
"""

import numpy as np

from mpillama.quant.integers import NibblesWithZero
from mpillama.quant.scaled_blocks import as_float16
from mpillama.quant.weight_type import Float32


class Int4F16(NibblesWithZero):
    beside = ("<f2", "|u1")

    def scale_bits(self, scales: Float32) -> np.ndarray:
        return as_float16(scales)

    def factors(self, scales: np.ndarray) -> Float32:
        return scales.astype(np.float32)


INT4_F16 = Int4F16("int4_f16", 1, 1, number=32)
