// nvfp4: nibbles that are floats of 4 bits (E2M1), with a float of 8 bits for each row and half of a block, and a float32
// for 16 rows. Twice the floats are integers; 12 is added to each, so that none is negative, as in mxfp4.
#pragma once
#include "types/mxfp4.h"

namespace mpillama {

// 16 bytes of the first halves, 16 of the others: floats without a sign, 5 bits of exponent and 3 of mantissa, which stand
// for twice what they multiply.
struct ByteScales {
    static constexpr i64 bytes = 2 * LANES, super_bytes = 4;
    static constexpr bool HALVES = true;
    Vf first, last;
    float whole;

    static Vf load_scale(const u8* scales, int part) {
        const Vi b = bit_and(load_i8(reinterpret_cast<const i8*>(scales) + W * part), splat(255));
        const Vf normal = as_float(shift_left<20>(add(b, splat(119 * 8)))), subnormal = mul(to_float(b), splat(0x1p-10f));
        return select(less(b, splat(8)), subnormal, select(less(splat(0xf7), b), splat(__builtin_inff()), normal));
    }
    static ByteScales load(const u8* scales, const u8* supers, int part) {
        float whole;
        std::memcpy(&whole, supers, sizeof whole);
        return {load_scale(scales, part), load_scale(scales + LANES, part), whole};
    }

    Vf scaled_first(Vi of_first) const { return mul(to_float(of_first), first); }
    Vf add_last(Vf of_first, Vi of_last, float x_scale, Vf sum) const {
        return fma(fma(to_float(of_last), last, of_first), splat(whole * x_scale), sum);
    }
    Vf add_halves(Vi of_first, Vi of_last, const InputBlock& x, Vf sum) const {
        return add_last(scaled_first(of_first), of_last, x.scale, sum);
    }

    static void apply(const u8* scales, const u8* supers, int lane, float* row) {
        float found[2][W];
        const ByteScales part = load(scales, supers, lane / W);
        store(found[0], part.first);
        store(found[1], part.last);
        for (int i = 0; i < BLOCK; i++) row[i] = row[i] * found[i / (BLOCK / 2)][lane % W] * part.whole;
    }
};

struct NVFP4 : MXFP4 {
    static constexpr i64 NUMBER = 35;
    using Scales = ByteScales;

    static Vf add(const Steps& steps, const Scales& scales, const InputBlock& x, Vf sum) {
        Vi first, last;
        dot_each_half(steps, x.values, first, last);
        return scales.add_halves(mpillama::add(first, too_high_first(x.halves)), mpillama::add(last, too_high_last(x.halves)),
                                 x, sum);
    }
    template <int N, int H>
    static void adds(const Steps (&steps)[H], const Scales (&scales)[H], const InputBlocks& x, i64 place, Vf (&sums)[H][N]) {
        const i32* const halves = x.halves + place;
        const auto make = [&](int h, int t, Vi first) {
            return scales[h].scaled_first(mpillama::add(first, too_high_first(halves[t])));
        };
        dots_each_half<N>(steps, x.values + BLOCK * place, make, [&](int h, int t, Vf first, Vi last) {
            const Vi exact = mpillama::add(last, too_high_last(halves[t]));
            sums[h][t] = scales[h].add_last(first, exact, x.scales[place + t], sums[h][t]);
        });
    }

private:
    // What the 12 that is added to each number makes of each half's activations, negative.
    static Vi too_high_first(i32 halves) { return splat(-12 * static_cast<std::int16_t>(halves)); }
    static Vi too_high_last(i32 halves) { return splat(-12 * (halves >> 16)); }
};

}  // namespace mpillama
