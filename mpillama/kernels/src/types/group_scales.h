// Scales that a row has for a group of columns, as the integers and floats of Hugging Face's checkpoints have them: all
// in `supers`. scales.h says what each struct has.
#pragma once
#include "types/scales.h"

namespace mpillama {

// How a scale is stored.
struct Half {
    static constexpr i64 bytes = 2;
    static Vf load(const u8* scales, int part) { return load_half(reinterpret_cast<const u16*>(scales) + W * part); }
};
struct BFloat {
    static constexpr i64 bytes = 2;
    static Vf load(const u8* scales, int part) { return load_bf16(reinterpret_cast<const u16*>(scales) + W * part); }
};
struct Single {
    static constexpr i64 bytes = 4;
    static Vf load(const u8* scales, int part) { return mpillama::load(reinterpret_cast<const float*>(scales) + W * part); }
};
// Of numbers that are held 2^-8 times too small.
struct Single256 {
    static constexpr i64 bytes = 4;
    static Vf load(const u8* scales, int part) { return mul(Single::load(scales, part), splat(256.0f)); }
};

// A scale for each row.
template <class Number> struct GroupScale {
    static constexpr i64 bytes = 0, super_bytes = Number::bytes * LANES;
    static constexpr bool HALVES = false;
    Vf scale;

    static GroupScale load(const u8*, const u8* supers, int part) { return {Number::load(supers, part)}; }

    Vf add_scaled(Vi dot, float x_scale, i32, Vf sum) const { return fma(to_float(dot), mul(scale, splat(x_scale)), sum); }

    static void apply(const u8* scales, const u8* supers, int lane, float* row) {
        float lanes[W];
        store(lanes, load(scales, supers, lane / W).scale);
        for (int i = 0; i < BLOCK; i++) row[i] *= lanes[lane % W];
    }
};

// A scale for each row, and behind them an int8 for each: the zero point, which is subtracted first. It meets the sum of
// the activations, and all that is exact in float32: |dot| and |zero * sum| are at most 128 * 127 * 32.
template <class Number> struct GroupScaleAndZero {
    static constexpr i64 bytes = 0, super_bytes = (Number::bytes + 1) * LANES;
    static constexpr bool HALVES = false;
    Vf scale, zero;

    static GroupScaleAndZero load(const u8*, const u8* supers, int part) {
        const i8* zeros = reinterpret_cast<const i8*>(supers + Number::bytes * LANES);
        return {Number::load(supers, part), to_float(load_i8(zeros + W * part))};
    }

    Vf add_scaled(Vi dot, float x_scale, i32 start, Vf sum) const {
        const Vf exact = fma(zero, splat(static_cast<float>(start) * 0.125f), to_float(dot));
        return fma(exact, mul(scale, splat(x_scale)), sum);
    }

    static void apply(const u8* scales, const u8* supers, int lane, float* row) {
        float found[2][W];
        const GroupScaleAndZero part = load(scales, supers, lane / W);
        store(found[0], part.scale);
        store(found[1], part.zero);
        for (int i = 0; i < BLOCK; i++) row[i] = (row[i] - found[1][lane % W]) * found[0][lane % W];
    }
};

}  // namespace mpillama
