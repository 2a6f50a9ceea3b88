// q2_k (GGML's Q2_K): 2 bits, with a scale and a minimum of 4 bits for each row and half of a block.
#pragma once
#include "types/nibbles.h"
#include "types/super_scales.h"

namespace mpillama {

struct Q2_K : FactoredHalves<NibbleScalesAndMinimums, 3> {
    static constexpr i64 NUMBER = 10;
    static constexpr bool BLOCKS = true;
    static constexpr i64 bytes = PAIR_BYTES;

    static void load(const u8* values, int part, Steps& steps) { load_pairs(values, part, steps); }
    static int at(const u8* values, int lane, int k) { return pair_at(values, lane, k); }
    static void signed_steps(const u8* values, u8* out) {
        spread([=](int lane, int k) { return at(values, lane, k); }, out);
    }
};

}  // namespace mpillama
