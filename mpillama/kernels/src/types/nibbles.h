// Integers of 2 to 6 bits. Nibbles: 4 times 64 bytes, steps j (low) and j + 4 (high) of 16 rows x 4 k-values. Fifth bits
// are 64 bytes behind them: bit j of a byte belongs to step j. Pairs of bits are twice 64 bytes: bits 2 j and 2 j + 1 of the
// first 64 belong to step j, of the others to step j + 4; fifth and sixth bits lie so behind nibbles. Third bits lie behind
// pairs as fifth bits do.
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

// Two bits of each step at their final place, UP bits up.
template <int UP> inline void load_pairs(const u8* values, int part, Vb (&steps)[STEPS]) {
    constexpr u8 mask = 3 << UP;
    for (int j = 0; j < STEPS; j += 4) {
        const Vb pairs = load_bytes(values + 16 * j + 4 * W * part);
        steps[j] = moved_bits<-UP>(pairs, mask);
        steps[j + 1] = moved_bits<2 - UP>(pairs, mask);
        steps[j + 2] = moved_bits<4 - UP>(pairs, mask);
        steps[j + 3] = moved_bits<6 - UP>(pairs, mask);
    }
}

inline int pair_at(const u8* values, int lane, int k) {
    return values[k / 16 * 64 + 4 * lane + k % 4] >> k / 4 % 4 * 2 & 3;
}

inline void load_three_bits(const u8* values, int part, Vb (&steps)[STEPS]) {
    load_pairs<0>(values, part, steps);
    const Vb bits = load_bytes(values + PAIR_BYTES + 4 * W * part);
    steps[0] = bit_or(steps[0], moved_bits<-2>(bits, 4));
    steps[1] = bit_or(steps[1], moved_bits<-1>(bits, 4));
    steps[2] = bit_or(steps[2], moved_bits<0>(bits, 4));
    steps[3] = bit_or(steps[3], moved_bits<1>(bits, 4));
    steps[4] = bit_or(steps[4], moved_bits<2>(bits, 4));
    steps[5] = bit_or(steps[5], moved_bits<3>(bits, 4));
    steps[6] = bit_or(steps[6], moved_bits<4>(bits, 4));
    steps[7] = bit_or(steps[7], moved_bits<5>(bits, 4));
}

inline int three_bits_at(const u8* values, int lane, int k) {
    return pair_at(values, lane, k) | (values[PAIR_BYTES + 4 * lane + k % 4] >> k / 4 & 1) << 2;
}

inline void load_six_bits(const u8* values, int part, Vb (&steps)[STEPS]) {
    load_pairs<4>(values + NIBBLE_BYTES, part, steps);
    for (int j = 0; j < STEPS / 2; j++) {
        const Vb packed = load_bytes(values + 64 * j + 4 * W * part);
        steps[j] = bit_or(steps[j], low_nibbles(packed));
        steps[j + STEPS / 2] = bit_or(steps[j + STEPS / 2], high_nibbles(packed));
    }
}

inline int six_bits_at(const u8* values, int lane, int k) {
    return nibble_at(values, lane, k) | pair_at(values + NIBBLE_BYTES, lane, k) << 4;
}

// As 8 steps of bytes, what `at` says of each row and k-value.
template <class At> inline void spread(At at, u8* out) {
    for (int k = 0; k < BLOCK; k++)
        for (int lane = 0; lane < LANES; lane++) out[k / 4 * 64 + 4 * lane + k % 4] = static_cast<u8>(at(lane, k));
}

}  // namespace mpillama
