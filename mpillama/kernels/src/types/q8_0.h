// q8_0 (GGML's Q8_0): int8 with a float16 scale for each row and block. 8 steps of 64 bytes: 16 rows x 4 k-values.
#pragma once
#include "types/scales.h"

namespace mpillama {

struct Q8_0 {
    static constexpr i64 NUMBER = 3;
    static constexpr bool BLOCKS = true;
    static constexpr i64 bytes = 512;
    using Scales = HalfScale;
    using Steps = Vb[STEPS];

    static void load(const u8* values, int part, Steps& steps) {
        for (int j = 0; j < STEPS; j++) steps[j] = signed_step(load_bytes(values + 64 * j + 4 * W * part));
    }
    static Vi dot(const Steps& steps, const i8* x, i32 start) { return dot_signed(steps, x, start); }
    template <int N, class Use, int H>
    static void dots(const Steps (&steps)[H], const i8* x, const i32* starts, Use use) {
        dots_signed<N>(steps, x, starts, use);
    }
    static int at(const u8* values, int lane, int k) { return static_cast<i8>(values[k / 4 * 64 + 4 * lane + k % 4]); }
    static void signed_steps(const u8* values, u8* out) { std::memcpy(out, values, bytes); }
};

}  // namespace mpillama
