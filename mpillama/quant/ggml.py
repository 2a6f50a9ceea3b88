"""GGML's types that no kernel takes: the gguf package decodes them, and they are quantised again.

Sizes: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from dataclasses import dataclass

import numpy as np

from mpillama.errors import UserError
from mpillama.quant.types.q2_k import Q2_K
from mpillama.quant.types.q4_k import Q4_K
from mpillama.quant.types.q5_k import Q5_K
from mpillama.quant.types.q6_k import Q6_K
from mpillama.quant.types.q8_0 import Q8_0
from mpillama.quant.weight_type import Float32, StoredType, WeightType


@dataclass(frozen=True)
class DecodedType(StoredType):
    """A type whose values are quantised again as `again`."""

    again: WeightType = Q8_0

    def held_as(self) -> WeightType:
        return self.again

    def decode(self, raw: np.ndarray) -> Float32:
        try:
            from gguf.constants import GGMLQuantizationType
            from gguf.quants import dequantize
        except ImportError as error:
            raise UserError(
                f"Weights stored as {self.name} are read with the package gguf, which is not installed: "
                "pip install 'mpillama[convert]'."
            ) from error
        with np.errstate(invalid="ignore", over="ignore"):
            return dequantize(np.ascontiguousarray(raw), GGMLQuantizationType[self.name.upper()])


TYPES = (
    DecodedType("iq2_xxs", 256, 66, ggml=16, again=Q6_K),
    DecodedType("iq2_xs", 256, 74, ggml=17, again=Q6_K),
    DecodedType("iq3_xxs", 256, 98, ggml=18, again=Q6_K),
    DecodedType("iq1_s", 256, 50, ggml=19, again=Q4_K),
    DecodedType("iq3_s", 256, 110, ggml=21, again=Q6_K),
    DecodedType("iq2_s", 256, 82, ggml=22, again=Q6_K),
    DecodedType("iq1_m", 256, 56, ggml=29, again=Q5_K),
    DecodedType("tq1_0", 256, 54, ggml=34, again=Q2_K),
    DecodedType("tq2_0", 256, 66, ggml=35, again=Q2_K),
)
"""Each becomes the smallest type whose root mean square error, in parts of that of the values, is small beside what the
type itself has lost: ternary weights in q2_k 0.3 %, iq1 1.1 % (s) and 2.5 % (m), iq2 and iq3 in q6_k 0.7 to 1.6 %."""
UNREAD = {9: "q8_1", 15: "q8_k", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64", 41: "q1_0"}
"""Other types of GGML by number, for saying what a file holds that is not read."""
