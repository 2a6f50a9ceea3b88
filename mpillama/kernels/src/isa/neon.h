// ARMv8.2 with the dot product of bytes: 16 lanes are four registers, and a product works on 4 rows at a time.
#pragma once
#include <arm_neon.h>

namespace mpillama {

constexpr int W = 4;
using Vf = float32x4_t;
using Vi = int32x4_t;
using Vb = int8x16_t;
struct Vm {
    uint32x4_t bits;
};
struct Vd {
    float64x2_t low, high;
};

inline Vf load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Vf x) { vst1q_f32(p, x); }
inline Vf splat(float x) { return vdupq_n_f32(x); }
inline Vf add(Vf x, Vf y) { return vaddq_f32(x, y); }
inline Vf sub(Vf x, Vf y) { return vsubq_f32(x, y); }
inline Vf mul(Vf x, Vf y) { return vmulq_f32(x, y); }
inline Vf div(Vf x, Vf y) { return vdivq_f32(x, y); }
inline Vf fma(Vf x, Vf y, Vf z) { return vfmaq_f32(z, x, y); }
inline Vf fnma(Vf x, Vf y, Vf z) { return vfmsq_f32(z, x, y); }  // z - x * y
inline Vm less(Vf x, Vf y) { return {vcltq_f32(x, y)}; }
inline Vm not_less(Vf x, Vf y) { return {vmvnq_u32(vcltq_f32(x, y))}; }
inline Vm is_nan(Vf x) { return {vmvnq_u32(vceqq_f32(x, x))}; }
inline Vf select(Vm m, Vf x, Vf y) { return vbslq_f32(m.bits, x, y); }
inline Vi as_int(Vf x) { return vreinterpretq_s32_f32(x); }
inline Vf as_float(Vi x) { return vreinterpretq_f32_s32(x); }
inline Vf to_float(Vi x) { return vcvtq_f32_s32(x); }
inline Vi truncate(Vf x) { return vcvtq_s32_f32(x); }

inline Vi load(const i32* p) { return vld1q_s32(p); }
inline void store(i32* p, Vi x) { vst1q_s32(p, x); }
inline Vi splat(i32 x) { return vdupq_n_s32(x); }
inline Vi add(Vi x, Vi y) { return vaddq_s32(x, y); }
inline Vi sub(Vi x, Vi y) { return vsubq_s32(x, y); }
inline Vi mul(Vi x, Vi y) { return vmulq_s32(x, y); }
inline Vi bit_and(Vi x, Vi y) { return vandq_s32(x, y); }
inline Vi bit_or(Vi x, Vi y) { return vorrq_s32(x, y); }
inline Vi bit_xor(Vi x, Vi y) { return veorq_s32(x, y); }
template <int N> inline Vi shift_left(Vi x) { return vshlq_n_s32(x, N); }
template <int N> inline Vi shift_right(Vi x) {
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x), N));
}
inline Vi max_unsigned(Vi x, Vi y) {
    return vreinterpretq_s32_u32(vmaxq_u32(vreinterpretq_u32_s32(x), vreinterpretq_u32_s32(y)));
}
inline Vm less(Vi x, Vi y) { return {vcltq_s32(x, y)}; }
inline Vm both(Vm x, Vm y) { return {vandq_u32(x.bits, y.bits)}; }
inline Vi load_u8(const u8* p) { return Vi{p[0], p[1], p[2], p[3]}; }
inline Vi load_i8(const i8* p) { return Vi{p[0], p[1], p[2], p[3]}; }
inline void store_i8(i8* p, Vi x) {
    p[0] = static_cast<i8>(vgetq_lane_s32(x, 0));
    p[1] = static_cast<i8>(vgetq_lane_s32(x, 1));
    p[2] = static_cast<i8>(vgetq_lane_s32(x, 2));
    p[3] = static_cast<i8>(vgetq_lane_s32(x, 3));
}

inline Vd load(const double* p) { return {vld1q_f64(p), vld1q_f64(p + 2)}; }
inline void store(double* p, Vd x) {
    vst1q_f64(p, x.low);
    vst1q_f64(p + 2, x.high);
}
inline Vd splat(double x) { return {vdupq_n_f64(x), vdupq_n_f64(x)}; }
inline Vd add(Vd x, Vd y) { return {vaddq_f64(x.low, y.low), vaddq_f64(x.high, y.high)}; }
inline Vd sub(Vd x, Vd y) { return {vsubq_f64(x.low, y.low), vsubq_f64(x.high, y.high)}; }
inline Vd fma(Vd x, Vd y, Vd z) { return {vfmaq_f64(z.low, x.low, y.low), vfmaq_f64(z.high, x.high, y.high)}; }
inline Vd widen(Vf x) { return {vcvt_f64_f32(vget_low_f32(x)), vcvt_high_f64_f32(x)}; }
inline Vf narrow(Vd x) { return vcvt_high_f32_f64(vcvt_f32_f64(x.low), x.high); }

inline Vf load_half(const u16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void store_half(u16* p, Vf x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
inline Vf load_bf16(const u16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
// Floats of 8 bits (E4M3), times 2^-8: what they are as halves of which they have all but the lowest bits.
inline Vf load_e4m3(const u8* p) {
    const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(load_i32(p)));
    const int16x4_t wide = vshl_n_s16(vget_low_s16(vmovl_s8(bytes)), 7);
    return vcvt_f32_f16(vreinterpret_f16_s16(vand_s16(wide, vdup_n_s16(static_cast<std::int16_t>(0xbfff)))));
}

inline Vb load_bytes(const u8* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }
inline Vb low_nibbles(Vb x) { return vandq_s8(x, vdupq_n_s8(15)); }
inline Vb high_nibbles(Vb x) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(x), 4)); }
inline Vb signed_step(Vb x) { return x; }

inline Vb bit_or(Vb x, Vb y) { return vorrq_s8(x, y); }

// Bytes moved down by RIGHT bits (up, if it is negative), and what is left of them under a mask.
template <int RIGHT> inline Vb moved_bits(Vb x, u8 mask) {
    uint8x16_t moved = vreinterpretq_u8_s8(x);
    if constexpr (RIGHT < 0) moved = vshlq_n_u8(moved, -RIGHT);
    if constexpr (RIGHT > 0) moved = vshrq_n_u8(moved, RIGHT);
    return vreinterpretq_s8_u8(vandq_u8(moved, vdupq_n_u8(mask)));
}

// 4 bits of each row: row i has nibble i / 2 of the 32-bit word i % 2.
inline Vi load_row_nibbles(const u8* p, int part) {
    const uint32x2_t words = vreinterpret_u32_u8(vld1_u8(p));
    const int32x4_t places = vsubq_s32(int32x4_t{0, 0, -4, -4}, vdupq_n_s32(8 * part));
    const uint32x4_t moved = vshlq_u32(vcombine_u32(words, words), places);
    return vreinterpretq_s32_u32(vandq_u32(moved, vdupq_n_u32(15)));
}
// 2 bits of each row, in order.
inline Vi load_row_pairs(const u8* p, int part) {
    const uint32x4_t moved = vshlq_u32(vdupq_n_u32(p[part]), int32x4_t{0, -2, -4, -6});
    return vreinterpretq_s32_u32(vandq_u32(moved, vdupq_n_u32(3)));
}

// Of 16 bytes those that small integers choose.
inline Vb load_table(const i8* p) { return vld1q_s8(p); }
inline Vb look_up(Vb table, Vb places) { return vqtbl1q_s8(table, vreinterpretq_u8_s8(places)); }

// Bit STEP of every byte as the fifth bit of a nibble.
template <int STEP> inline Vb with_fifth_bit(Vb nibbles, Vb bits) {
    uint8x16_t moved = vreinterpretq_u8_s8(bits);
    if constexpr (STEP < 4) moved = vshlq_n_u8(moved, 4 - STEP);
    if constexpr (STEP > 4) moved = vshrq_n_u8(moved, STEP - 4);
    return vorrq_s8(nibbles, vreinterpretq_s8_u8(vandq_u8(moved, vdupq_n_u8(16))));
}

inline Vi dot_steps(const Vb (&w)[STEPS], const i8* x, Vi sum) {
    const int8x16_t low = vld1q_s8(x), high = vld1q_s8(x + 16);
    sum = vdotq_laneq_s32(sum, w[0], low, 0);
    sum = vdotq_laneq_s32(sum, w[1], low, 1);
    sum = vdotq_laneq_s32(sum, w[2], low, 2);
    sum = vdotq_laneq_s32(sum, w[3], low, 3);
    sum = vdotq_laneq_s32(sum, w[4], high, 0);
    sum = vdotq_laneq_s32(sum, w[5], high, 1);
    sum = vdotq_laneq_s32(sum, w[6], high, 2);
    return vdotq_laneq_s32(sum, w[7], high, 3);
}

// `start` is -8 times the sum of the activations: it takes back the 8 that is added to every nibble.
inline Vi dot_nibbles(const Vb (&w)[STEPS], const i8* x, i32 start) { return dot_steps(w, x, splat(start)); }
inline Vi dot_small(const Vb (&w)[STEPS], const i8* x, i32 start) { return dot_steps(w, x, splat(start)); }
inline Vi dot_signed(const Vb (&w)[STEPS], const i8* x, i32) { return dot_steps(w, x, splat(0)); }

// sum + x.low * y.low + x.high * y.high, of the 16-bit halves of each lane and of y.
inline Vi dot_pairs(Vi x, i32 y, Vi sum) {
    const int16x8_t a = vreinterpretq_s16_s32(x), b = vreinterpretq_s16_s32(splat(y));
    const Vi low = vmull_s16(vget_low_s16(a), vget_low_s16(b)), high = vmull_high_s16(a, b);
    return vaddq_s32(sum, vpaddq_s32(low, high));
}

// Bytes up to MOST, below 64, whose first and last four steps have factors of their own (at most 8 signed bits), as
// as_factor makes them: the sum of both dots times these.
inline Vi as_factor(Vi x) { return x; }
template <int MOST> inline Vi dot_halves(const Vb (&w)[STEPS], const i8* x, Vi first, Vi last) {
    const int8x16_t low = vld1q_s8(x), high = vld1q_s8(x + 16);
    Vi sums[2] = {splat(0), splat(0)};
    sums[0] = vdotq_laneq_s32(sums[0], w[0], low, 0);
    sums[0] = vdotq_laneq_s32(sums[0], w[1], low, 1);
    sums[0] = vdotq_laneq_s32(sums[0], w[2], low, 2);
    sums[0] = vdotq_laneq_s32(sums[0], w[3], low, 3);
    sums[1] = vdotq_laneq_s32(sums[1], w[4], high, 0);
    sums[1] = vdotq_laneq_s32(sums[1], w[5], high, 1);
    sums[1] = vdotq_laneq_s32(sums[1], w[6], high, 2);
    sums[1] = vdotq_laneq_s32(sums[1], w[7], high, 3);
    return vmlaq_s32(vmulq_s32(sums[0], first), sums[1], last);
}

// The dots of the first and of the last four steps by themselves, of bytes below 32.
inline void dot_each_half(const Vb (&w)[STEPS], const i8* x, Vi& first, Vi& last) {
    const int8x16_t low = vld1q_s8(x), high = vld1q_s8(x + 16);
    first = last = splat(0);
    first = vdotq_laneq_s32(first, w[0], low, 0);
    first = vdotq_laneq_s32(first, w[1], low, 1);
    first = vdotq_laneq_s32(first, w[2], low, 2);
    first = vdotq_laneq_s32(first, w[3], low, 3);
    last = vdotq_laneq_s32(last, w[4], high, 0);
    last = vdotq_laneq_s32(last, w[5], high, 1);
    last = vdotq_laneq_s32(last, w[6], high, 2);
    last = vdotq_laneq_s32(last, w[7], high, 3);
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void pause() { asm volatile("yield"); }

}  // namespace mpillama
