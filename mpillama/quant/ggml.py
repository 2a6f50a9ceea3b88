"""GGML's types that no kernel takes: the gguf package decodes them, and they are quantised again.

Sizes: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from dataclasses import dataclass

import numpy as np

from mpillama.errors import UserError
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
    DecodedType("q2_k", 256, 84, ggml=10),
    DecodedType("q3_k", 256, 110, ggml=11),
    DecodedType("q4_k", 256, 144, ggml=12),
    DecodedType("q5_k", 256, 176, ggml=13),
    DecodedType("q6_k", 256, 210, ggml=14),
)
UNREAD = {
    **{9: "q8_1", 15: "q8_k", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 21: "iq3_s"},
    **{
        22: "iq2_s",
        23: "iq4_xs",
        24: "i8",
        25: "i16",
        26: "i32",
        27: "i64",
        28: "f64",
    },
    **{29: "iq1_m", 34: "tq1_0", 35: "tq2_0", 40: "nvfp4", 41: "q1_0"},
}
"""Other types of GGML by number, for saying what a file holds that is not read."""
