// The KV cache: how a block lies, and the write of keys and values into it.
//
// A cache block holds 64 positions of one KV head. f32, f16: keys [head_dim, 64], values [64, head_dim]. q8: keys
// [4 groups of 16 positions][head_dim / 32][8 steps of 16 positions x 4 channels], as a q8_0 weight group whose rows
// are positions; values [64, head_dim]; both with float16 scales [head_dim / 32, 64].
#pragma once
#include "activations.h"
#include "types/types.h"

namespace mpillama {

constexpr i64 POSITIONS = 64;  // of a cache block

// The cache types: what a number is, 16 of them written, W of them read as float32.
struct CachedF32 {
    using Number = float;
    static constexpr i64 NUMBER = F32::NUMBER;
    static constexpr bool SCALED = false;

    static Vf load(const Number* p) { return mpillama::load(p); }
    static void write(Number* p, const float* x) { store16(p, load16(x)); }
};

struct CachedF16 {
    using Number = u16;
    static constexpr i64 NUMBER = F16::NUMBER;
    static constexpr bool SCALED = false;

    static Vf load(const Number* p) { return load_half(p); }
    static void write(Number* p, const float* x) { store16_half(p, load16(x)); }
};

struct CachedQ8 {
    using Number = i8;
    static constexpr i64 NUMBER = Q8_0::NUMBER;
    static constexpr bool SCALED = true;

    static Vf load(const Number* p) { return to_float(load_i8(p)); }
};

// Call `use` with the cache type of this number.
template <class Use> inline void with_cache_type(i64 number, Use use) {
    switch (number) {
        case CachedF32::NUMBER: return use(CachedF32());
        case CachedF16::NUMBER: return use(CachedF16());
        case CachedQ8::NUMBER: return use(CachedQ8());
    }
    __builtin_trap();
}

template <class Kv> struct CacheBlock {
    typename Kv::Number *keys, *values;
    u16 *key_scales, *value_scales;  // null without scales

    CacheBlock(const AttentionLayer& layer, i64 block, i64 kv_head) {
        const i64 size = layer.head_dim * POSITIONS, place = (block * layer.kv_heads + kv_head) * size;
        keys = reinterpret_cast<typename Kv::Number*>(layer.cache.keys) + place;
        values = reinterpret_cast<typename Kv::Number*>(layer.cache.values) + place;
        key_scales = Kv::SCALED ? layer.cache.key_scales + place / BLOCK : nullptr;
        value_scales = Kv::SCALED ? layer.cache.value_scales + place / BLOCK : nullptr;
    }
};

inline void store_half(u16* p, float x) {
    u16 lanes[W];
    store_half(lanes, splat(x));
    *p = lanes[0];
}

// Write one position of one KV head.
template <class Kv>
inline void store_head(const CacheBlock<Kv>& to, i64 place, const float* key, const float* value, i64 head_dim) {
    if constexpr (Kv::SCALED) {
        const i64 blocks = head_dim / BLOCK;
        i8 quantised[BLOCK];
        float scale;
        i32 start;
        for (i64 i = 0; i < blocks; i++) {
            quantise_block(key + BLOCK * i, quantised, &scale, &start);
            store_half(to.key_scales + POSITIONS * i + place, scale);
            i8* step = to.keys + (place / LANES * blocks + i) * Q8_0::bytes + place % LANES * 4;
            for (int j = 0; j < STEPS; j++) std::memcpy(step + 64 * j, quantised + 4 * j, 4);
            quantise_block(value + BLOCK * i, to.values + place * head_dim + BLOCK * i, &scale, &start);
            store_half(to.value_scales + POSITIONS * i + place, scale);
        }
    } else {
        for (i64 d = 0; d < head_dim; d += LANES) {
            typename Kv::Number lanes[LANES];
            Kv::write(lanes, key + d);
            for (int i = 0; i < LANES; i++) to.keys[(d + i) * POSITIONS + place] = lanes[i];
            Kv::write(to.values + place * head_dim + d, value + d);
        }
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
