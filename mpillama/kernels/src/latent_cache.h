// The cache of latent attention: what a token leaves of itself, once for all heads.
//
// A block holds 64 positions: [64, width] numbers, a position's normalised latent and then its rotated key, each padded
// to a multiple of 32. q8 and q4 have a float16 scale for 32 of them: [64, width / 32]. A block is unpacked to float32
// before it is used, so that all heads meet the same numbers whatever the type.
#pragma once
#include "cache.h"

namespace mpillama {

// Channels with their padding.
struct LatentSizes {
    i64 latent, rope, nope, head;

    explicit LatentSizes(const LatentLayer& layer)
        : latent(padded(layer.kv_rank)),
          rope(padded(layer.rope)),
          nope(padded(layer.nope)),
          head(padded(layer.nope + layer.rope)) {}

    static i64 padded(i64 channels) { return (channels + BLOCK - 1) / BLOCK * BLOCK; }
    i64 width() const { return latent + rope; }  // of the cache
};

// Write one position, float32 [width]; slot: block * 64 + place.
inline void store_latent(const LatentCache& cache, const float* x, i64 width, i64 slot) {
    with_cache_type(cache.type, [&](auto type) {
        using Kv = decltype(type);
        typename Kv::Number* to = reinterpret_cast<typename Kv::Number*>(cache.values) + slot * width / Kv::PACKED;
        if constexpr (Kv::SCALED) {
            for (i64 i = 0; i < width / BLOCK; i++) {
                float scale;
                Kv::quantise(x + BLOCK * i, to + BLOCK * i / Kv::PACKED, &scale);
                store_half(cache.scales + slot * (width / BLOCK) + i, scale);
            }
        } else {
            for (i64 i = 0; i < width; i += LANES) Kv::write(to + i, x + i);
        }
    });
}

// `count` positions from a slot on, in one block, as float32 [count, width].
template <class Kv> inline void unpack_latents(const LatentCache& cache, i64 slot, i64 count, i64 width, float* out) {
    using Number = typename Kv::Number;
    const Number* from = reinterpret_cast<const Number*>(cache.values) + slot * width / Kv::PACKED;
    if constexpr (Kv::SCALED) {
        const u8* scales = reinterpret_cast<const u8*>(cache.scales + slot * (width / BLOCK));
        for (i64 i = 0; i < count * width; i += BLOCK) {
            const Vf scale = splat(half_at(scales, static_cast<int>(i / BLOCK)));
            for (int j = 0; j < BLOCK; j += W) store(out + i + j, mul(Kv::load(from + i / Kv::PACKED, j), scale));
        }
    } else {
        for (i64 i = 0; i < count * width; i += W) store(out + i, Kv::load(from + i));
    }
}

}  // namespace mpillama
