// q4_0 (GGML's Q4_0): nibbles, 8 too high, with a float16 scale for each row and block.
#pragma once
#include "types/nibbles.h"
#include "types/scales.h"

namespace mpillama {

struct Q4_0 {
    static constexpr i64 NUMBER = 4;
    static constexpr bool BLOCKS = true;
    static constexpr i64 bytes = NIBBLE_BYTES;
    using Scales = HalfScale;
    using Steps = Vb[STEPS];

    static void load(const u8* values, int part, Steps& steps) { load_nibbles(values, part, steps); }
    static Vi dot(const Steps& steps, const i8* x, i32 start) { return dot_nibbles(steps, x, start); }
    template <int N, class Use, int H>
    static void dots(const Steps (&steps)[H], const i8* x, const i32* starts, Use use) {
        dots_nibbles<N>(steps, x, [&](int t) { return splat(starts[t]); }, use);
    }
    static int at(const u8* values, int lane, int k) { return nibble_at(values, lane, k) - 8; }

    static void signed_steps(const u8* values, u8* out) {
        for (int i = 0; i < bytes; i++) {
            out[i] = static_cast<u8>((values[i] & 15) - 8);
            out[bytes + i] = static_cast<u8>((values[i] >> 4) - 8);
        }
    }
};

}  // namespace mpillama
