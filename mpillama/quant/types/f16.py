"""Float16, IEEE's half precision."""

from mpillama.quant.floats import FloatType
from mpillama.quant.weight_type import LANES, LaneArray


class Float16Type(FloatType):
    lanes = (LaneArray("", "<f2", LANES, 1),)


F16 = Float16Type("f16", 1, 2, ggml=1, safetensors="F16", number=1)
