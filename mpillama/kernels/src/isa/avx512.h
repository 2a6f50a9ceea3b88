// AVX-512 (F, BW, DQ, VL): 16 lanes are one register. With VNNI a dot product of bytes is one instruction.
#pragma once
#include <immintrin.h>

namespace mpillama {

constexpr int W = 16;
using Vf = __m512;
using Vi = __m512i;
using Vb = __m512i;
using Vm = __mmask16;
struct Vd {
    __m512d low, high;
};

inline Vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vf x) { _mm512_storeu_ps(p, x); }
inline Vf splat(float x) { return _mm512_set1_ps(x); }
inline Vf add(Vf x, Vf y) { return _mm512_add_ps(x, y); }
inline Vf sub(Vf x, Vf y) { return _mm512_sub_ps(x, y); }
inline Vf mul(Vf x, Vf y) { return _mm512_mul_ps(x, y); }
inline Vf div(Vf x, Vf y) { return _mm512_div_ps(x, y); }
inline Vf fma(Vf x, Vf y, Vf z) { return _mm512_fmadd_ps(x, y, z); }
inline Vf fnma(Vf x, Vf y, Vf z) { return _mm512_fnmadd_ps(x, y, z); }  // z - x * y
inline Vm less(Vf x, Vf y) { return _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ); }
inline Vm not_less(Vf x, Vf y) { return _mm512_cmp_ps_mask(x, y, _CMP_NLT_UQ); }
inline Vm is_nan(Vf x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
inline Vf select(Vm m, Vf x, Vf y) { return _mm512_mask_blend_ps(m, y, x); }
inline Vi as_int(Vf x) { return _mm512_castps_si512(x); }
inline Vf as_float(Vi x) { return _mm512_castsi512_ps(x); }
inline Vf to_float(Vi x) { return _mm512_cvtepi32_ps(x); }
inline Vi truncate(Vf x) { return _mm512_cvttps_epi32(x); }

inline Vi load(const i32* p) { return _mm512_loadu_si512(p); }
inline void store(i32* p, Vi x) { _mm512_storeu_si512(p, x); }
inline Vi splat(i32 x) { return _mm512_set1_epi32(x); }
inline Vi add(Vi x, Vi y) { return _mm512_add_epi32(x, y); }
inline Vi sub(Vi x, Vi y) { return _mm512_sub_epi32(x, y); }
inline Vi mul(Vi x, Vi y) { return _mm512_mullo_epi32(x, y); }
inline Vi bit_and(Vi x, Vi y) { return _mm512_and_si512(x, y); }
inline Vi bit_or(Vi x, Vi y) { return _mm512_or_si512(x, y); }
inline Vi bit_xor(Vi x, Vi y) { return _mm512_xor_si512(x, y); }
template <int N> inline Vi shift_left(Vi x) { return _mm512_slli_epi32(x, N); }
template <int N> inline Vi shift_right(Vi x) { return _mm512_srli_epi32(x, N); }
inline Vi max_unsigned(Vi x, Vi y) { return _mm512_max_epu32(x, y); }
inline Vm less(Vi x, Vi y) { return _mm512_cmplt_epi32_mask(x, y); }
inline Vm both(Vm x, Vm y) { return x & y; }
inline Vi load_u8(const u8* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vi load_i8(const i8* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_i8(i8* p, Vi x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x)); }

inline Vd load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
inline void store(double* p, Vd x) {
    _mm512_storeu_pd(p, x.low);
    _mm512_storeu_pd(p + 8, x.high);
}
inline Vd splat(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
inline Vd add(Vd x, Vd y) { return {_mm512_add_pd(x.low, y.low), _mm512_add_pd(x.high, y.high)}; }
inline Vd sub(Vd x, Vd y) { return {_mm512_sub_pd(x.low, y.low), _mm512_sub_pd(x.high, y.high)}; }
inline Vd fma(Vd x, Vd y, Vd z) {
    return {_mm512_fmadd_pd(x.low, y.low, z.low), _mm512_fmadd_pd(x.high, y.high, z.high)};
}
inline Vd widen(Vf x) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
}
inline Vf narrow(Vd x) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(x.low)), _mm512_cvtpd_ps(x.high), 1);
}

inline Vf load_half(const u16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_half(u16* p, Vf x) {
    const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
inline Vf load_bf16(const u16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
// Floats of 8 bits (E4M3), times 2^-8: what they are as halves of which they have all but the lowest bits.
inline Vf load_e4m3(const u8* p) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbfff))));
}

inline Vb load_bytes(const u8* p) { return _mm512_loadu_si512(p); }
inline Vb low_nibbles(Vb x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Vb high_nibbles(Vb x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }

// Bytes moved down by RIGHT bits (up, if it is negative), and what is left of them under a mask.
template <int RIGHT> inline Vb moved_bits(Vb x, u8 mask) {
    constexpr int down = RIGHT > 0 ? RIGHT : 0, up = RIGHT < 0 ? -RIGHT : 0;
    return _mm512_and_si512(_mm512_slli_epi16(_mm512_srli_epi16(x, down), up), _mm512_set1_epi8(static_cast<char>(mask)));
}

// 4 bits of each row: row i has nibble i / 2 of the 32-bit word i % 2.
inline Vi load_row_nibbles(const u8* p, int) {
    const __m512i words = _mm512_broadcast_i32x2(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m512i places = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    return _mm512_and_si512(_mm512_srlv_epi32(words, places), _mm512_set1_epi32(15));
}
// 2 bits of each row, in order.
inline Vi load_row_pairs(const u8* p, int) {
    const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(load_i32(p)), places), _mm512_set1_epi32(3));
}

// Of 16 bytes those that small integers choose.
inline Vb load_table(const i8* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vb look_up(Vb table, Vb places) { return _mm512_shuffle_epi8(table, places); }

// Bit STEP of every byte as the fifth bit of a nibble.
template <int STEP> inline Vb with_fifth_bit(Vb nibbles, Vb bits) {
    constexpr int up = STEP < 4 ? 4 - STEP : 0, down = STEP < 4 ? 0 : STEP - 4;
    const Vb moved = _mm512_srli_epi16(_mm512_slli_epi16(bits, up), down);
    return _mm512_or_si512(nibbles, _mm512_and_si512(moved, _mm512_set1_epi8(16)));
}

inline Vi splat_bytes(const i8* x, int step) { return _mm512_set1_epi32(load_i32(x + 4 * step)); }

#ifdef __AVX512VNNI__

// Steps of signed bytes as the dot product wants them: unsigned, 128 too high.
inline Vb signed_step(Vb x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }

template <class Steps> inline Vi dot_steps(const Steps& w, const i8* x, Vi sum) {
    for (int j = 0; j < STEPS; j++) sum = _mm512_dpbusd_epi32(sum, w[j], splat_bytes(x, j));
    return sum;
}

// `start` is -8 times the sum of the activations: it takes back the 8 that is added to every nibble …
inline Vi dot_nibbles(const Vb (&w)[STEPS], const i8* x, i32 start) { return dot_steps(w, x, splat(start)); }
inline Vi dot_small(const Vb (&w)[STEPS], const i8* x, i32 start) { return dot_nibbles(w, x, start); }

// sum + x.low * y.low + x.high * y.high, of the 16-bit halves of each lane and of y.
inline Vi dot_pairs(Vi x, i32 y, Vi sum) { return _mm512_dpwssd_epi32(sum, x, splat(y)); }

// Bytes up to MOST, below 64, whose first and last four steps have factors of their own (at most 8 signed bits), as
// as_factor makes them: the sum of both dots times these.
inline Vi as_factor(Vi x) { return x; }
template <int MOST> inline Vi dot_halves(const Vb (&w)[STEPS], const i8* x, Vi first, Vi last) {
    Vi sums[2] = {splat(0), splat(0)};
    for (int j = 0; j < STEPS; j++) sums[j / 4] = _mm512_dpbusd_epi32(sums[j / 4], w[j], splat_bytes(x, j));
    return add(mul(sums[0], first), mul(sums[1], last));
}

// The dots of the first and of the last four steps by themselves.
inline void dot_each_half(const Vb (&w)[STEPS], const i8* x, Vi& first, Vi& last) {
    first = last = splat(0);
    for (int j = 0; j < STEPS / 2; j++) {
        first = _mm512_dpbusd_epi32(first, w[j], splat_bytes(x, j));
        last = _mm512_dpbusd_epi32(last, w[j + 4], splat_bytes(x, j + 4));
    }
}

// … and 16 times it the 128 that is added to every signed byte.
inline Vi dot_signed(const Vb (&w)[STEPS], const i8* x, i32 start) { return dot_steps(w, x, splat(start * 16)); }

#else

inline Vb signed_step(Vb x) { return x; }

inline Vi word_pairs(Vi words) { return _mm512_madd_epi16(words, _mm512_set1_epi16(1)); }
inline Vi with_sign_of(Vb w, Vi x) { return _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x); }

// Two nibbles times two bytes stay below 2 * 15 * 127 = 3,810: eight steps fit 16 bits, nothing saturates.
inline Vi dot_nibbles(const Vb (&w)[STEPS], const i8* x, i32 start) {
    Vi even = _mm512_maddubs_epi16(w[0], splat_bytes(x, 0)), odd = _mm512_maddubs_epi16(w[1], splat_bytes(x, 1));
    for (int j = 2; j < STEPS; j += 2) {
        even = _mm512_add_epi16(even, _mm512_maddubs_epi16(w[j], splat_bytes(x, j)));
        odd = _mm512_add_epi16(odd, _mm512_maddubs_epi16(w[j + 1], splat_bytes(x, j + 1)));
    }
    return add(word_pairs(_mm512_add_epi16(even, odd)), splat(start));
}

// As dot_nibbles, of bytes below 32: two products stay below 2 * 31 * 127 = 7,874, so four steps fit 16 bits.
inline Vi dot_small(const Vb (&w)[STEPS], const i8* x, i32 start) {
    Vi even = _mm512_maddubs_epi16(w[0], splat_bytes(x, 0)), odd = _mm512_maddubs_epi16(w[1], splat_bytes(x, 1));
    for (int j = 2; j < STEPS; j += 2) {
        even = _mm512_add_epi16(even, _mm512_maddubs_epi16(w[j], splat_bytes(x, j)));
        odd = _mm512_add_epi16(odd, _mm512_maddubs_epi16(w[j + 1], splat_bytes(x, j + 1)));
    }
    return add(add(word_pairs(even), word_pairs(odd)), splat(start));
}

// sum + x.low * y.low + x.high * y.high, of the 16-bit halves of each lane and of y.
inline Vi dot_pairs(Vi x, i32 y, Vi sum) { return add(sum, _mm512_madd_epi16(x, splat(y))); }

// Bytes up to MOST, below 64, whose first and last four steps have factors of their own (at most 8 signed bits), as
// as_factor makes them: the sum of both dots times these. Of bytes below 32 four steps fit 16 bits, of others two.
inline Vi as_factor(Vi x) { return bit_or(bit_and(x, splat(0xffff)), shift_left<16>(x)); }
template <int MOST> inline Vi dot_halves(const Vb (&w)[STEPS], const i8* x, Vi first, Vi last) {
    Vi sum = splat(0);
    for (int j = 0; j < STEPS; j += 4) {
        const Vi low = _mm512_add_epi16(_mm512_maddubs_epi16(w[j], splat_bytes(x, j)),
                                        _mm512_maddubs_epi16(w[j + 1], splat_bytes(x, j + 1)));
        const Vi high = _mm512_add_epi16(_mm512_maddubs_epi16(w[j + 2], splat_bytes(x, j + 2)),
                                         _mm512_maddubs_epi16(w[j + 3], splat_bytes(x, j + 3)));
        const Vi factor = j == 0 ? first : last;
        if constexpr (MOST < 32) sum = add(sum, _mm512_madd_epi16(_mm512_add_epi16(low, high), factor));
        else sum = add(sum, add(_mm512_madd_epi16(low, factor), _mm512_madd_epi16(high, factor)));
    }
    return sum;
}

// The dots of the first and of the last four steps by themselves, of bytes below 32: four steps fit 16 bits.
inline void dot_each_half(const Vb (&w)[STEPS], const i8* x, Vi& first, Vi& last) {
    Vi words[2];
    for (int half = 0; half < 2; half++) {
        words[half] = _mm512_maddubs_epi16(w[4 * half], splat_bytes(x, 4 * half));
        for (int j = 4 * half + 1; j < 4 * half + 4; j++)
            words[half] = _mm512_add_epi16(words[half], _mm512_maddubs_epi16(w[j], splat_bytes(x, j)));
    }
    first = word_pairs(words[0]);
    last = word_pairs(words[1]);
}

// |w| <= 128 and |x| <= 127: a pair stays below 2 * 128 * 127 = 32,512, so moving w's sign to x cannot saturate.
inline Vi dot_signed(const Vb (&w)[STEPS], const i8* x, i32) {
    Vi sum = splat(0);
    for (int j = 0; j < STEPS; j++) {
        const Vi moved = with_sign_of(w[j], splat_bytes(x, j));
        sum = add(sum, word_pairs(_mm512_maddubs_epi16(_mm512_abs_epi8(w[j]), moved)));
    }
    return sum;
}

#endif

// Volatile: the compiler must not gather the prefetches of a loop in one of their own.
inline void prefetch(const void* p) { asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p))); }
inline void pause() { _mm_pause(); }

}  // namespace mpillama
