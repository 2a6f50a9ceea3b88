// iq4_xs (GGML's IQ4_XS): iq4_nl's values, with a scale of 6 bits for each row and block.
#pragma once
#include "types/iq4_nl.h"
#include "types/super_scales.h"

namespace mpillama {

struct IQ4_XS {
    static constexpr i64 NUMBER = 15;
    static constexpr bool BLOCKS = true;
    static constexpr i64 bytes = NIBBLE_BYTES;
    using Scales = SixBitScale;
    using Steps = Vb[STEPS];

    static void load(const u8* values, int part, Steps& steps) { IQ4_NL::load(values, part, steps); }
    static Vi dot(const Steps& steps, const i8* x, i32 start) { return dot_signed(steps, x, start); }
    template <int N, class Use, int H> static void dots(const Steps (&steps)[H], const i8* x, const i32* starts, Use use) {
        dots_signed<N>(steps, x, starts, use);
    }
    static int at(const u8* values, int lane, int k) { return IQ4_NL::at(values, lane, k); }
    static void signed_steps(const u8* values, u8* out) { IQ4_NL::signed_steps(values, out); }
};

}  // namespace mpillama
