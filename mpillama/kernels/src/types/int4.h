// int4: nibbles, 8 too high, as those of q4_0, with a bfloat16 scale for each row and group of columns.
#pragma once
#include "types/group_scales.h"
#include "types/q4_0.h"

namespace mpillama {

struct INT4 : Q4_0 {
    static constexpr i64 NUMBER = 31;
    using Scales = GroupScale<BFloat>;
};

}  // namespace mpillama
