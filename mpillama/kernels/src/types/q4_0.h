// q4_0 (GGML's Q4_0): nibbles, 8 too high, with a float16 scale for each row and block. 4 times 64 bytes: steps j (low
// nibbles) and j + 4 (high nibbles) of 16 rows x 4 k-values.
#pragma once
#include "lanes.h"

namespace mpillama {

struct Q4_0 {
    static constexpr i64 NUMBER = 4;
    static constexpr bool BLOCKS = true;
    static constexpr i64 bytes = 256;

    struct Part {
        Vb steps[STEPS];
        Vf scale;
    };

    static Part load(const u8* values, const u16* scales, int part) {
        Part result;
        for (int j = 0; j < STEPS / 2; j++) {
            const Vb packed = load_bytes(values + 64 * j + 4 * W * part);
            result.steps[j] = low_nibbles(packed);
            result.steps[j + STEPS / 2] = high_nibbles(packed);
        }
        result.scale = load_half(scales + W * part);
        return result;
    }

    static Vf add(const Part& part, const i8* x, float scale, i32 start, Vf sum) {
        return fma(to_float(dot_nibbles(part.steps, x, start)), mul(part.scale, splat(scale)), sum);
    }

    // A block as 8 steps of signed bytes.
    static void signed_steps(const u8* values, u8* out) {
        for (int i = 0; i < bytes; i++) {
            out[i] = static_cast<u8>((values[i] & 15) - 8);
            out[bytes + i] = static_cast<u8>((values[i] >> 4) - 8);
        }
    }

    static void row(const u8* values, const u16* scales, int lane, float* out) {
        float lanes[LANES];
        store16(lanes, load16_half(scales));
        for (int i = 0; i < BLOCK; i++) {
            const int step = i / 4, packed = values[step % 4 * 64 + 4 * lane + i % 4];
            out[i] = static_cast<float>((step < 4 ? packed & 15 : packed >> 4) - 8) * lanes[lane];
        }
    }
};

}  // namespace mpillama
