// What the integers of a block are multiplied by, W of its 16 rows at a time. A type has one of these as Scales:
//     bytes: those of a block of 16 rows;
//     super_bytes: those that 16 rows have for several blocks together, `super_columns` of arguments.h; 0 if there are none;
//     load(scales, supers, part): of rows W * part and the following;
//     add_scaled(dot, x_scale, start, sum): sum + what exact integer dots with an activation block of that scale stand for;
//     apply(scales, supers, lane, row): turn one row's 32 integers into its values, as the file format defines them;
//     HALVES: whether the first 16 k-values have other numbers than the last. Then there is instead
//     add_halves(first, last, x, sum), for the exact dots of each half.
#pragma once
#include "activations.h"

namespace mpillama {

inline float half_at(const u8* halves, int index) {
    float lanes[LANES];
    store16(lanes, load16_half(reinterpret_cast<const u16*>(halves) + index / LANES * LANES));
    return lanes[index % LANES];
}

// The scales of the blocks of some row groups, and those that `super_blocks` blocks of a group have in common.
struct ScaleArrays {
    const u8 *scales, *supers;
    i64 super_blocks;

    // From a block on whose number is a multiple of super_blocks.
    template <class Scales> ScaleArrays from(i64 block) const {
        if constexpr (Scales::super_bytes == 0) return {scales + block * Scales::bytes, supers, super_blocks};
        else return {scales + block * Scales::bytes, supers + block / super_blocks * Scales::super_bytes, super_blocks};
    }
};

// Goes through them block by block.
template <class Scales> struct ScalePlace {
    const u8 *scales, *supers;
    i64 super_blocks, left;

    ScalePlace() = default;
    ScalePlace(const ScaleArrays& arrays, i64 block) {
        const ScaleArrays here = arrays.from<Scales>(block);
        scales = here.scales, supers = here.supers, super_blocks = left = here.super_blocks;
    }
    void advance() {
        scales += Scales::bytes;
        if constexpr (Scales::super_bytes > 0)
            if (--left == 0) supers += Scales::super_bytes, left = super_blocks;
    }
};

// A float16 for each row.
struct HalfScale {
    static constexpr i64 bytes = 2 * LANES, super_bytes = 0;
    static constexpr bool HALVES = false;
    Vf scale;

    static HalfScale load(const u8* scales, const u8*, int part) {
        return {load_half(reinterpret_cast<const u16*>(scales) + W * part)};
    }

    Vf add_scaled(Vi dot, float x_scale, i32, Vf sum) const { return fma(to_float(dot), mul(scale, splat(x_scale)), sum); }

    static void apply(const u8* scales, const u8*, int lane, float* row) {
        const float scale = half_at(scales, lane);
        for (int i = 0; i < BLOCK; i++) row[i] *= scale;
    }
};

// A float16 for each row, and one that is added to its values: the minimum, which meets the sum of the activations. That
// sum is exact.
struct HalfScaleAndMinimum {
    static constexpr i64 bytes = 4 * LANES, super_bytes = 0;
    static constexpr bool HALVES = false;
    Vf scale, minimum;

    static HalfScaleAndMinimum load(const u8* scales, const u8*, int part) {
        const u16* halves = reinterpret_cast<const u16*>(scales) + W * part;
        return {load_half(halves), load_half(halves + LANES)};
    }

    Vf add_scaled(Vi dot, float x_scale, i32 start, Vf sum) const {
        const Vf of_x = splat(x_scale), total = splat(static_cast<float>(start) * -0.125f);
        return fma(total, mul(minimum, of_x), fma(to_float(dot), mul(scale, of_x), sum));
    }

    static void apply(const u8* scales, const u8*, int lane, float* row) {
        const float scale = half_at(scales, lane), minimum = half_at(scales, LANES + lane);
        for (int i = 0; i < BLOCK; i++) row[i] = row[i] * scale + minimum;
    }
};

// A byte e for each row: 2^(e - 128), subnormal below e = 2.
struct PowerScale {
    static constexpr i64 bytes = LANES, super_bytes = 0;
    static constexpr bool HALVES = false;
    Vf scale;

    static PowerScale load(const u8* scales, const u8*, int part) {
        const Vi e = bit_and(load_i8(reinterpret_cast<const i8*>(scales) + W * part), splat(255));
        const Vf normal = as_float(shift_left<23>(sub(e, splat(1))));
        const Vf subnormal = as_float(shift_left<21>(add(e, splat(1))));
        return {select(less(e, splat(2)), subnormal, normal)};
    }

    Vf add_scaled(Vi dot, float x_scale, i32, Vf sum) const { return fma(to_float(dot), mul(scale, splat(x_scale)), sum); }

    static void apply(const u8* scales, const u8* supers, int lane, float* row) {
        float lanes[W];
        store(lanes, load(scales, supers, lane / W).scale);
        for (int i = 0; i < BLOCK; i++) row[i] *= lanes[lane % W];
    }
};

}  // namespace mpillama
