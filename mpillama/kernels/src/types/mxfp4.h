// mxfp4 (GGML's MXFP4): nibbles that are floats of 4 bits (E2M1), with a power of two for each row and block. Twice the
// floats are integers; 12 is added to each, so that none is negative.
#pragma once
#include "types/nibbles.h"
#include "types/scales.h"

namespace mpillama {

struct MXFP4 {
    static constexpr i64 NUMBER = 7;
    static constexpr bool BLOCKS = true;
    static constexpr i64 bytes = NIBBLE_BYTES;
    using Scales = PowerScale;
    using Steps = Vb[STEPS];
    static constexpr i8 TABLE[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    static constexpr i8 RAISED[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

    static void load(const u8* values, int part, Steps& steps) {
        const Vb table = load_table(RAISED);
        load_nibbles(values, part, steps);
        for (Vb& step : steps) step = look_up(table, step);
    }
    static Vi dot(const Steps& steps, const i8* x, i32 start) { return dot_small(steps, x, start / 2 * 3); }
    template <int N, class Use, int H>
    static void dots(const Steps (&steps)[H], const i8* x, const i32* starts, Use use) {
        dots_small<N>(steps, x, [&](int t) { return splat(starts[t] / 2 * 3); }, use);
    }
    static int at(const u8* values, int lane, int k) { return TABLE[nibble_at(values, lane, k)]; }
    static void signed_steps(const u8* values, u8* out) { spread_nibbles(values, TABLE, out); }
};

}  // namespace mpillama
