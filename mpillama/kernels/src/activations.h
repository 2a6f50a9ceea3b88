// How quantised activations lie in memory: tiles of up to 16 tokens, so that a product reads them in one run.
//
// Within a tile blocks advance, and a block's tokens lie side by side: [tile, block, token in tile, 32]. Values are int8
// [n, 32], scales float32 [n], starts and halves int32 [n]; a start is -8 times the sum of the values, a half has the sums
// of the first 16 of them (lower 16 bits) and of the others (upper).
#pragma once
#include "arguments.h"
#include "numbers.h"

namespace mpillama {

constexpr i64 TILE_WIDTH = 16;

// A step's activations seen as so many columns.
inline Activations as_columns(const Activations& a, i64 columns) {
    return {a.x, a.values, a.scales, a.starts, a.halves, columns};
}

inline i64 tile_width(i64 tokens) { return tokens < TILE_WIDTH ? tokens : TILE_WIDTH; }

// Where a block of a token lies, counted in blocks.
inline i64 block_place(i64 tokens, i64 blocks, i64 token, i64 block) {
    const i64 width = tile_width(tokens);
    return (token / width * blocks + block) * width + token % width;
}

inline i64 places(i64 tokens, i64 blocks) {
    const i64 width = tokens < 1 ? 1 : tile_width(tokens);
    return (tokens + width - 1) / width * width * blocks;
}

// One token's block, as products meet it.
struct InputBlock {
    const i8* values;
    float scale;
    i32 start, halves;
};

// Blocks of activations from some place on.
struct InputBlocks {
    const i8* values;
    const float* scales;
    const i32 *starts, *halves;

    InputBlocks(const Activations& x, i64 place)
        : values(x.values + BLOCK * place), scales(x.scales + place), starts(x.starts + place), halves(x.halves + place) {}
    InputBlock operator[](i64 i) const { return {values + BLOCK * i, scales[i], starts[i], halves[i]}; }
};

// 32 float32 to 32 int8 with the scale max|x| / 127 (as Q8_0), -8 times their sum and, if asked, the sums of both halves.
// Blocks whose largest magnitude is below 1e-30 are zeros; one with an infinity or NaN gets the scale NaN, so that it is
// seen in every result.
inline void quantise_block(const float* x, i8* values, float* scale, i32* start, i32* halves = nullptr) {
    Vi top = splat(0);
    for (int i = 0; i < BLOCK; i += W) top = max_unsigned(top, bit_and(as_int(load(x + i)), splat(INT32_MAX)));
    i32 lanes[W];
    store(lanes, top);
    i32 bits = 0;  // as integers the order is the same, with infinity and NaN on top
    for (i32 lane : lanes) bits = lane > bits ? lane : bits;
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    const bool finite = bits < 0x7f800000, usable = finite && !(largest < 1e-30f);
    const float inverse = usable ? 127.0f / largest : 0.0f;
    *scale = usable ? largest / 127.0f : finite ? 0.0f : __builtin_nanf("");
    i32 sums[2] = {};
    for (int half = 0; half < 2; half++) {
        Vi total = splat(0);
        for (int i = BLOCK / 2 * half; i < BLOCK / 2 * (half + 1); i += W) {
            const Vf safe = as_float(bit_and(as_int(load(x + i)), splat(finite ? -1 : 0)));
            const Vi whole = round_to_int(mul(safe, splat(inverse)));
            store_i8(values + i, whole);
            total = add(total, whole);
        }
        store(lanes, total);
        for (i32 lane : lanes) sums[half] += lane;
    }
    *start = -8 * (sums[0] + sums[1]);
    if (halves != nullptr) *halves = static_cast<i32>((static_cast<u32>(sums[1]) << 16) | (static_cast<u32>(sums[0]) & 0xffff));
}

// Quantise part of one of a step's tokens: blocks first, first + 1, … of `blocks`.
inline void quantise_blocks(const float* x, i64 count, const Activations& to, i64 tokens, i64 token, i64 first) {
    for (i64 i = 0; i < count; i++) {
        const i64 place = block_place(tokens, to.columns / BLOCK, token, first + i);
        quantise_block(x + BLOCK * i, to.values + BLOCK * place, to.scales + place, to.starts + place,
                       to.halves + place);
    }
}

}  // namespace mpillama
