// Integer tiles of AMX: 16 rows times 16 tokens at once, the same exact dot products and the same bits as elsewhere.
//
// A block's weights are the B tile (8 steps of 64 bytes are 8 rows of 4 k-values x 16 rows), its 16 tokens the A tile;
// the 16 x 16 int32 products pass through memory to become float32 and are scaled as everywhere. From the loads of both
// tiles to the products in memory some 120 cycles pass, while scaling a block takes about 30: so blocks go through three
// stages, and their multiplication, their way to memory and their scaling belong to different blocks at any time. A unit is
// a block, or half of one where halves have scales of their own.
//
// Linux must grant the tiles to the process (mpillama/kernels/isa.py), and each thread configures its own.
#pragma once
#ifdef MPILLAMA_AMX_IN_SOFTWARE
#include "amx_in_software.h"
#else
#include <immintrin.h>
#endif
#include "../types/scales.h"
#include <utility>

namespace mpillama {

constexpr int AMX_TOKENS = 16;
constexpr int AMX_TURNS = 4;        // units that have a tile and a place in memory for their products
constexpr int AMX_MULTIPLY_AT = 4;  // so many units before it is scaled a unit is multiplied,
constexpr int AMX_STORE_AT = 2;     // and so many before its products go to memory

// A thread's memory beside the signed steps: products of the units in flight; sums of a panel, the grids of the 16 tokens
// and what their panels add up to.
struct alignas(64) AmxRoom {
    u8 products[AMX_TURNS][1024];
    float sums[AMX_TOKENS][LANES];
    double shifts[AMX_TOKENS];
    double totals[AMX_TOKENS][LANES];
};

// The compiler does not know what the instructions of tiles read: what was written there must be in memory.
inline void amx_written(const void* there) { asm volatile("" : : "r"(there) : "memory"); }

// Tiles 0 to 3: products (16 x 64 B); 4, 5: tokens (16 x 32 B); 6, 7: weights (8 x 64 B); of `halves` 16 x 16 B and 4 x 64 B.
class Tiles {
  public:
    explicit Tiles(bool halves) {
        alignas(64) u8 configuration[64] = {};
        const u16 x_bytes = halves ? 16 : 32;
        const u8 steps = halves ? 4 : 8;
        const u16 row_bytes[] = {64, 64, 64, 64, x_bytes, x_bytes, 64, 64};
        const u8 rows[] = {16, 16, 16, 16, 16, 16, steps, steps};
        configuration[0] = 1;
        std::memcpy(configuration + 16, row_bytes, sizeof row_bytes);
        std::memcpy(configuration + 48, rows, sizeof rows);
        amx_written(configuration);
        _tile_loadconfig(configuration);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// Multiply a unit in the tiles of its turn. Tiles have numbers that are part of the instruction.
template <int TURN> [[gnu::always_inline]] inline void amx_multiply(const u8* weights, const i8* x) {
    if constexpr (TURN % 2 == 0) {
        _tile_loadd(4, x, 32);
        _tile_loadd(6, weights, 64);
    } else {
        _tile_loadd(5, x, 32);
        _tile_loadd(7, weights, 64);
    }
    if constexpr (TURN == 0) {
        _tile_zero(0);
        _tile_dpbssd(0, 4, 6);
    } else if constexpr (TURN == 1) {
        _tile_zero(1);
        _tile_dpbssd(1, 5, 7);
    } else if constexpr (TURN == 2) {
        _tile_zero(2);
        _tile_dpbssd(2, 4, 6);
    } else {
        _tile_zero(3);
        _tile_dpbssd(3, 5, 7);
    }
}

template <int TURN> [[gnu::always_inline]] inline void amx_store(u8* products) {
    if constexpr (TURN == 0) _tile_stored(0, products, 64);
    else if constexpr (TURN == 1) _tile_stored(1, products, 64);
    else if constexpr (TURN == 2) _tile_stored(2, products, 64);
    else _tile_stored(3, products, 64);
}

// Where the units of some adjacent blocks are: signed steps of a group, and a tile of activations.
template <bool HALVES> struct AmxUnits {
    const u8* steps;
    const i8* x;

    const u8* weights_of(i64 unit) const { return steps + (HALVES ? 256 : 512) * unit; }
    const i8* x_of(i64 unit) const {
        constexpr i64 bytes = BLOCK * AMX_TOKENS;
        return HALVES ? x + bytes * (unit / 2) + BLOCK / 2 * (unit % 2) : x + bytes * unit;
    }
};

// Call use(products) for `blocks` blocks in ascending order. Of halves the products of the first are at the turn before.
template <bool HALVES, class Use>
[[gnu::always_inline]] inline void amx_blocks(const AmxUnits<HALVES>& from, i64 blocks, AmxRoom& room, Use use) {
    const i64 units = HALVES ? 2 * blocks : blocks;
    const auto multiply = [&](i64 unit, auto turn) __attribute__((always_inline)) {
        if (unit < units) amx_multiply<decltype(turn)::value % AMX_TURNS>(from.weights_of(unit), from.x_of(unit));
    };
    const auto keep = [&](i64 unit, auto turn) __attribute__((always_inline)) {
        constexpr int TURN = decltype(turn)::value % AMX_TURNS;
        if (unit < units) amx_store<TURN>(room.products[TURN]);
    };
    const auto each_turn = [](auto body) __attribute__((always_inline)) {
        body(std::integral_constant<int, 0>()), body(std::integral_constant<int, 1>());
        body(std::integral_constant<int, 2>()), body(std::integral_constant<int, 3>());
    };
    each_turn([&](auto turn) __attribute__((always_inline)) {
        if constexpr (decltype(turn)::value < AMX_MULTIPLY_AT) multiply(decltype(turn)::value, turn);
    });
    each_turn([&](auto turn) __attribute__((always_inline)) {
        if constexpr (decltype(turn)::value < AMX_STORE_AT) keep(decltype(turn)::value, turn);
    });
    for (i64 first = 0; first < units; first += AMX_TURNS) {
        each_turn([&](auto turn) __attribute__((always_inline)) {
            constexpr int TURN = decltype(turn)::value;
            const i64 unit = first + TURN;
            multiply(unit + AMX_MULTIPLY_AT, std::integral_constant<int, TURN + AMX_MULTIPLY_AT>());
            keep(unit + AMX_STORE_AT, std::integral_constant<int, TURN + AMX_STORE_AT>());
            if constexpr (!HALVES || TURN % 2 == 1)
                if (unit < units) use(reinterpret_cast<const i32*>(room.products[TURN]));
        });
    }
}

// The sums of 16 tokens. Indices are constants from the start, or the compiler would leave the array in memory: that is
// what a loop does, since tiles may write anywhere.
struct AmxSums {
    Vf of[AMX_TOKENS];

    template <class Use> [[gnu::always_inline]] static void each(Use use) {
        each(use, std::make_integer_sequence<int, AMX_TOKENS>());
    }
    template <class Use, int... TOKEN>
    [[gnu::always_inline]] static void each(Use use, std::integer_sequence<int, TOKEN...>) {
        (use(std::integral_constant<int, TOKEN>()), ...);
    }

    [[gnu::always_inline]] void clear() {
        each([&](auto t) __attribute__((always_inline)) { of[t] = splat(0.0f); });
    }
    [[gnu::always_inline]] void load_from(const float* out, i64 stride) {
        each([&](auto t) __attribute__((always_inline)) { of[t] = load(out + t * stride); });
    }
    [[gnu::always_inline]] void store_to(float* out, i64 stride) const {
        each([&](auto t) __attribute__((always_inline)) { store(out + t * stride, of[t]); });
    }

    // Add the products of a block, scaled as everywhere; x is where its tokens are.
    template <class Scales>
    [[gnu::always_inline]] void add(const i32* products, const Scales& rows, const InputBlocks& x, i64 place) {
        each([&](auto t) __attribute__((always_inline)) {
            const InputBlock token = x[place + t];
            const Vi dot = load(products + LANES * t);
            if constexpr (Scales::HALVES) {
                const i32* const before = products - AMX_TOKENS * LANES;  // of the first half
                of[t] = rows.add_halves(load(before + LANES * t), dot, token, of[t]);
            } else {
                of[t] = rows.add_scaled(dot, token.scale, token.start, of[t]);
            }
        });
    }
};

// room.totals += room.sums, on each token's grid.
[[gnu::noinline]] inline void amx_add_panel(AmxRoom& room) {
    for (int t = 0; t < AMX_TOKENS; t++) {
        const __m512d shift = _mm512_set1_pd(room.shifts[t]);
        for (int half = 0; half < LANES; half += 8) {
            const __m512d sum = _mm512_cvtps_pd(_mm256_load_ps(room.sums[t] + half));
            const __m512d rounded = _mm512_sub_pd(_mm512_add_pd(sum, shift), shift);
            double* const total = room.totals[t] + half;
            _mm512_store_pd(total, _mm512_add_pd(_mm512_load_pd(total), rounded));
        }
    }
}

}  // namespace mpillama
