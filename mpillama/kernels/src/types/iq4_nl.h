// iq4_nl (GGML's IQ4_NL): nibbles that choose from 16 integers, with a float16 scale for each row and block.
#pragma once
#include "types/nibbles.h"
#include "types/scales.h"

namespace mpillama {

struct IQ4_NL {
    static constexpr i64 NUMBER = 6;
    static constexpr bool BLOCKS = true;
    static constexpr i64 bytes = NIBBLE_BYTES;
    using Scales = HalfScale;
    using Steps = Vb[STEPS];
    static constexpr i8 TABLE[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

    static void load(const u8* values, int part, Steps& steps) {
        const Vb table = signed_step(load_table(TABLE));
        load_nibbles(values, part, steps);
        for (Vb& step : steps) step = look_up(table, step);
    }
    static Vi dot(const Steps& steps, const i8* x, i32 start) { return dot_signed(steps, x, start); }
    template <int N, class Use, int H>
    static void dots(const Steps (&steps)[H], const i8* x, const i32* starts, Use use) {
        dots_signed<N>(steps, x, starts, use);
    }
    static int at(const u8* values, int lane, int k) { return TABLE[nibble_at(values, lane, k)]; }
    static void signed_steps(const u8* values, u8* out) { spread_nibbles(values, TABLE, out); }
};

}  // namespace mpillama
