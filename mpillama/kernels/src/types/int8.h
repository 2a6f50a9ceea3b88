// int8: int8, with a float32 scale and a zero point for each row and group of columns.
#pragma once
#include "types/group_scales.h"
#include "types/q8_0.h"

namespace mpillama {

struct INT8 : Q8_0 {
    static constexpr i64 NUMBER = 34;
    using Scales = GroupScaleAndZero<Single>;
};

}  // namespace mpillama
