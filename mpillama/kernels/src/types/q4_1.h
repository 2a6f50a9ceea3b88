// q4_1 (GGML's Q4_1): nibbles, with a float16 scale and a float16 minimum for each row and block.
#pragma once
#include "types/nibbles.h"
#include "types/scales.h"

namespace mpillama {

struct Q4_1 {
    static constexpr i64 NUMBER = 8;
    static constexpr bool BLOCKS = true;
    static constexpr i64 bytes = NIBBLE_BYTES;
    using Scales = HalfScaleAndMinimum;
    using Steps = Vb[STEPS];

    static void load(const u8* values, int part, Steps& steps) { load_nibbles(values, part, steps); }
    static Vi dot(const Steps& steps, const i8* x, i32) { return dot_nibbles(steps, x, 0); }
    template <int N, class Use, int H>
    static void dots(const Steps (&steps)[H], const i8* x, const i32*, Use use) {
        dots_nibbles<N>(steps, x, [](int) { return splat(0); }, use);
    }
    static int at(const u8* values, int lane, int k) { return nibble_at(values, lane, k); }
    static void signed_steps(const u8* values, u8* out) {
        for (int i = 0; i < bytes; i++) {
            out[i] = values[i] & 15;
            out[bytes + i] = values[i] >> 4;
        }
    }
};

}  // namespace mpillama
