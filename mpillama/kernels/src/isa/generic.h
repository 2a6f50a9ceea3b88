// Any processor: the compiler's own vectors of 4, and plain code where it has none.
#pragma once
#include <cstring>

namespace mpillama {

constexpr int W = 4;
typedef float Vf __attribute__((vector_size(16)));
typedef i32 Vi __attribute__((vector_size(16)));
typedef u32 Vu __attribute__((vector_size(16)));
typedef u8 Vb __attribute__((vector_size(16)));
typedef double Vd __attribute__((vector_size(32)));
struct Vm {
    Vi bits;
};

template <class V> inline V load_any(const void* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline Vf load(const float* p) { return load_any<Vf>(p); }
inline void store(float* p, Vf x) { std::memcpy(p, &x, sizeof x); }
inline Vf splat(float x) { return Vf{x, x, x, x}; }
inline Vf add(Vf x, Vf y) { return x + y; }
inline Vf sub(Vf x, Vf y) { return x - y; }
inline Vf mul(Vf x, Vf y) { return x * y; }
inline Vf div(Vf x, Vf y) { return x / y; }
inline Vf fma(Vf x, Vf y, Vf z) {
    Vf result;
    for (int i = 0; i < W; i++) result[i] = __builtin_fmaf(x[i], y[i], z[i]);
    return result;
}
inline Vf fnma(Vf x, Vf y, Vf z) { return fma(-x, y, z); }  // z - x * y
inline Vm less(Vf x, Vf y) { return {x < y}; }
inline Vm not_less(Vf x, Vf y) { return {~(x < y)}; }
inline Vm is_nan(Vf x) { return {x != x}; }
inline Vi as_int(Vf x) { return reinterpret_cast<Vi>(x); }
inline Vf as_float(Vi x) { return reinterpret_cast<Vf>(x); }
inline Vf select(Vm m, Vf x, Vf y) { return as_float((m.bits & as_int(x)) | (~m.bits & as_int(y))); }
inline Vf to_float(Vi x) { return __builtin_convertvector(x, Vf); }
inline Vi truncate(Vf x) { return __builtin_convertvector(x, Vi); }

inline Vi load(const i32* p) { return load_any<Vi>(p); }
inline void store(i32* p, Vi x) { std::memcpy(p, &x, sizeof x); }
inline Vi splat(i32 x) { return Vi{x, x, x, x}; }
inline Vi add(Vi x, Vi y) { return reinterpret_cast<Vi>(reinterpret_cast<Vu>(x) + reinterpret_cast<Vu>(y)); }
inline Vi sub(Vi x, Vi y) { return reinterpret_cast<Vi>(reinterpret_cast<Vu>(x) - reinterpret_cast<Vu>(y)); }
inline Vi mul(Vi x, Vi y) { return reinterpret_cast<Vi>(reinterpret_cast<Vu>(x) * reinterpret_cast<Vu>(y)); }
inline Vi bit_and(Vi x, Vi y) { return x & y; }
inline Vi bit_or(Vi x, Vi y) { return x | y; }
inline Vi bit_xor(Vi x, Vi y) { return x ^ y; }
template <int N> inline Vi shift_left(Vi x) { return reinterpret_cast<Vi>(reinterpret_cast<Vu>(x) << N); }
template <int N> inline Vi shift_right(Vi x) { return reinterpret_cast<Vi>(reinterpret_cast<Vu>(x) >> N); }
inline Vi choose(Vi m, Vi x, Vi y) { return (m & x) | (~m & y); }
inline Vi below_unsigned(Vi x, Vi y) { return reinterpret_cast<Vi>(reinterpret_cast<Vu>(x) < reinterpret_cast<Vu>(y)); }
inline Vi max_unsigned(Vi x, Vi y) { return choose(below_unsigned(x, y), y, x); }
inline Vm less(Vi x, Vi y) { return {x < y}; }
inline Vm both(Vm x, Vm y) { return {x.bits & y.bits}; }
inline Vi load_u8(const u8* p) { return Vi{p[0], p[1], p[2], p[3]}; }
inline Vi load_i8(const i8* p) { return Vi{p[0], p[1], p[2], p[3]}; }
inline void store_i8(i8* p, Vi x) {
    for (int i = 0; i < W; i++) p[i] = static_cast<i8>(x[i]);
}

inline Vd load(const double* p) { return load_any<Vd>(p); }
inline void store(double* p, const Vd& x) { std::memcpy(p, &x, sizeof x); }
inline Vd splat(double x) { return Vd{x, x, x, x}; }
inline Vd add(const Vd& x, const Vd& y) { return x + y; }
inline Vd sub(const Vd& x, const Vd& y) { return x - y; }
inline Vd fma(const Vd& x, const Vd& y, const Vd& z) {
    Vd result;
    for (int i = 0; i < W; i++) result[i] = __builtin_fma(x[i], y[i], z[i]);
    return result;
}
inline Vd widen(Vf x) { return __builtin_convertvector(x, Vd); }
inline Vf narrow(const Vd& x) { return __builtin_convertvector(x, Vf); }

inline Vi load_u16(const u16* p) { return Vi{p[0], p[1], p[2], p[3]}; }

inline Vf load_half(const u16* p) {
    const Vi wide = load_u16(p), magnitude = shift_left<13>(wide & splat(0x7fff));
    const Vf scaled = as_float(magnitude) * splat(0x1p112f);  // exact, subnormals too
    const Vi special = magnitude | splat(0x7f800000);
    const Vi value = choose(magnitude >= splat(0x7c00 << 13), special, as_int(scaled));
    return as_float(value | shift_left<16>(wide & splat(0x8000)));
}

// Rounded to the nearest, ties to even.
inline void store_half(u16* p, Vf x) {
    const Vi whole = as_int(x), magnitude = whole & splat(0x7fffffff);
    const Vi odd = shift_right<13>(magnitude) & splat(1);
    const Vi normal = shift_right<13>(add(add(magnitude, odd), splat(0xfff - (112 << 23))));
    // Adding 0.5 makes the addition itself round to a multiple of 2^-24, float16's subnormal step.
    const Vi subnormal = sub(as_int(as_float(magnitude) + splat(0.5f)), as_int(splat(0.5f)));
    const Vi small = magnitude < as_int(splat(0x1p-14f)), large = magnitude >= as_int(splat(65536.0f));
    const Vi special = choose(magnitude > splat(0x7f800000), splat(0x7e00), splat(0x7c00));
    const Vi half = choose(large, special, choose(small, subnormal, normal));
    const Vi bits = half | (shift_right<16>(whole) & splat(0x8000));
    for (int i = 0; i < W; i++) p[i] = static_cast<u16>(bits[i]);
}

inline Vf load_bf16(const u16* p) { return as_float(shift_left<16>(load_u16(p))); }
// Floats of 8 bits (E4M3), times 2^-8.
inline Vf load_e4m3(const u8* p) {
    const Vi wide{p[0], p[1], p[2], p[3]};
    const Vf scaled = as_float(shift_left<20>(wide & splat(0x7f))) * splat(0x1p112f);  // exact, subnormals too
    return as_float(as_int(scaled) | shift_left<24>(wide & splat(0x80)));
}

inline Vb load_bytes(const u8* p) { return load_any<Vb>(p); }
inline Vb low_nibbles(Vb x) { return x & 15; }
inline Vb high_nibbles(Vb x) { return x >> 4; }
inline Vb signed_step(Vb x) { return x; }

inline Vb bit_or(Vb x, Vb y) { return x | y; }

// Bytes moved down by RIGHT bits (up, if it is negative), and what is left of them under a mask.
template <int RIGHT> inline Vb moved_bits(Vb x, u8 mask) {
    if constexpr (RIGHT < 0) return x << -RIGHT & mask;
    else return x >> RIGHT & mask;
}

// 4 bits of each row: row i has nibble i / 2 of the 32-bit word i % 2.
inline Vi load_row_nibbles(const u8* p, int part) {
    Vi result;
    for (int i = 0; i < W; i++) {
        const int row = W * part + i;
        result[i] = p[row % 2 * 4 + row / 4] >> row / 2 % 2 * 4 & 15;
    }
    return result;
}
// 2 bits of each row, in order.
inline Vi load_row_pairs(const u8* p, int part) {
    return Vi{p[part], p[part] >> 2, p[part] >> 4, p[part] >> 6} & 3;
}

// Of 16 bytes those that small integers choose.
inline Vb load_table(const i8* p) { return load_any<Vb>(p); }
inline Vb look_up(Vb table, Vb places) {
    Vb result;
    for (int i = 0; i < 16; i++) result[i] = table[places[i]];
    return result;
}

// Bit STEP of every byte as the fifth bit of a nibble.
template <int STEP> inline Vb with_fifth_bit(Vb nibbles, Vb bits) { return nibbles | (bits >> STEP & 1) << 4; }

// The sum of 4 adjacent products of weights and activations, both signed.
inline Vi dot_signed(const Vb (&w)[STEPS], const i8* x, i32) {
    i32 sums[W] = {};
    for (int j = 0; j < STEPS; j++)
        for (int row = 0; row < W; row++)
            for (int i = 0; i < 4; i++) sums[row] += static_cast<i8>(w[j][4 * row + i]) * x[4 * j + i];
    return load(sums);
}

// `start` is -8 times the sum of the activations: it takes back the 8 that is added to every nibble.
inline Vi dot_nibbles(const Vb (&w)[STEPS], const i8* x, i32 start) { return add(dot_signed(w, x, 0), splat(start)); }
inline Vi dot_small(const Vb (&w)[STEPS], const i8* x, i32 start) { return dot_nibbles(w, x, start); }

// sum + x.low * y.low + x.high * y.high, of the 16-bit halves of each lane and of y.
inline Vi dot_pairs(Vi x, i32 y, Vi sum) {
    for (int i = 0; i < W; i++)
        sum[i] += static_cast<std::int16_t>(x[i]) * static_cast<std::int16_t>(y) + (x[i] >> 16) * (y >> 16);
    return sum;
}

// Bytes up to MOST, below 64, whose first and last four steps have factors of their own (at most 8 signed bits), as
// as_factor makes them: the sum of both dots times these.
inline Vi as_factor(Vi x) { return x; }
template <int MOST> inline Vi dot_halves(const Vb (&w)[STEPS], const i8* x, Vi first, Vi last) {
    i32 sums[2][W] = {};
    for (int j = 0; j < STEPS; j++)
        for (int row = 0; row < W; row++)
            for (int i = 0; i < 4; i++) sums[j / 4][row] += w[j][4 * row + i] * x[4 * j + i];
    return add(mul(load(sums[0]), first), mul(load(sums[1]), last));
}

// The dots of the first and of the last four steps by themselves, of bytes below 32.
inline void dot_each_half(const Vb (&w)[STEPS], const i8* x, Vi& first, Vi& last) {
    i32 sums[2][W] = {};
    for (int j = 0; j < STEPS; j++)
        for (int row = 0; row < W; row++)
            for (int i = 0; i < 4; i++) sums[j / 4][row] += w[j][4 * row + i] * x[4 * j + i];
    first = load(sums[0]);
    last = load(sums[1]);
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace mpillama
