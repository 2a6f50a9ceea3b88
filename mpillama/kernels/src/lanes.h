// The vocabulary of the kernels: 16 lanes (rows, positions or channels), whatever the width of the registers.
//
// An instruction set is one header of isa/: vectors of W lanes (Vf float32, Vi int32, Vd float64, Vm masks, Vb 4 W bytes)
// and what is done with them. Everything that has 16 lanes is made of 16 / W of them here. Nothing is reassociated.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mpillama {

using i8 = std::int8_t;
using u8 = std::uint8_t;
using u16 = std::uint16_t;
using i32 = std::int32_t;
using u32 = std::uint32_t;
using i64 = std::int64_t;

constexpr int LANES = 16;
constexpr int BLOCK = 32;  // k-values that share a scale
constexpr int STEPS = 8;   // a block is 8 steps of 4 k-values; a step of 16 rows is 64 bytes

inline i32 load_i32(const void* p) {
    i32 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

}  // namespace mpillama

#if defined(__AMX_INT8__) || defined(MPILLAMA_AMX_IN_SOFTWARE)
#define MPILLAMA_HAS_TILES
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__)
#include "isa/avx512.h"
#elif defined(__AVX2__)
#include "isa/avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "isa/neon.h"
#else
#include "isa/generic.h"
#endif

namespace mpillama {

constexpr int PARTS = LANES / W;

// Exact dots of H parts of rows with N adjacent tokens, for sets where a group is two registers (isa/avx2.h).
template <int N, int H, class Seed, class Use> void dots_nibbles(const Vb (&w)[H][STEPS], const i8* x, Seed seed, Use use);
template <int N, int H, class Seed, class Use> void dots_small(const Vb (&w)[H][STEPS], const i8* x, Seed seed, Use use);
template <int MOST, int N, int H, class Use>
void dots_halves(const Vb (&w)[H][STEPS], const i8* x, const Vi (&first)[H], const Vi (&last)[H], Use use);
template <int N, int H, class Make, class Use>
void dots_each_half(const Vb (&w)[H][STEPS], const i8* x, Make make, Use use);
template <int N, int H, class Use> void dots_signed(const Vb (&w)[H][STEPS], const i8* x, const i32* starts, Use use);

struct F32x16 {
    Vf part[PARTS];
};
struct I32x16 {
    Vi part[PARTS];
};
struct F64x16 {
    Vd part[PARTS];
};

template <class Wide, class Make> inline Wide lift(Make make) {
    Wide result;
    for (int i = 0; i < PARTS; i++) result.part[i] = make(i);
    return result;
}

inline F32x16 load16(const float* p) {
    return lift<F32x16>([&](int i) { return load(p + W * i); });
}
inline F64x16 load16(const double* p) {
    return lift<F64x16>([&](int i) { return load(p + W * i); });
}
inline F32x16 load16_half(const u16* p) {
    return lift<F32x16>([&](int i) { return load_half(p + W * i); });
}
inline F32x16 load16_i8(const i8* p) {
    return lift<F32x16>([&](int i) { return to_float(load_i8(p + W * i)); });
}
inline F32x16 splat16(float x) {
    return lift<F32x16>([&](int) { return splat(x); });
}
inline void store16(float* p, const F32x16& x) {
    for (int i = 0; i < PARTS; i++) store(p + W * i, x.part[i]);
}
inline void store16_half(u16* p, const F32x16& x) {
    for (int i = 0; i < PARTS; i++) store_half(p + W * i, x.part[i]);
}
inline F32x16 add(const F32x16& x, const F32x16& y) {
    return lift<F32x16>([&](int i) { return add(x.part[i], y.part[i]); });
}
inline F32x16 sub(const F32x16& x, const F32x16& y) {
    return lift<F32x16>([&](int i) { return sub(x.part[i], y.part[i]); });
}
inline F32x16 mul(const F32x16& x, const F32x16& y) {
    return lift<F32x16>([&](int i) { return mul(x.part[i], y.part[i]); });
}
inline F32x16 div(const F32x16& x, const F32x16& y) {
    return lift<F32x16>([&](int i) { return div(x.part[i], y.part[i]); });
}
inline F32x16 fma(const F32x16& x, const F32x16& y, const F32x16& z) {
    return lift<F32x16>([&](int i) { return fma(x.part[i], y.part[i], z.part[i]); });
}

// The sum of 16 lanes in one fixed order: halves onto halves.
template <class Number> inline Number ordered_sum(Number (&lanes)[LANES]) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i] + lanes[i + half];
    return lanes[0];
}

// The larger of two floats; x must not be NaN, a NaN in y is passed over.
inline float maximum(float x, float y) { return y > x ? y : x; }

}  // namespace mpillama
