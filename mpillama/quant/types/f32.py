"""Float32."""

from mpillama.quant.floats import FloatType
from mpillama.quant.weight_type import LANES, LaneArray


class Float32Type(FloatType):
    lanes = (LaneArray("", "<f4", LANES, 1),)


F32 = Float32Type("f32", 1, 4, ggml=0, safetensors="F32", number=0)
