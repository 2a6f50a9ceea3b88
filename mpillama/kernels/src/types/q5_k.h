// q5_k (GGML's Q5_K): 5 bits, with a scale and a minimum of 6 bits for each row and block.
#pragma once
#include "types/nibbles.h"
#include "types/super_scales.h"

namespace mpillama {

struct Q5_K {
    static constexpr i64 NUMBER = 13;
    static constexpr bool BLOCKS = true;
    static constexpr i64 bytes = FIVE_BIT_BYTES;
    using Scales = SixBitScaleAndMinimum;
    using Steps = Vb[STEPS];

    static void load(const u8* values, int part, Steps& steps) { load_five_bits(values, part, steps); }
    static Vi dot(const Steps& steps, const i8* x, i32) { return dot_small(steps, x, 0); }
    template <int N, class Use, int H> static void dots(const Steps (&steps)[H], const i8* x, const i32*, Use use) {
        dots_small<N>(steps, x, [](int) { return splat(0); }, use);
    }
    static int at(const u8* values, int lane, int k) { return five_bits_at(values, lane, k); }
    static void signed_steps(const u8* values, u8* out) { spread_five_bits(values, 0, out); }
};

}  // namespace mpillama
