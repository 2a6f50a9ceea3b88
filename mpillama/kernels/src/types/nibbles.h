// Integers of 2 to 6 bits. Nibbles: 4 times 64 bytes, steps j (low) and j + 4 (high) of 16 rows x 4 k-values. Fifth bits
// are 64 bytes behind them: bit j of a byte belongs to step j. Pairs of bits are twice 64 bytes: bits 2 j and 2 j + 1 of the
// first 64 belong to step j, of the others to step j + 4. Three bits: bytes 0 to 2 have steps 2 i and 2 i + 1 in their lower
// six, and in their upper two, from the lowest on, step 6, step 7, and the third bits of both. Six bits: bytes 0 to 5 have
// steps 0 to 5, and in their upper two the pairs of bits of step 6, then those of step 7.
#pragma once
#include "lanes.h"

namespace mpillama {

constexpr i64 NIBBLE_BYTES = 256, FIVE_BIT_BYTES = 320, PAIR_BYTES = 128, THREE_BIT_BYTES = 192, SIX_BIT_BYTES = 384;

inline void load_nibbles(const u8* values, int part, Vb (&steps)[STEPS]) {
    for (int j = 0; j < STEPS / 2; j++) {
        const Vb packed = load_bytes(values + 64 * j + 4 * W * part);
        steps[j] = low_nibbles(packed);
        steps[j + STEPS / 2] = high_nibbles(packed);
    }
}

inline int nibble_at(const u8* values, int lane, int k) {
    const int step = k / 4, packed = values[step % 4 * 64 + 4 * lane + k % 4];
    return step < 4 ? packed & 15 : packed >> 4;
}

// As 8 steps of bytes, a table's entries for the nibbles.
inline void spread_nibbles(const u8* values, const i8 (&table)[16], u8* out) {
    for (int i = 0; i < NIBBLE_BYTES; i++) {
        out[i] = static_cast<u8>(table[values[i] & 15]);
        out[NIBBLE_BYTES + i] = static_cast<u8>(table[values[i] >> 4]);
    }
}

inline void load_five_bits(const u8* values, int part, Vb (&steps)[STEPS]) {
    load_nibbles(values, part, steps);
    const Vb bits = load_bytes(values + NIBBLE_BYTES + 4 * W * part);
    steps[0] = with_fifth_bit<0>(steps[0], bits);
    steps[1] = with_fifth_bit<1>(steps[1], bits);
    steps[2] = with_fifth_bit<2>(steps[2], bits);
    steps[3] = with_fifth_bit<3>(steps[3], bits);
    steps[4] = with_fifth_bit<4>(steps[4], bits);
    steps[5] = with_fifth_bit<5>(steps[5], bits);
    steps[6] = with_fifth_bit<6>(steps[6], bits);
    steps[7] = with_fifth_bit<7>(steps[7], bits);
}

inline int five_bits_at(const u8* values, int lane, int k) {
    return nibble_at(values, lane, k) | (values[NIBBLE_BYTES + 4 * lane + k % 4] >> k / 4 & 1) << 4;
}

// As 8 steps of bytes, less `zero`.
inline void spread_five_bits(const u8* values, int zero, u8* out) {
    for (int j = 0; j < STEPS; j++)
        for (int i = 0; i < 64; i++) {
            const int packed = values[64 * (j % 4) + i], low = j < 4 ? packed & 15 : packed >> 4;
            out[64 * j + i] = static_cast<u8>((low | (values[NIBBLE_BYTES + i] >> j & 1) << 4) - zero);
        }
}

inline void load_pairs(const u8* values, int part, Vb (&steps)[STEPS]) {
    for (int j = 0; j < STEPS; j += 4) {
        const Vb pairs = load_bytes(values + 16 * j + 4 * W * part);
        steps[j] = moved_bits<0>(pairs, 3);
        steps[j + 1] = moved_bits<2>(pairs, 3);
        steps[j + 2] = moved_bits<4>(pairs, 3);
        steps[j + 3] = moved_bits<6>(pairs, 3);
    }
}

inline int pair_at(const u8* values, int lane, int k) {
    return values[k / 16 * 64 + 4 * lane + k % 4] >> k / 4 % 4 * 2 & 3;
}

// Step by step the bytes that integers of 3 or 6 bits are made of.
template <int COUNT> inline void load_packed(const u8* values, int part, Vb (&packed)[COUNT]) {
    for (int i = 0; i < COUNT; i++) packed[i] = load_bytes(values + 64 * i + 4 * W * part);
}

inline void load_three_bits(const u8* values, int part, Vb (&steps)[STEPS]) {
    Vb packed[3];
    load_packed(values, part, packed);
    for (int i = 0; i < 3; i++) {
        steps[2 * i] = moved_bits<0>(packed[i], 7);
        steps[2 * i + 1] = moved_bits<3>(packed[i], 7);
    }
    steps[6] = bit_or(moved_bits<6>(packed[0], 3), moved_bits<4>(packed[2], 4));
    steps[7] = bit_or(moved_bits<6>(packed[1], 3), moved_bits<5>(packed[2], 4));
}

inline int three_bits_at(const u8* values, int lane, int k) {
    const int step = k / 4;
    const u8* packed = values + 4 * lane + k % 4;
    if (step < 6) return packed[step / 2 * 64] >> step % 2 * 3 & 7;
    return packed[(step - 6) * 64] >> 6 | (packed[128] >> step & 1) << 2;
}

inline void load_six_bits(const u8* values, int part, Vb (&steps)[STEPS]) {
    Vb packed[6];
    load_packed(values, part, packed);
    for (int i = 0; i < 6; i++) steps[i] = moved_bits<0>(packed[i], 63);
    for (int i = 0; i < 2; i++) {
        const Vb low = bit_or(moved_bits<6>(packed[3 * i], 3), moved_bits<4>(packed[3 * i + 1], 12));
        steps[6 + i] = bit_or(low, moved_bits<2>(packed[3 * i + 2], 48));
    }
}

inline int six_bits_at(const u8* values, int lane, int k) {
    const int step = k / 4;
    const u8* packed = values + 4 * lane + k % 4;
    if (step < 6) return packed[64 * step] & 63;
    packed += 192 * (step - 6);
    return packed[0] >> 6 | packed[64] >> 6 << 2 | packed[128] >> 6 << 4;
}

// As 8 steps of bytes, what `at` says of each row and k-value.
template <class At> inline void spread(At at, u8* out) {
    for (int k = 0; k < BLOCK; k++)
        for (int lane = 0; lane < LANES; lane++) out[k / 4 * 64 + 4 * lane + k % 4] = static_cast<u8>(at(lane, k));
}

}  // namespace mpillama
