// q5_0 (GGML's Q5_0): 5 bits, 16 too high, with a float16 scale for each row and block.
#pragma once
#include "types/nibbles.h"
#include "types/scales.h"

namespace mpillama {

struct Q5_0 {
    static constexpr i64 NUMBER = 5;
    static constexpr bool BLOCKS = true;
    static constexpr i64 bytes = FIVE_BIT_BYTES;
    using Scales = HalfScale;
    using Steps = Vb[STEPS];

    static void load(const u8* values, int part, Steps& steps) { load_five_bits(values, part, steps); }
    static Vi dot(const Steps& steps, const i8* x, i32 start) { return dot_small(steps, x, 2 * start); }
    template <int N, class Use, int H>
    static void dots(const Steps (&steps)[H], const i8* x, const i32* starts, Use use) {
        dots_small<N>(steps, x, [&](int t) { return shift_left<1>(splat(starts[t])); }, use);
    }
    static int at(const u8* values, int lane, int k) { return five_bits_at(values, lane, k) - 16; }
    static void signed_steps(const u8* values, u8* out) { spread_five_bits(values, 16, out); }
};

}  // namespace mpillama
