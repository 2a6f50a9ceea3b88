// float16.
#pragma once
#include "types/scales.h"

namespace mpillama {

struct F16 {
    static constexpr i64 NUMBER = 1;
    static constexpr bool BLOCKS = false;
    using Scales = NoScale;
    static constexpr i64 bytes = 32;

    static Vf load(const u8* values, int part) { return load_half(reinterpret_cast<const u16*>(values) + W * part); }
};

}  // namespace mpillama
