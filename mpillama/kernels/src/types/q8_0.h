// q8_0 (GGML's Q8_0): int8 with a float16 scale for each row and block. 8 steps of 64 bytes: 16 rows x 4 k-values.
#pragma once
#include "lanes.h"

namespace mpillama {

struct Q8_0 {
    static constexpr i64 NUMBER = 3;
    static constexpr bool BLOCKS = true;
    static constexpr i64 bytes = 512;

    struct Part {
        Vb steps[STEPS];
        Vf scale;
    };

    static Part load(const u8* values, const u16* scales, int part) {
        Part result;
        for (int j = 0; j < STEPS; j++) result.steps[j] = signed_step(load_bytes(values + 64 * j + 4 * W * part));
        result.scale = load_half(scales + W * part);
        return result;
    }

    static Vf add(const Part& part, const i8* x, float scale, i32 start, Vf sum) {
        return fma(to_float(dot_signed(part.steps, x, start)), mul(part.scale, splat(scale)), sum);
    }

    // A block as 8 steps of signed bytes: as it is.
    static void signed_steps(const u8* values, u8* out) { std::memcpy(out, values, bytes); }

    static void row(const u8* values, const u16* scales, int lane, float* out) {
        float lanes[LANES];
        store16(lanes, load16_half(scales));
        for (int i = 0; i < BLOCK; i++)
            out[i] = static_cast<float>(static_cast<i8>(values[i / 4 * 64 + 4 * lane + i % 4])) * lanes[lane];
    }
};

}  // namespace mpillama
