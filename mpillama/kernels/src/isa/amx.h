// Integer tiles of AMX: 16 rows times 16 tokens at once, the same exact dot products and the same bits as elsewhere.
//
// A block's weights are the B tile (8 steps of 64 bytes are 8 rows of 4 k-values x 16 rows), its 16 tokens the A tile;
// the 16 x 16 int32 products pass through memory to become float32 and are scaled as everywhere. Two blocks are in
// flight. Linux must grant the tiles to the process (mpillama/kernels/isa.py), and each thread configures its own.
#pragma once
#ifdef MPILLAMA_AMX_IN_SOFTWARE
#include "amx_in_software.h"
#else
#include <immintrin.h>
#endif
#include "../numbers.h"

namespace mpillama {

constexpr int AMX_TOKENS = 16;
constexpr i64 AMX_PRODUCTS = 2 * 1024;  // bytes of two blocks' products

// Tiles 0, 1: products (16 x 64 B); 2, 3: tokens (16 x 32 B); 4, 5: weights (8 x 64 B).
class Tiles {
  public:
    Tiles() {
        alignas(64) u8 configuration[64] = {};
        const u16 row_bytes[] = {64, 64, 32, 32, 64, 64};
        const u8 rows[] = {16, 16, 16, 16, 8, 8};
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

// Add the products of a block to the sums of its 16 tokens, scaled as everywhere.
template <class Scales>
inline void amx_add(const u8* products, const u8* scales, const float* x_scales, const i32* starts,
                    Vf (&sums)[AMX_TOKENS]) {
    const Scales of_rows = Scales::load(scales, 0);
    for (int t = 0; t < AMX_TOKENS; t++) {
        const Vi dot = load(reinterpret_cast<const i32*>(products) + LANES * t);
        sums[t] = of_rows.add_scaled(dot, x_scales[t], starts[t], sums[t]);
    }
}

// Sums of 16 tokens over `blocks` blocks of signed bytes (512 B each), in ascending order.
template <class Scales>
inline void amx_sums(const u8* weights, const u8* scales, i64 blocks, const i8* x, const float* x_scales,
                     const i32* starts, u8* products, Vf (&sums)[AMX_TOKENS]) {
    constexpr i64 x_bytes = BLOCK * AMX_TOKENS;
    i64 i = 0;
    for (; i + 2 <= blocks; i += 2) {
        amx_block<0>(weights + 512 * i, x + x_bytes * i, products);
        amx_block<1>(weights + 512 * (i + 1), x + x_bytes * (i + 1), products);
        amx_add<Scales>(products, scales + Scales::bytes * i, x_scales + AMX_TOKENS * i,
                        starts + AMX_TOKENS * i, sums);
        amx_add<Scales>(products + 1024, scales + Scales::bytes * (i + 1), x_scales + AMX_TOKENS * (i + 1),
                        starts + AMX_TOKENS * (i + 1), sums);
    }
    if (i < blocks) {
        amx_block<0>(weights + 512 * i, x + x_bytes * i, products);
        amx_add<Scales>(products, scales + Scales::bytes * i, x_scales + AMX_TOKENS * i,
                        starts + AMX_TOKENS * i, sums);
    }
}

}  // namespace mpillama
