// int4_f16: nibbles, with a float16 scale and a zero point for each row and group of columns.
#pragma once
#include "types/group_scales.h"
#include "types/q4_1.h"

namespace mpillama {

struct INT4_F16 : Q4_1 {
    static constexpr i64 NUMBER = 32;
    using Scales = GroupScaleAndZero<Half>;
};

}  // namespace mpillama
