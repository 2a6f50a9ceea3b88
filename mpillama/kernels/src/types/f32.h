// float32.
#pragma once
#include "types/scales.h"

namespace mpillama {

struct F32 {
    static constexpr i64 NUMBER = 0;
    static constexpr bool BLOCKS = false;
    using Scales = NoScale;
    static constexpr i64 bytes = 64;

    static Vf load(const u8* values, int part) {
        return mpillama::load(reinterpret_cast<const float*>(values) + W * part);
    }
};

}  // namespace mpillama
