// AVX2 with FMA and F16C: 16 lanes are two registers, and a product works on 8 rows at a time.
#pragma once
#include <immintrin.h>

namespace mpillama {

constexpr int W = 8;
using Vf = __m256;
using Vi = __m256i;
using Vb = __m256i;
struct Vm {
    __m256 bits;
};
struct Vd {
    __m256d low, high;
};

inline Vf load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vf x) { _mm256_storeu_ps(p, x); }
inline Vf splat(float x) { return _mm256_set1_ps(x); }
inline Vf add(Vf x, Vf y) { return _mm256_add_ps(x, y); }
inline Vf sub(Vf x, Vf y) { return _mm256_sub_ps(x, y); }
inline Vf mul(Vf x, Vf y) { return _mm256_mul_ps(x, y); }
inline Vf div(Vf x, Vf y) { return _mm256_div_ps(x, y); }
inline Vf fma(Vf x, Vf y, Vf z) { return _mm256_fmadd_ps(x, y, z); }
inline Vf fnma(Vf x, Vf y, Vf z) { return _mm256_fnmadd_ps(x, y, z); }  // z - x * y
inline Vm less(Vf x, Vf y) { return {_mm256_cmp_ps(x, y, _CMP_LT_OQ)}; }
inline Vm not_less(Vf x, Vf y) { return {_mm256_cmp_ps(x, y, _CMP_NLT_UQ)}; }
inline Vm is_nan(Vf x) { return {_mm256_cmp_ps(x, x, _CMP_UNORD_Q)}; }
inline Vf select(Vm m, Vf x, Vf y) { return _mm256_blendv_ps(y, x, m.bits); }
inline Vi as_int(Vf x) { return _mm256_castps_si256(x); }
inline Vf as_float(Vi x) { return _mm256_castsi256_ps(x); }
inline Vf to_float(Vi x) { return _mm256_cvtepi32_ps(x); }
inline Vi truncate(Vf x) { return _mm256_cvttps_epi32(x); }

inline Vi load(const i32* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store(i32* p, Vi x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
inline Vi splat(i32 x) { return _mm256_set1_epi32(x); }
inline Vi add(Vi x, Vi y) { return _mm256_add_epi32(x, y); }
inline Vi sub(Vi x, Vi y) { return _mm256_sub_epi32(x, y); }
inline Vi mul(Vi x, Vi y) { return _mm256_mullo_epi32(x, y); }
inline Vi bit_and(Vi x, Vi y) { return _mm256_and_si256(x, y); }
inline Vi bit_or(Vi x, Vi y) { return _mm256_or_si256(x, y); }
inline Vi bit_xor(Vi x, Vi y) { return _mm256_xor_si256(x, y); }
template <int N> inline Vi shift_left(Vi x) { return _mm256_slli_epi32(x, N); }
template <int N> inline Vi shift_right(Vi x) { return _mm256_srli_epi32(x, N); }
inline Vi max_unsigned(Vi x, Vi y) { return _mm256_max_epu32(x, y); }
inline Vm less(Vi x, Vi y) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(y, x))}; }
inline Vm both(Vm x, Vm y) { return {_mm256_and_ps(x.bits, y.bits)}; }
inline Vi load_u8(const u8* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
inline Vi load_i8(const i8* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
inline void store_i8(i8* p, Vi x) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

inline Vd load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
inline void store(double* p, Vd x) {
    _mm256_storeu_pd(p, x.low);
    _mm256_storeu_pd(p + 4, x.high);
}
inline Vd splat(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
inline Vd add(Vd x, Vd y) { return {_mm256_add_pd(x.low, y.low), _mm256_add_pd(x.high, y.high)}; }
inline Vd sub(Vd x, Vd y) { return {_mm256_sub_pd(x.low, y.low), _mm256_sub_pd(x.high, y.high)}; }
inline Vd fma(Vd x, Vd y, Vd z) {
    return {_mm256_fmadd_pd(x.low, y.low, z.low), _mm256_fmadd_pd(x.high, y.high, z.high)};
}
inline Vd widen(Vf x) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
}
inline Vf narrow(Vd x) { return _mm256_set_m128(_mm256_cvtpd_ps(x.high), _mm256_cvtpd_ps(x.low)); }

inline Vf load_half(const u16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_half(u16* p, Vf x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline Vf load_bf16(const u16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
// Floats of 8 bits (E4M3), times 2^-8: what they are as halves of which they have all but the lowest bits.
inline Vf load_e4m3(const u8* p) {
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<short>(0xbfff))));
}

inline Vb load_bytes(const u8* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Vb low_nibbles(Vb x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline Vb high_nibbles(Vb x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
inline Vb signed_step(Vb x) { return x; }

// Bytes moved down by RIGHT bits (up, if it is negative), and what is left of them under a mask.
template <int RIGHT> inline Vb moved_bits(Vb x, u8 mask) {
    constexpr int down = RIGHT > 0 ? RIGHT : 0, up = RIGHT < 0 ? -RIGHT : 0;
    return _mm256_and_si256(_mm256_slli_epi16(_mm256_srli_epi16(x, down), up), _mm256_set1_epi8(static_cast<char>(mask)));
}

// 4 bits of each row: row i has nibble i / 2 of the 32-bit word i % 2.
inline Vi load_row_nibbles(const u8* p, int part) {
    const __m256i words = _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i places = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12), _mm256_set1_epi32(16 * part));
    return _mm256_and_si256(_mm256_srlv_epi32(words, places), _mm256_set1_epi32(15));
}
// 2 bits of each row, in order.
inline Vi load_row_pairs(const u8* p, int part) {
    const __m256i places = _mm256_add_epi32(_mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14), _mm256_set1_epi32(16 * part));
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(load_i32(p)), places), _mm256_set1_epi32(3));
}

// Of 16 bytes those that small integers choose.
inline Vb load_table(const i8* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vb look_up(Vb table, Vb places) { return _mm256_shuffle_epi8(table, places); }

// Bit STEP of every byte as the fifth bit of a nibble.
template <int STEP> inline Vb with_fifth_bit(Vb nibbles, Vb bits) {
    constexpr int up = STEP < 4 ? 4 - STEP : 0, down = STEP < 4 ? 0 : STEP - 4;
    const Vb moved = _mm256_srli_epi16(_mm256_slli_epi16(bits, up), down);
    return _mm256_or_si256(nibbles, _mm256_and_si256(moved, _mm256_set1_epi8(16)));
}

inline Vi splat_bytes(const i8* x, int step) { return _mm256_set1_epi32(load_i32(x + 4 * step)); }
inline Vi word_pairs(Vi words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }
inline Vi with_sign_of(Vb w, Vi x) { return _mm256_sign_epi8(x, w); }

// Two nibbles times two bytes stay below 2 * 15 * 127 = 3,810: eight steps fit 16 bits, nothing saturates.
// `start` is -8 times the sum of the activations: it takes back the 8 that is added to every nibble.
inline Vi dot_nibbles(const Vb (&w)[STEPS], const i8* x, i32 start) {
    Vi even = _mm256_maddubs_epi16(w[0], splat_bytes(x, 0)), odd = _mm256_maddubs_epi16(w[1], splat_bytes(x, 1));
    for (int j = 2; j < STEPS; j += 2) {
        even = _mm256_add_epi16(even, _mm256_maddubs_epi16(w[j], splat_bytes(x, j)));
        odd = _mm256_add_epi16(odd, _mm256_maddubs_epi16(w[j + 1], splat_bytes(x, j + 1)));
    }
    return add(word_pairs(_mm256_add_epi16(even, odd)), splat(start));
}

// As dot_nibbles, of bytes below 32: two products stay below 2 * 31 * 127 = 7,874, so four steps fit 16 bits.
inline Vi dot_small(const Vb (&w)[STEPS], const i8* x, i32 start) {
    Vi even = _mm256_maddubs_epi16(w[0], splat_bytes(x, 0)), odd = _mm256_maddubs_epi16(w[1], splat_bytes(x, 1));
    for (int j = 2; j < STEPS; j += 2) {
        even = _mm256_add_epi16(even, _mm256_maddubs_epi16(w[j], splat_bytes(x, j)));
        odd = _mm256_add_epi16(odd, _mm256_maddubs_epi16(w[j + 1], splat_bytes(x, j + 1)));
    }
    return add(add(word_pairs(even), word_pairs(odd)), splat(start));
}

// sum + x.low * y.low + x.high * y.high, of the 16-bit halves of each lane and of y.
inline Vi dot_pairs(Vi x, i32 y, Vi sum) { return add(sum, _mm256_madd_epi16(x, splat(y))); }

// Bytes up to MOST, below 64, whose first and last four steps have factors of their own (at most 8 signed bits), as
// as_factor makes them: the sum of both dots times these. Of bytes below 32 four steps fit 16 bits, of others two.
inline Vi as_factor(Vi x) { return bit_or(bit_and(x, splat(0xffff)), shift_left<16>(x)); }
template <int MOST> inline Vi dot_halves(const Vb (&w)[STEPS], const i8* x, Vi first, Vi last) {
    Vi sum = splat(0);
    for (int j = 0; j < STEPS; j += 4) {
        const Vi low = _mm256_add_epi16(_mm256_maddubs_epi16(w[j], splat_bytes(x, j)),
                                        _mm256_maddubs_epi16(w[j + 1], splat_bytes(x, j + 1)));
        const Vi high = _mm256_add_epi16(_mm256_maddubs_epi16(w[j + 2], splat_bytes(x, j + 2)),
                                         _mm256_maddubs_epi16(w[j + 3], splat_bytes(x, j + 3)));
        const Vi factor = j == 0 ? first : last;
        if constexpr (MOST < 32) sum = add(sum, _mm256_madd_epi16(_mm256_add_epi16(low, high), factor));
        else sum = add(sum, add(_mm256_madd_epi16(low, factor), _mm256_madd_epi16(high, factor)));
    }
    return sum;
}

// The dots of the first and of the last four steps by themselves, of bytes below 32: four steps fit 16 bits.
inline void dot_each_half(const Vb (&w)[STEPS], const i8* x, Vi& first, Vi& last) {
    Vi words[2];
    for (int half = 0; half < 2; half++) {
        words[half] = _mm256_maddubs_epi16(w[4 * half], splat_bytes(x, 4 * half));
        for (int j = 4 * half + 1; j < 4 * half + 4; j++)
            words[half] = _mm256_add_epi16(words[half], _mm256_maddubs_epi16(w[j], splat_bytes(x, j)));
    }
    first = word_pairs(words[0]);
    last = word_pairs(words[1]);
}

// |w| <= 128 and |x| <= 127: a pair stays below 2 * 128 * 127 = 32,512, so moving w's sign to x cannot saturate.
inline Vi dot_signed(const Vb (&w)[STEPS], const i8* x, i32) {
    Vi sums[2] = {splat(0), splat(0)};
    for (int j = 0; j < STEPS; j++) {
        const Vi moved = with_sign_of(w[j], splat_bytes(x, j));
        sums[j % 2] = add(sums[j % 2], word_pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(w[j]), moved)));
    }
    return add(sums[0], sums[1]);
}

// Keep a sum where it is: the compiler may not reorder additions around it.
inline Vi keep(Vi x) {
    asm("" : "+x"(x));
    return x;
}

// use(h, t, dot(h, t)) of H parts of rows and N tokens, token by token.
template <int H, int N, class Dot, class Use> inline void each_dot(Dot dot, Use use) {
#pragma GCC unroll 8
    for (int t = 0; t < N; t++)
#pragma GCC unroll 4
        for (int h = 0; h < H; h++) use(h, t, dot(h, t));
}

// out[h][t] = int16 pairs of sums of steps FIRST:LAST.
template <int FIRST, int LAST, int H, int N>
inline void word_sums(const Vb (&w)[H][STEPS], const i8* x, Vi (&out)[H][N]) {
#pragma GCC unroll 8
    for (int j = FIRST; j < LAST; j++) {
        Vb rows[H];
        for (int h = 0; h < H; h++) rows[h] = w[h][j];
#pragma GCC unroll 8
        for (int t = 0; t < N; t++) {
            const Vi here = splat_bytes(x + BLOCK * t, j);
            for (int h = 0; h < H; h++) {
                const Vi product = _mm256_maddubs_epi16(rows[h], here);
                out[h][t] = j == FIRST ? product : keep(_mm256_add_epi16(out[h][t], product));
            }
        }
    }
}

// The same of H parts of rows with N adjacent tokens, a step at a time, so that what is loaded of either is used for all
// of the other; seed(t) is where the sums of token t start, and
// use(h, t, dot) takes the dots, token by token. The compiler may not gather the sums of several steps: it
// would run out of registers.
template <int N, int H, class Seed, class Use>
inline void dots_nibbles(const Vb (&w)[H][STEPS], const i8* x, Seed seed, Use use) {
    Vi words[H][N];
    word_sums<0, STEPS>(w, x, words);
    each_dot<H, N>([&](int h, int t) { return add(word_pairs(words[h][t]), seed(t)); }, use);
}

template <int N, int H, class Seed, class Use>
inline void dots_small(const Vb (&w)[H][STEPS], const i8* x, Seed seed, Use use) {
    Vi words[H][N], first[H][N];
    word_sums<0, STEPS / 2>(w, x, words);
    each_dot<H, N>([&](int h, int t) { return word_pairs(words[h][t]); }, [&](int h, int t, Vi dot) { first[h][t] = dot; });
    word_sums<STEPS / 2, STEPS>(w, x, words);
    each_dot<H, N>([&](int h, int t) { return add(add(first[h][t], word_pairs(words[h][t])), seed(t)); }, use);
}

// The same of bytes up to MOST whose halves have factors (dot_halves).
template <int MOST, int N, int H, class Use>
inline void dots_halves(const Vb (&w)[H][STEPS], const i8* x, const Vi (&first)[H], const Vi (&last)[H], Use use) {
    Vi words[H][N], sums[H][N];
    const auto times = [&](const Vi(&factors)[H]) { return [&](int h, int t) { return _mm256_madd_epi16(words[h][t], factors[h]); }; };
    const auto keep_sum = [&](int h, int t, Vi dot) { sums[h][t] = dot; };
    const auto add_sum = [&](int h, int t, Vi dot) { sums[h][t] = add(sums[h][t], dot); };
    const auto pass = [&](int h, int t, Vi dot) { use(h, t, add(sums[h][t], dot)); };
    if constexpr (MOST < 32) {
        word_sums<0, 4>(w, x, words);
        each_dot<H, N>(times(first), keep_sum);
        word_sums<4, 8>(w, x, words);
    } else {
        word_sums<0, 2>(w, x, words);
        each_dot<H, N>(times(first), keep_sum);
        word_sums<2, 4>(w, x, words);
        each_dot<H, N>(times(first), add_sum);
        word_sums<4, 6>(w, x, words);
        each_dot<H, N>(times(last), add_sum);
        word_sums<6, 8>(w, x, words);
    }
    each_dot<H, N>(times(last), pass);
}

// The dots of the first and of the last four steps by themselves, of bytes below 32: use(h, t, made, last), where `made`
// is what make(h, t, first) gave.
template <int N, int H, class Make, class Use>
inline void dots_each_half(const Vb (&w)[H][STEPS], const i8* x, Make make, Use use) {
    Vi words[H][N];
    Vf made[H][N];
    const auto dot = [&](int h, int t) { return word_pairs(words[h][t]); };
    word_sums<0, STEPS / 2>(w, x, words);
    each_dot<H, N>(dot, [&](int h, int t, Vi first) { made[h][t] = make(h, t, first); });
    word_sums<STEPS / 2, STEPS>(w, x, words);
    each_dot<H, N>(dot, [&](int h, int t, Vi last) { use(h, t, made[h][t], last); });
}

template <int N, int H, class Use> inline void dots_signed(const Vb (&w)[H][STEPS], const i8* x, const i32*, Use use) {
    Vi out[H][N];
#pragma GCC unroll 8
    for (int j = 0; j < STEPS; j++) {
        Vb magnitudes[H];
        for (int h = 0; h < H; h++) magnitudes[h] = _mm256_abs_epi8(w[h][j]);
#pragma GCC unroll 8
        for (int t = 0; t < N; t++) {
            const Vi here = splat_bytes(x + BLOCK * t, j);
            for (int h = 0; h < H; h++) {
                const Vi product = word_pairs(_mm256_maddubs_epi16(magnitudes[h], with_sign_of(w[h][j], here)));
                out[h][t] = j == 0 ? product : keep(add(out[h][t], product));
            }
        }
    }
    each_dot<H, N>([&](int h, int t) { return out[h][t]; }, use);
}

// Volatile: the compiler must not gather the prefetches of a loop in one of their own.
inline void prefetch(const void* p) { asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p))); }
inline void pause() { _mm_pause(); }

}  // namespace mpillama
