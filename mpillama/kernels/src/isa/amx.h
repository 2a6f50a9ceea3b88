// Integer tiles of AMX: 16 rows times 16 tokens at once, the same exact dot products and the same bits as elsewhere.
//
// A block's weights are the B tile (8 steps of 64 bytes are 8 rows of 4 k-values x 16 rows), its 16 tokens the A tile;
// the 16 x 16 int32 products pass through memory to become float32 and are scaled as everywhere. Two blocks are in
// flight, or the two halves of one where these have scales of their own. Linux must grant the tiles to the process (mpillama/kernels/isa.py), and each thread configures its own.
#pragma once
#ifdef MPILLAMA_AMX_IN_SOFTWARE
#include "amx_in_software.h"
#else
#include <immintrin.h>
#endif
#include "../types/scales.h"

namespace mpillama {

constexpr int AMX_TOKENS = 16;
constexpr i64 AMX_PRODUCTS = 2 * 1024;  // bytes of two blocks' products

// Tiles 0, 1: products (16 x 64 B); 2, 3: tokens (16 x 32 B); 4, 5: weights (8 x 64 B); of `halves` 16 x 16 B and 4 x 64 B.
class Tiles {
  public:
    explicit Tiles(bool halves) {
        alignas(64) u8 configuration[64] = {};
        const u16 x_bytes = halves ? 16 : 32;
        const u8 steps = halves ? 4 : 8;
        const u16 row_bytes[] = {64, 64, x_bytes, x_bytes, 64, 64};
        const u8 rows[] = {16, 16, 16, 16, steps, steps};
        configuration[0] = 1;
        std::memcpy(configuration + 16, row_bytes, sizeof row_bytes);
        std::memcpy(configuration + 48, rows, sizeof rows);
        _tile_loadconfig(configuration);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// The products of one block through the tiles of turn 0 or 1, to memory.
template <int TURN> inline void amx_block(const u8* weights, const i8* x, u8* products) {
    if constexpr (TURN == 0) {
        _tile_loadd(2, x, 32);
        _tile_loadd(4, weights, 64);
        _tile_zero(0);
        _tile_dpbssd(0, 2, 4);
        _tile_stored(0, products, 64);
    } else {
        _tile_loadd(3, x, 32);
        _tile_loadd(5, weights, 64);
        _tile_zero(1);
        _tile_dpbssd(1, 3, 5);
        _tile_stored(1, products + 1024, 64);
    }
}

inline Vi amx_dot(const u8* products, int token) { return load(reinterpret_cast<const i32*>(products) + LANES * token); }

// Add the products of a block to the sums of its 16 tokens, scaled as everywhere.
template <class Scales>
inline void amx_add(const u8* products, const Scales& of_rows, const InputBlocks& x, i64 first, Vf (&sums)[AMX_TOKENS]) {
    for (int t = 0; t < AMX_TOKENS; t++) {
        const InputBlock token = x[first + t];
        if constexpr (Scales::HALVES)
            sums[t] = of_rows.add_halves(amx_dot(products, t), amx_dot(products + 1024, t), token, sums[t]);
        else
            sums[t] = of_rows.add_scaled(amx_dot(products, t), token.scale, token.start, sums[t]);
    }
}

// Sums of 16 tokens over `blocks` blocks of signed bytes (512 B each), in ascending order.
template <class Scales>
inline void amx_sums(const u8* weights, ScalePlace<Scales> scales, i64 blocks, const InputBlocks& x, u8* products,
                     Vf (&sums)[AMX_TOKENS]) {
    constexpr i64 x_bytes = BLOCK * AMX_TOKENS;
    const auto add = [&](i64 i, const u8* of_block) {
        amx_add<Scales>(of_block, Scales::load(scales.scales, scales.supers, 0), x, AMX_TOKENS * i, sums);
        scales.advance();
    };
    if constexpr (Scales::HALVES) {
        for (i64 i = 0; i < blocks; i++) {
            amx_block<0>(weights + 512 * i, x.values + x_bytes * i, products);
            amx_block<1>(weights + 512 * i + 256, x.values + x_bytes * i + BLOCK / 2, products);
            add(i, products);
        }
        return;
    }
    i64 i = 0;
    for (; i + 2 <= blocks; i += 2) {
        amx_block<0>(weights + 512 * i, x.values + x_bytes * i, products);
        amx_block<1>(weights + 512 * (i + 1), x.values + x_bytes * (i + 1), products);
        add(i, products);
        add(i + 1, products + 1024);
    }
    if (i < blocks) {
        amx_block<0>(weights + 512 * i, x.values + x_bytes * i, products);
        add(i, products);
    }
}

}  // namespace mpillama
