// int4_bf16: nibbles, with a bfloat16 scale and a zero point for each row and group of columns.
#pragma once
#include "types/group_scales.h"
#include "types/q4_1.h"

namespace mpillama {

struct INT4_BF16 : Q4_1 {
    static constexpr i64 NUMBER = 33;
    using Scales = GroupScaleAndZero<BFloat>;
};

}  // namespace mpillama
