// Scales of GGML's K-types: small integers for each block or half of one, times float16 that several blocks have in
// common. scales.h says what each struct has.
#pragma once
#include "types/scales.h"

namespace mpillama {

// Two numbers of 6 bits for each row: 16 bytes of both lower nibbles, then 4 bits of each row (load_row_nibbles).
constexpr i64 SIX_BIT_PAIR_BYTES = 24;

inline void load_six_bit_pairs(const u8* scales, int part, Vi& first, Vi& second) {
    const Vi low = load_u8(scales + W * part), high = load_row_nibbles(scales + LANES, part);
    first = bit_or(bit_and(low, splat(15)), shift_left<4>(bit_and(high, splat(3))));
    second = bit_or(shift_right<4>(low), shift_left<2>(bit_and(high, splat(12))));
}

// What one row's lane of vectors is.
template <class Load> inline i32 lane_of(int lane, Load load_part) {
    i32 lanes[W];
    store(lanes, load_part(lane / W));
    return lanes[lane % W];
}

// For each block a scale and a minimum of 6 bits, which is subtracted: q4_k and q5_k.
struct SixBitScaleAndMinimum {
    static constexpr i64 bytes = SIX_BIT_PAIR_BYTES, super_bytes = 4 * LANES;
    static constexpr bool HALVES = false;
    Vf scale, minimum;

    static SixBitScaleAndMinimum load(const u8* scales, const u8* supers, int part) {
        const u16* halves = reinterpret_cast<const u16*>(supers) + W * part;
        Vi of_scale, of_minimum;
        load_six_bit_pairs(scales, part, of_scale, of_minimum);
        return {mul(to_float(of_scale), load_half(halves)), mul(to_float(of_minimum), load_half(halves + LANES))};
    }

    Vf add_scaled(Vi dot, float x_scale, i32 start, Vf sum) const {
        const Vf of_x = splat(x_scale), total = splat(static_cast<float>(start) * 0.125f);
        return fma(total, mul(minimum, of_x), fma(to_float(dot), mul(scale, of_x), sum));
    }

    static void apply(const u8* scales, const u8* supers, int lane, float* row) {
        float found[2][W];
        const SixBitScaleAndMinimum part = load(scales, supers, lane / W);
        store(found[0], part.scale);
        store(found[1], part.minimum);
        for (int i = 0; i < BLOCK; i++) row[i] = row[i] * found[0][lane % W] - found[1][lane % W];
    }
};

// For each block a scale of 6 bits, 32 too high: iq4_xs. 8 bytes of lower nibbles (load_row_nibbles), 4 of the others.
struct SixBitScale {
    static constexpr i64 bytes = 12, super_bytes = 2 * LANES;
    static constexpr bool HALVES = false;
    Vf scale;

    static SixBitScale load(const u8* scales, const u8* supers, int part) {
        const Vi low = load_row_nibbles(scales, part), high = load_row_pairs(scales + 8, part);
        const Vi whole = sub(bit_or(low, shift_left<4>(high)), splat(32));
        return {mul(to_float(whole), load_half(reinterpret_cast<const u16*>(supers) + W * part))};
    }

    Vf add_scaled(Vi dot, float x_scale, i32, Vf sum) const { return fma(to_float(dot), mul(scale, splat(x_scale)), sum); }

    static void apply(const u8* scales, const u8* supers, int lane, float* row) {
        float lanes[W];
        store(lanes, load(scales, supers, lane / W).scale);
        for (int i = 0; i < BLOCK; i++) row[i] *= lanes[lane % W];
    }
};

// A scale for each half of a block, and how many too high its numbers are, as what the sums of activations are multiplied
// by: its negative, for both halves in a lane.
struct HalfFactors {
    Vi first, last, offsets;

    HalfFactors() = default;
    HalfFactors(Vi of_first, Vi of_last, int too_high) : first(of_first), last(of_last) {
        offsets = pair(mul(first, splat(-too_high)), mul(last, splat(-too_high)));
    }
    static Vi pair(Vi low, Vi high) { return bit_or(bit_and(low, splat(0xffff)), shift_left<16>(high)); }
};

// Scales of both halves and no minimum: q3_k and q6_k, whose `Integers` say how they are stored.
template <class Integers> struct ScaleOfHalves {
    static constexpr i64 bytes = Integers::bytes, super_bytes = 2 * LANES;
    static constexpr bool HALVES = true;
    HalfFactors factors;
    Vf scale;

    static ScaleOfHalves load(const u8* scales, const u8* supers, int part) {
        return {Integers::load(scales, part), load_half(reinterpret_cast<const u16*>(supers) + W * part)};
    }

    Vf add(Vi total, const InputBlock& x, Vf sum) const { return fma(to_float(total), mul(scale, splat(x.scale)), sum); }

    Vf add_raised(Vi total, const InputBlock& x, Vf sum) const {
        return add(dot_pairs(factors.offsets, x.halves, total), x, sum);
    }

    Vf add_halves(Vi of_first, Vi of_last, const InputBlock& x, Vf sum) const {
        return add(mpillama::add(mul(of_first, factors.first), mul(of_last, factors.last)), x, sum);
    }

    static void apply(const u8* scales, const u8* supers, int lane, float* row) {
        const float d = half_at(supers, lane);
        const i32 first = lane_of(lane, [&](int part) { return Integers::load(scales, part).first; });
        const i32 last = lane_of(lane, [&](int part) { return Integers::load(scales, part).last; });
        for (int i = 0; i < BLOCK; i++) row[i] *= d * static_cast<float>(i < BLOCK / 2 ? first : last);
    }
};

// 6 bits, 32 too high.
template <int TOO_HIGH> struct SixBits {
    static constexpr i64 bytes = SIX_BIT_PAIR_BYTES;
    static HalfFactors load(const u8* scales, int part) {
        Vi first, last;
        load_six_bit_pairs(scales, part, first, last);
        return {sub(first, splat(32)), sub(last, splat(32)), TOO_HIGH};
    }
};

// int8.
template <int TOO_HIGH> struct WholeBytes {
    static constexpr i64 bytes = 2 * LANES;
    static HalfFactors load(const u8* scales, int part) {
        const i8* of_first = reinterpret_cast<const i8*>(scales) + W * part;
        return {load_i8(of_first), load_i8(of_first + LANES), TOO_HIGH};
    }
};

// For each half a scale and a minimum of 4 bits, which is subtracted: q2_k. 16 bytes of the first half: scale, and minimum
// in the upper nibble; then those of the other.
struct NibbleScalesAndMinimums {
    static constexpr i64 bytes = 2 * LANES, super_bytes = 4 * LANES;
    static constexpr bool HALVES = true;
    HalfFactors factors;
    Vi minimums;
    Vf scale, minimum;

    static NibbleScalesAndMinimums load(const u8* scales, const u8* supers, int part) {
        const u16* halves = reinterpret_cast<const u16*>(supers) + W * part;
        const Vi first = load_u8(scales + W * part), last = load_u8(scales + LANES + W * part);
        return {{bit_and(first, splat(15)), bit_and(last, splat(15)), 0},
                bit_or(shift_right<4>(first), shift_left<16>(shift_right<4>(last))),
                load_half(halves), load_half(halves + LANES)};
    }

    Vf add(Vi total, const InputBlock& x, Vf sum) const {
        const Vf of_x = splat(x.scale), of_minimums = to_float(dot_pairs(minimums, x.halves, splat(0)));
        return fnma(of_minimums, mul(minimum, of_x), fma(to_float(total), mul(scale, of_x), sum));
    }

    Vf add_raised(Vi total, const InputBlock& x, Vf sum) const { return add(total, x, sum); }

    Vf add_halves(Vi of_first, Vi of_last, const InputBlock& x, Vf sum) const {
        return add(mpillama::add(mul(of_first, factors.first), mul(of_last, factors.last)), x, sum);
    }

    static void apply(const u8* scales, const u8* supers, int lane, float* row) {
        const float d = half_at(supers, lane), least = half_at(supers, LANES + lane);
        for (int i = 0; i < BLOCK; i++) {
            const int packed = scales[i / (BLOCK / 2) * LANES + lane];
            row[i] = row[i] * (d * static_cast<float>(packed & 15)) - least * static_cast<float>(packed >> 4);
        }
    }
};

// What types with such scales have in common: numbers up to MOST, none below zero.
template <class ScalesOfHalves, int MOST> struct FactoredHalves {
    using Scales = ScalesOfHalves;
    using Steps = Vb[STEPS];

    static Vf add(const Steps& steps, const Scales& scales, const InputBlock& x, Vf sum) {
        const Vi first = as_factor(scales.factors.first), last = as_factor(scales.factors.last);
        return scales.add_raised(dot_halves<MOST>(steps, x.values, first, last), x, sum);
    }
    template <int N, int H>
    static void adds(const Steps (&steps)[H], const Scales (&scales)[H], const InputBlocks& x, i64 place, Vf (&sums)[H][N]) {
        Vi first[H], last[H];
        for (int h = 0; h < H; h++) first[h] = as_factor(scales[h].factors.first), last[h] = as_factor(scales[h].factors.last);
        dots_halves<MOST, N>(steps, x.values + BLOCK * place, first, last, [&](int h, int t, Vi total) {
            sums[h][t] = scales[h].add_raised(total, x[place + t], sums[h][t]);
        });
    }
};

}  // namespace mpillama
