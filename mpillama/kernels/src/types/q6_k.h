// q6_k (GGML's Q6_K): 6 bits, 32 too high, with an int8 scale for each row and half of a block.
#pragma once
#include "types/nibbles.h"
#include "types/super_scales.h"

namespace mpillama {

struct Q6_K : FactoredHalves<ScaleOfHalves<WholeBytes<32>>, 63> {
    static constexpr i64 NUMBER = 12;
    static constexpr bool BLOCKS = true;
    static constexpr i64 bytes = SIX_BIT_BYTES;

    static void load(const u8* values, int part, Steps& steps) { load_six_bits(values, part, steps); }
    static int at(const u8* values, int lane, int k) { return six_bits_at(values, lane, k) - 32; }
    static void signed_steps(const u8* values, u8* out) {
        spread([=](int lane, int k) { return at(values, lane, k); }, out);
    }
};

}  // namespace mpillama
