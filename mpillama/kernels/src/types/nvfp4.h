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

    Vf add_halves(Vi of_first, Vi of_last, const InputBlock& x, Vf sum) const {
        const Vf both = fma(to_float(of_last), last, mul(to_float(of_first), first));
        return fma(both, splat(whole * x.scale), sum);
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
        const i32 of_first = static_cast<std::int16_t>(x.halves), of_last = x.halves >> 16;
        return scales.add_halves(mpillama::add(first, splat(-12 * of_first)), mpillama::add(last, splat(-12 * of_last)), x,
                                 sum);
    }
};

}  // namespace mpillama
