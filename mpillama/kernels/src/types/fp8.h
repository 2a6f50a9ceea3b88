// fp8: floats of 8 bits (E4M3) that meet float32 activations, with a float32 scale for each row and group of columns.
#pragma once
#include "types/group_scales.h"

namespace mpillama {

struct FP8 {
    static constexpr i64 NUMBER = 30;
    static constexpr bool BLOCKS = false;
    static constexpr i64 bytes = 16;
    using Scales = GroupScale<Single256>;

    static Vf load(const u8* values, int part) { return load_e4m3(values + W * part); }
};

}  // namespace mpillama
