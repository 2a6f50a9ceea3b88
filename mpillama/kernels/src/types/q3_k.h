// q3_k (GGML's Q3_K): 3 bits, 4 too high, with a scale of 6 bits for each row and half of a block.
#pragma once
#include "types/nibbles.h"
#include "types/super_scales.h"

namespace mpillama {

struct Q3_K : FactoredHalves<ScaleOfHalves<SixBits<4>>, 7> {
    static constexpr i64 NUMBER = 11;
    static constexpr bool BLOCKS = true;
    static constexpr i64 bytes = THREE_BIT_BYTES;

    static void load(const u8* values, int part, Steps& steps) { load_three_bits(values, part, steps); }
    static int at(const u8* values, int lane, int k) { return three_bits_at(values, lane, k) - 4; }
    static void signed_steps(const u8* values, u8* out) {
        spread([=](int lane, int k) { return at(values, lane, k); }, out);
    }
};

}  // namespace mpillama
