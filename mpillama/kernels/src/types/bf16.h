// bfloat16: the upper half of a float32.
#pragma once
#include "types/scales.h"

namespace mpillama {

struct BF16 {
    static constexpr i64 NUMBER = 2;
    static constexpr bool BLOCKS = false;
    using Scales = NoScale;
    static constexpr i64 bytes = 32;

    static Vf load(const u8* values, int part) { return load_bf16(reinterpret_cast<const u16*>(values) + W * part); }
};

}  // namespace mpillama
