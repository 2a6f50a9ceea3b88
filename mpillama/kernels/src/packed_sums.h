// What ranks on different hosts send each other of a sum: multiples of 2^-30 in as few bits as a block of them needs.
//
// A message holds for each block of 32 numbers (the last may be shorter) two bytes: the bits of a number, and how many
// zeros all of them end with; and then the blocks' bits one after the other, each from a whole byte on. A block with a
// number that is no multiple of 2^-30 below 2^21 (what overflowed, NaN, -0) is sent as it is, in 64 bits.
// docs/decisions/0013-sums-between-hosts.md proves that nothing is lost.
#pragma once
#include <cstring>

#include "numbers.h"

namespace mpillama {

using u64 = std::uint64_t;

constexpr i64 PACKED = 32;      // numbers of a block
constexpr u8 AS_IT_IS = 64;     // bits of a number that is not packed
constexpr i64 HEADER_BYTES = 2;

inline u64 bits_of(double x) {
    u64 bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// The multiple of 2^-30, given as an integer: at this distance from 1.5 * 2^22 neighbouring doubles are 2^-30 apart.
inline u64 multiple_of(double x) { return bits_of(x + GRID_SHIFT) - bits_of(GRID_SHIFT); }

inline double from_multiple(u64 multiple) {
    const u64 bits = multiple + bits_of(GRID_SHIFT);
    double x;
    std::memcpy(&x, &bits, sizeof x);
    return x - GRID_SHIFT;
}

inline i64 packed_blocks(i64 count) { return (count + PACKED - 1) / PACKED; }

// Writes numbers of a few bits one behind the other, lowest bits first.
struct BitWriter {
    u8* to;
    u64 held = 0;
    int filled = 0;

    void write(u64 number, int bits) {
        held |= number << filled;
        filled += bits;
        if (filled < 64) return;
        std::memcpy(to, &held, sizeof held);
        to += sizeof held;
        filled -= 64;
        held = filled == 0 ? 0 : number >> (bits - filled);
    }
    u8* end() {
        for (; filled > 0; filled -= 8, held >>= 8) *to++ = static_cast<u8>(held);
        return to;
    }
};

struct BitReader {
    const u8 *from, *end;
    u64 held = 0;
    int left = 0;

    u64 read(int bits) {  // fewer than 64
        const u64 mask = (u64{1} << bits) - 1;
        if (left >= bits) {
            const u64 number = held & mask;
            held >>= bits;
            left -= bits;
            return number;
        }
        u64 next = 0;
        const int bytes = end - from < 8 ? static_cast<int>(end - from) : 8;
        if (bytes == 8) std::memcpy(&next, from, sizeof next);
        else
            for (int i = 0; i < bytes; i++) next |= static_cast<u64>(from[i]) << 8 * i;
        from += bytes;
        const u64 number = (held | next << left) & mask;
        const int used = bits - left;
        held = next >> used;
        left = 8 * bytes - used;
        return number;
    }
};

inline i64 packed_bytes(i64 numbers, int bits) { return (numbers * bits + 7) / 8; }

// Pack `count` numbers; returns the bytes written: at most packed_limit(count).
inline i64 pack(const double* values, i64 count, u8* out) {
    u8* to = out + HEADER_BYTES * packed_blocks(count);
    for (i64 first = 0; first < count; first += PACKED) {
        const i64 numbers = count - first < PACKED ? count - first : PACKED;
        u64 multiples[PACKED], magnitudes = 0, all = 0, wrong = 0;
        for (i64 i = 0; i < numbers; i++) {
            const double x = values[first + i];
            const u64 m = multiple_of(x);
            multiples[i] = m;
            wrong |= bits_of(from_multiple(m)) ^ bits_of(x);
            magnitudes |= m ^ static_cast<u64>(static_cast<i64>(m) >> 63);
            all |= m;
        }
        u8* header = out + HEADER_BYTES * (first / PACKED);
        if (wrong != 0 || magnitudes >> 51 != 0) {
            header[0] = AS_IT_IS, header[1] = 0;
            std::memcpy(to, values + first, static_cast<std::size_t>(numbers) * sizeof(double));
            to += numbers * static_cast<i64>(sizeof(double));
            continue;
        }
        const int zeros = all == 0 ? 0 : __builtin_ctzll(all);
        const int bits = all == 0 ? 0 : 65 - (magnitudes == 0 ? 64 : __builtin_clzll(magnitudes)) - zeros;
        header[0] = static_cast<u8>(bits), header[1] = static_cast<u8>(zeros);
        if (bits == 0) continue;
        const u64 mask = (u64{1} << bits) - 1;
        BitWriter writer{to};
        for (i64 i = 0; i < numbers; i++) writer.write(multiples[i] >> zeros & mask, bits);
        to = writer.end();
    }
    return to - out;
}

// Add what `pack` wrote to `totals`, or begin them with it. `bytes` are those that arrived; returns whether they are such
// a message.
inline bool unpack(const u8* in, i64 bytes, i64 count, double* totals, bool begin) {
    const u8 *from = in + HEADER_BYTES * packed_blocks(count), *const end = in + bytes;
    if (from > end) return false;
    for (i64 first = 0; first < count; first += PACKED) {
        const i64 numbers = count - first < PACKED ? count - first : PACKED;
        const u8* header = in + HEADER_BYTES * (first / PACKED);
        const int bits = header[0], zeros = header[1];
        const i64 size = packed_bytes(numbers, bits);
        if ((bits > 52 && bits != AS_IT_IS) || zeros > 63 || size > end - from) return false;
        double block[PACKED];
        if (bits == AS_IT_IS) {
            std::memcpy(block, from, static_cast<std::size_t>(size));
        } else {
            const int sign = 64 - bits;
            BitReader reader{from, from + size};
            for (i64 i = 0; i < numbers; i++) {
                const u64 number = bits == 0 ? 0 : reader.read(bits) << sign;
                block[i] = from_multiple(static_cast<u64>(static_cast<i64>(number) >> (bits == 0 ? 0 : sign)) << zeros);
            }
        }
        for (i64 i = 0; i < numbers; i++) totals[first + i] = begin ? block[i] : totals[first + i] + block[i];
        from += size;
    }
    return from == end;
}

}  // namespace mpillama
