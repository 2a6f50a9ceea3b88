// The KV cache: how a block lies, and the write of keys and values into it.
//
// A cache block holds 64 positions of one KV head. f32, f16: keys [head_dim, 64], values [64, head_dim]. q8: keys
// [4 groups of 16 positions][head_dim / 32][8 steps of 16 positions x 4 channels], as a q8_0 weight group whose rows
// are positions; values [64, head_dim]; both with float16 scales [head_dim / 32, 64]. q4: the same as a q4_0 weight group
// and [64, head_dim / 32, 16], channels i and i + 16 of a block in a byte, 8 too high, of blocks after a Hadamard transform.
#pragma once
#include "activations.h"
#include "types/types.h"

namespace mpillama {

constexpr i64 POSITIONS = 64;  // of a cache block

// The cache types: what a Number is and how many of them are PACKED in it, 16 of them written, W of them read as float32
// from a channel on. SCALED ones are blocks of 32: `quantise` makes one, which keys have as a block of the weights `Keys`.
// Where blocks are transformed (HADAMARD), queries are as well, and what attention gives is transformed back.
struct CachedF32 {
    using Number = float;
    static constexpr i64 NUMBER = F32::NUMBER, PACKED = 1;
    static constexpr bool SCALED = false, HADAMARD = false;

    static Vf load(const Number* p, i64 at = 0) { return mpillama::load(p + at); }
    static void write(Number* p, const float* x) { store16(p, load16(x)); }
};

struct CachedF16 {
    using Number = u16;
    static constexpr i64 NUMBER = F16::NUMBER, PACKED = 1;
    static constexpr bool SCALED = false, HADAMARD = false;

    static Vf load(const Number* p, i64 at = 0) { return load_half(p + at); }
    static void write(Number* p, const float* x) { store16_half(p, load16(x)); }
};

struct CachedQ8 {
    using Number = i8;
    using Keys = Q8_0;
    static constexpr i64 NUMBER = Q8_0::NUMBER, PACKED = 1;
    static constexpr bool SCALED = true, HADAMARD = false;

    static Vf load(const Number* p, i64 at = 0) { return to_float(load_i8(p + at)); }
    static void quantise(const float* x, Number* to, float* scale) {
        i32 start;
        quantise_block(x, to, scale, &start);
    }
};

constexpr float STORED_FACTOR = 0.25f, SEEN_FACTOR = 0.125f;  // together 1 / 32, after which the transform is its own inverse

// The Hadamard transform of 32 channels times a power of two, in place. What lies in few channels is spread over all, so
// that few steps of one size are enough for them; dot products stay what they are. (https://arxiv.org/abs/2404.00456.)
inline void hadamard(float* x, float factor) {
    for (int half = BLOCK / 2; half > 0; half /= 2)
        for (int first = 0; first < BLOCK; first += 2 * half)
            for (int i = first; i < first + half; i++) {
                const float sum = x[i] + x[i + half], difference = x[i] - x[i + half];
                x[i] = sum, x[i + half] = difference;
            }
    for (int i = 0; i < BLOCK; i++) x[i] *= factor;
}

struct CachedQ4 {
    using Number = u8;
    using Keys = Q4_0;
    static constexpr i64 NUMBER = Q4_0::NUMBER, PACKED = 2;
    static constexpr bool SCALED = true, HADAMARD = true;

    // `at` is counted from the beginning of a block.
    static Vf load(const Number* p, i64 at = 0) {
        const Vi bytes = load_u8(p + at / BLOCK * (BLOCK / 2) + at % (BLOCK / 2));
        const Vi numbers = at % BLOCK < BLOCK / 2 ? bit_and(bytes, splat(15)) : shift_right<4>(bytes);
        return to_float(sub(numbers, splat(8)));
    }
    // The number of the largest magnitude, of several the first, becomes -8 (as Q4_0). What is tiny or no number is
    // treated as by quantise_block.
    static void quantise(const float* x, Number* to, float* scale) {
        alignas(64) float block[BLOCK];
        std::memcpy(block, x, sizeof block);
        hadamard(block, STORED_FACTOR);
        i32 most = 0;
        float extreme = 0.0f;
        for (float number : block) {
            i32 bits;
            std::memcpy(&bits, &number, sizeof bits);
            bits &= INT32_MAX;
            if (bits > most) most = bits, extreme = number;
        }
        const bool finite = most < 0x7f800000, usable = finite && !(maximum(extreme, -extreme) < 1e-30f);
        const float inverse = usable ? -8.0f / extreme : 0.0f;
        *scale = usable ? extreme * -0.125f : finite ? 0.0f : __builtin_nanf("");
        i8 numbers[BLOCK];
        for (int i = 0; i < BLOCK; i += W) {
            const Vf safe = as_float(bit_and(as_int(mpillama::load(block + i)), splat(finite ? -1 : 0)));
            store_i8(numbers + i, round_to_int(mul(safe, splat(inverse))));
        }
        for (int i = 0; i < BLOCK / 2; i++) to[i] = static_cast<u8>(raised(numbers[i]) | raised(numbers[i + BLOCK / 2]) << 4);
    }
    static int raised(int number) { return number < 7 ? number + 8 : 15; }
};

// Call `use` with the cache type of this number.
template <class Use> inline void with_cache_type(i64 number, Use use) {
    switch (number) {
        case CachedF32::NUMBER: return use(CachedF32());
        case CachedF16::NUMBER: return use(CachedF16());
        case CachedQ8::NUMBER: return use(CachedQ8());
        case CachedQ4::NUMBER: return use(CachedQ4());
    }
    __builtin_trap();
}

inline bool has_hadamard(i64 number) {
    bool result = false;
    with_cache_type(number, [&](auto type) { result = decltype(type)::HADAMARD; });
    return result;
}

template <class Kv> struct CacheBlock {
    typename Kv::Number *keys, *values;
    u16 *key_scales, *value_scales;  // null without scales

    CacheBlock(const AttentionLayer& layer, i64 block, i64 kv_head) {
        const i64 size = layer.head_dim * POSITIONS, place = (block * layer.kv_heads + kv_head) * size;
        keys = reinterpret_cast<typename Kv::Number*>(layer.cache.keys) + place / Kv::PACKED;
        values = reinterpret_cast<typename Kv::Number*>(layer.cache.values) + place / Kv::PACKED;
        key_scales = Kv::SCALED ? layer.cache.key_scales + place / BLOCK : nullptr;
        value_scales = Kv::SCALED ? layer.cache.value_scales + place / BLOCK : nullptr;
    }
    explicit CacheBlock(typename Kv::Number* keys)
        : keys(keys), values(nullptr), key_scales(nullptr), value_scales(nullptr) {}
};

inline void store_half(u16* p, float x) {
    u16 lanes[W];
    store_half(lanes, splat(x));
    *p = lanes[0];
}

// Write one position of the keys of a type without scales.
template <class Kv>
inline void store_key(typename Kv::Number* keys, i64 place, const float* key, i64 head_dim) {
    for (i64 d = 0; d < head_dim; d += LANES) {
        typename Kv::Number lanes[LANES];
        Kv::write(lanes, key + d);
        for (int i = 0; i < LANES; i++) keys[(d + i) * POSITIONS + place] = lanes[i];
    }
}

// Write one position of one KV head.
template <class Kv>
inline void store_head(const CacheBlock<Kv>& to, i64 place, const float* key, const float* value, i64 head_dim) {
    if constexpr (Kv::SCALED) {
        const i64 blocks = head_dim / BLOCK;
        typename Kv::Number quantised[BLOCK / Kv::PACKED];
        float scale;
        for (i64 i = 0; i < blocks; i++) {
            Kv::quantise(key + BLOCK * i, quantised, &scale);
            store_half(to.key_scales + POSITIONS * i + place, scale);
            typename Kv::Number* step = to.keys + (place / LANES * blocks + i) * Kv::Keys::bytes + place % LANES * 4;
            for (int j = 0; j < STEPS / Kv::PACKED; j++) std::memcpy(step + 64 * j, quantised + 4 * j, 4);
            Kv::quantise(value + BLOCK * i, to.values + (place * head_dim + BLOCK * i) / Kv::PACKED, &scale);
            store_half(to.value_scales + POSITIONS * i + place, scale);
        }
    } else {
        store_key<Kv>(to.keys, place, key, head_dim);
        for (i64 d = 0; d < head_dim; d += LANES) Kv::write(to.values + place * head_dim + d, value + d);
    }
}

// Write one token's keys and values, float32 [kv_heads, head_dim]; slot: block * 64 + place.
inline void store_key_value(const AttentionLayer& layer, const float* key, const float* value, i64 slot) {
    with_cache_type(layer.cache.type, [&](auto type) {
        for (i64 h = 0; h < layer.kv_heads; h++) {
            const CacheBlock<decltype(type)> block(layer, slot / POSITIONS, h);
            store_head(block, slot % POSITIONS, key + h * layer.head_dim, value + h * layer.head_dim, layer.head_dim);
        }
    });
}

}  // namespace mpillama
