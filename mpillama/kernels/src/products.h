// Products of row-lane matrices with activations, for one thread's range of row groups.
//
// A tile keeps one accumulator for each row and token, so a row's sum never meets another's: it does not depend on the
// thread, the shape of the tile or the other tokens. Blocks go in ascending k, one FMA each.
//
// Column-parallel results are float32. A row-parallel product is rounded to the grid (numbers.h) panel by panel and added
// up in float64, where any order gives the same sum.
#pragma once
#include "activations.h"
#include "types/types.h"
#include <type_traits>
#ifdef MPILLAMA_HAS_TILES
#include "isa/amx.h"
#endif

namespace mpillama {

constexpr i64 AHEAD = 4096;  // bytes between what is multiplied and what is fetched
constexpr int MOST_TOKENS = PARTS == 1 ? 8 : 4;  // of a tile, whose sums should fit the registers
constexpr i64 READY_BLOCKS = 128;     // blocks of 16 rows that are unpacked at a time: they stay in the cache for all tokens
constexpr i64 READY_FLOATS = 16;      // such blocks where they become float32
constexpr i64 TOKENS_AT_ONCE = 128;   // so do these tokens' activations, for all rows
constexpr i64 FEW_TOKENS = 4;         // are not worth blocks that are unpacked to memory
constexpr i64 FEW_SCALED_TOKENS = 8;  // likewise where they become float32
constexpr i64 FEW_FLOAT_TOKENS = 32;  // are not worth panels of floats that are brought together

template <int N> struct Count {
    static constexpr int value = N;
};

// Whether blocks are unpacked to memory for many tokens: where 16 rows are two registers, a tile has all of them, and what
// it loads of a token serves both. One register has nothing to share, and more parts leave too few for the sums.
template <class T> constexpr bool unpacks() { return PARTS == 2 && (T::BLOCKS || SCALED_FLOATS<T>); }
template <class T> constexpr i64 few_tokens() { return T::BLOCKS ? FEW_TOKENS : FEW_SCALED_TOKENS; }
template <class T> constexpr i64 blocks_at_once() { return T::BLOCKS ? READY_BLOCKS : READY_FLOATS; }
template <class T> constexpr i64 block_bytes() { return T::BLOCKS ? T::bytes : T::bytes * BLOCK; }

// One column-parallel matrix, or one panel of a row-parallel one: [groups, columns].
struct Slice {
    const u8* values;
    ScaleArrays scales;
    i64 columns;
};

// Panel `panel` of expert `expert`.
template <class T> inline Slice slice(const Matrix& m, i64 expert, i64 panel) {
    const i64 units = T::BLOCKS ? m.columns / BLOCK : m.columns, groups = (expert * m.panels + panel) * m.groups;
    const ScaleArrays scales{m.scales, m.supers, m.super_columns / BLOCK};
    return {m.values + groups * units * T::bytes, scales.from<typename T::Scales>(groups * (m.columns / BLOCK)), m.columns};
}

inline i64 panel_bytes(const Matrix& m) {
    i64 bytes = 0;
    with_type(m.type, [&](auto type) {
        using T = decltype(type);
        bytes = m.groups * (T::BLOCKS ? m.columns / BLOCK : m.columns) * T::bytes;
    });
    return bytes;
}

// A step's activations from some column on, as the tiles of a matrix type read them.
struct Input {
    const Activations& from;
    i64 tokens, column;

    InputBlocks blocks(i64 token) const { return InputBlocks(from, place(token)); }
    i64 place(i64 token) const { return block_place(tokens, from.columns / BLOCK, token, column / BLOCK); }
    const float* x(i64 token) const { return from.x + token * from.columns + column; }
    i64 width() const { return tile_width(tokens); }

    Input from_block(i64 block) const { return {from, tokens, column + BLOCK * block}; }

    // How many tokens from this one on go through a tile together: 8 (where tiles have as many), 4, 2 or 1.
    int together(i64 token) const {
        const i64 in_tile = width() - token % width(), left = tokens - token < in_tile ? tokens - token : in_tile;
        return MOST_TOKENS == 8 && left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    }

    // Call use(token, Count<N>()) for the tokens first:last, as many together as a tile takes.
    template <class Use> void in_tiles(i64 first, i64 last, Use use) const {
        for (i64 token = first, count; token < last; token += count) {
            count = together(token);
            switch (count) {
                case 8:
                    if constexpr (MOST_TOKENS == 8) use(token, Count<8>());
                    break;
                case 4: use(token, Count<4>()); break;
                case 2: use(token, Count<2>()); break;
                default: use(token, Count<1>());
            }
        }
    }
};

// Call use(first, last) for so many of the tokens from `token` on at a time.
template <class Use> inline void at_once(i64 token, i64 tokens, i64 most, Use use) {
    for (; token < tokens; token += most) use(token, tokens < token + most ? tokens : token + most);
}

inline void prefetch_run(const u8* at, i64 bytes) {
    for (i64 line = 0; line < bytes; line += 64) prefetch(at + line);
}

// -- sums over one slice's columns --------------------------------------------------------------------------------------

// What W rows of a block of floats are multiplied by.
template <class Scales> inline Vf scale_of(const ScalePlace<Scales>& place, int part) {
    return Scales::load(place.scales, place.supers, part).scale;
}

// sums[g][part] += rows of adjacent groups times a single token: nothing but streaming the weights.
template <class T, int GROUPS> inline void stream(const Slice& w, i64 group, const Input& in, Vf (&sums)[GROUPS][PARTS]) {
    if constexpr (T::BLOCKS) {
        const i64 blocks = w.columns / BLOCK;
        const InputBlocks x = in.blocks(0);
        const u8* values = w.values + group * blocks * T::bytes;
        ScalePlace<typename T::Scales> scales[GROUPS];
        for (int g = 0; g < GROUPS; g++) scales[g] = {w.scales, (group + g) * blocks};
        for (i64 i = 0; i < blocks; i++) {
            for (int g = 0; g < GROUPS; g++) {
                const u8* here = values + (g * blocks + i) * T::bytes;
                prefetch_run(here + AHEAD, T::bytes);
                for (int part = 0; part < PARTS; part++)
                    sums[g][part] = BlockPart<T>(here, scales[g], part).add(x[i], sums[g][part]);
                scales[g].advance();
            }
        }
    } else if constexpr (SCALED_FLOATS<T>) {
        const i64 blocks = w.columns / BLOCK;
        const float* x = in.x(0);
        const u8* values = w.values + group * w.columns * T::bytes;
        ScalePlace<typename T::Scales> scales[GROUPS];
        for (int g = 0; g < GROUPS; g++) scales[g] = {w.scales, (group + g) * blocks};
        for (i64 i = 0; i < blocks; i++) {
            Vf parts[GROUPS][PARTS] = {};
            for (int g = 0; g < GROUPS; g++) prefetch_run(values + (g * w.columns + BLOCK * i) * T::bytes + AHEAD, BLOCK * T::bytes);
            for (i64 k = BLOCK * i; k < BLOCK * (i + 1); k++) {
                const Vf here = splat(x[k]);
                for (int g = 0; g < GROUPS; g++)
                    for (int part = 0; part < PARTS; part++)
                        parts[g][part] = fma(T::load(values + (g * w.columns + k) * T::bytes, part), here, parts[g][part]);
            }
            for (int g = 0; g < GROUPS; g++) {
                for (int part = 0; part < PARTS; part++)
                    sums[g][part] = fma(parts[g][part], scale_of(scales[g], part), sums[g][part]);
                scales[g].advance();
            }
        }
    } else {
        const float* x = in.x(0);
        const u8* values = w.values + group * w.columns * T::bytes;
        for (i64 k = 0; k < w.columns; k++) {
            const Vf here = splat(x[k]);
            for (int g = 0; g < GROUPS; g++)
                for (int part = 0; part < PARTS; part++)
                    sums[g][part] = fma(T::load(values + (g * w.columns + k) * T::bytes, part), here, sums[g][part]);
        }
    }
}

template <int TOKENS> using Sums = Vf[PARTS][TOKENS];

// sums[part][t] += a group's rows times some tokens, over blocks that are unpacked on the way, W rows at a time.
template <class T, int TOKENS>
[[gnu::always_inline]] inline void tile(const u8* values, ScalePlace<typename T::Scales> first, i64 blocks, i64 ahead, const Input& in, i64 token,
                 Sums<TOKENS>& sums) {
    const i64 width = in.width();
    const InputBlocks x = in.blocks(token);
    for (int part = 0; part < PARTS; part++) {
        ScalePlace<typename T::Scales> scales = first;
        Vf here[1][TOKENS] = {};
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) here[0][t] = sums[part][t];
        for (i64 i = 0; i < blocks; i++, scales.advance()) {
            if (part == 0) prefetch_run(values + i * T::bytes + ahead, T::bytes);
            const ReadyBlock<T, 1> rows(values + i * T::bytes, scales, part);
            rows.template add<TOKENS>(x, i * width, here);
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) sums[part][t] = here[0][t];
    }
}

// sums[part][t] += columns first:last of floats times some tokens.
template <class T, int TOKENS>
[[gnu::always_inline]] inline void float_run(const u8* values, i64 first, i64 last, const float* x, i64 stride,
                                             Sums<TOKENS>& sums) {
    Sums<TOKENS> here;
    std::memcpy(&here, &sums, sizeof here);
    for (i64 k = first; k < last; k++) {
        Vf rows[PARTS];
        for (int part = 0; part < PARTS; part++) rows[part] = T::load(values + k * T::bytes, part);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) {
            const Vf of_token = splat(x[t * stride + k]);
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; part++) here[part][t] = fma(rows[part], of_token, here[part][t]);
        }
    }
    std::memcpy(&sums, &here, sizeof here);
}

// The same over a slice's columns, each block by itself where floats have scales.
template <class T, int TOKENS>
[[gnu::always_inline]] inline void float_tile(const u8* values, [[maybe_unused]] ScalePlace<typename T::Scales> scales,
                                              i64 columns, const Input& in, i64 token, Sums<TOKENS>& sums) {
    const float* x = in.x(token);
    const i64 stride = in.from.columns;
    if constexpr (SCALED_FLOATS<T>) {
        for (i64 k = 0; k < columns; k += BLOCK, scales.advance()) {
            Sums<TOKENS> of_block = {};
            float_run<T, TOKENS>(values, k, k + BLOCK, x, stride, of_block);
            for (int part = 0; part < PARTS; part++) {
                const Vf scale = scale_of(scales, part);
                for (int t = 0; t < TOKENS; t++) sums[part][t] = fma(of_block[part][t], scale, sums[part][t]);
            }
        }
    } else {
        float_run<T, TOKENS>(values, 0, columns, x, stride, sums);
    }
}

// A block of floats, unpacked for some tokens.
template <class T> struct alignas(64) ReadyFloats {
    float rows[BLOCK][LANES];
    Vf scales[PARTS];

    ReadyFloats(const u8* values, const ScalePlace<typename T::Scales>& place, int) {
        for (int k = 0; k < BLOCK; k++)
            for (int part = 0; part < PARTS; part++) store(rows[k] + W * part, T::load(values + k * T::bytes, part));
        for (int part = 0; part < PARTS; part++) scales[part] = scale_of(place, part);
    }

    // sums[part][t] += the product with the block at `x` of TOKENS tokens, `stride` apart.
    // A call: the compiler would keep more sums in registers than there are.
    template <int TOKENS> [[gnu::noinline]] void add(const float* x, i64 stride, Sums<TOKENS>& sums) const {
        Sums<TOKENS> of_block = {};
        float_run<F32, TOKENS>(reinterpret_cast<const u8*>(rows), 0, BLOCK, x, stride, of_block);
        for (int part = 0; part < PARTS; part++)
            for (int t = 0; t < TOKENS; t++) sums[part][t] = fma(of_block[part][t], scales[part], sums[part][t]);
    }
};

template <class T> using Ready = std::conditional_t<T::BLOCKS, ReadyBlock<T>, ReadyFloats<T>>;

// The same over blocks that are unpacked in memory, all rows at a time.
template <class T, int TOKENS>
[[gnu::always_inline]] inline void ready_tile(const Ready<T>* rows, i64 blocks, const Input& in, i64 token, Sums<TOKENS>& sums) {
    if constexpr (T::BLOCKS) {
        const i64 width = in.width();
        const InputBlocks x = in.blocks(token);
        for (i64 i = 0; i < blocks; i++) rows[i].template add<TOKENS>(x, i * width, sums);
    } else {
        const float* x = in.x(token);
        for (i64 i = 0; i < blocks; i++) rows[i].template add<TOKENS>(x + BLOCK * i, in.from.columns, sums);
    }
}

// Unpack adjacent blocks of a group; returns where the scales of the next one are.
template <class T>
inline ScalePlace<typename T::Scales> make_ready(const u8* values, ScalePlace<typename T::Scales> scales, i64 blocks,
                                                 Ready<T>* ready) {
    constexpr i64 bytes = block_bytes<T>();
    for (i64 i = 0; i < blocks; i++, scales.advance()) {
        prefetch_run(values + i * bytes + AHEAD, bytes);
        ready[i] = Ready<T>(values + i * bytes, scales, 0);
    }
    return scales;
}

template <class T> inline Ready<T>* ready_blocks(u8* scratch) { return reinterpret_cast<Ready<T>*>(scratch); }

// Panels of a group that are brought together at a time.
template <class T> inline i64 panels_at_once(const Matrix& m) {
    const i64 blocks = m.columns / BLOCK, most = blocks_at_once<T>();
    return !unpacks<T>() ? m.panels : blocks < most ? most / blocks : 1;
}

// Bytes of a thread's scratch for products: unpacked blocks, the panels of a group of floats, or AMX's signed steps.
inline i64 product_scratch_bytes(const Matrix& m) {
    i64 bytes = 0;
    with_type(m.type, [&](auto type) {
        using T = decltype(type);
        const i64 blocks = m.columns / BLOCK, panels = m.panels > 1 ? panels_at_once<T>(m) : 0;
        if constexpr (unpacks<T>())
            bytes = (panels > 0 ? panels * blocks : blocks_at_once<T>()) * static_cast<i64>(sizeof(Ready<T>));
        else if constexpr (!T::BLOCKS) bytes = panels * m.columns * T::bytes;
#ifdef MPILLAMA_HAS_TILES
        if constexpr (T::BLOCKS) bytes = AMX_PRODUCTS + m.panels * blocks * 512;
#endif
    });
    return bytes;
}

// -- column-parallel ----------------------------------------------------------------------------------------------------

template <class T, int GROUPS> inline i64 column_stream(const Slice& w, const Input& in, i64 first, i64 last, float* out) {
    i64 group = first;
    for (; group + GROUPS <= last; group += GROUPS) {
        Vf sums[GROUPS][PARTS] = {};
        stream<T, GROUPS>(w, group, in, sums);
        for (int g = 0; g < GROUPS; g++)
            for (int part = 0; part < PARTS; part++) store(out + (group + g) * LANES + W * part, sums[g][part]);
    }
    return group;
}

template <int TOKENS> inline void load_sums(const float* out, i64 stride, Sums<TOKENS>& sums) {
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++)
        for (int part = 0; part < PARTS; part++) sums[part][t] = load(out + t * stride + W * part);
}

template <int TOKENS> inline void store_sums(const Sums<TOKENS>& sums, float* out, i64 stride) {
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++)
        for (int part = 0; part < PARTS; part++) store(out + t * stride + W * part, sums[part][t]);
}

// A group's rows times the tokens first:last, out float32 [token, stride] at the group's first row.
template <class T>
inline void column_group(const Slice& w, i64 group, const Input& in, i64 first, i64 last, float* out, i64 stride) {
    in.in_tiles(first, last, [&](i64 token, auto count) {
        constexpr int TOKENS = decltype(count)::value;
        Sums<TOKENS> sums = {};
        if constexpr (T::BLOCKS) {
            const i64 blocks = w.columns / BLOCK;
            tile<T, TOKENS>(w.values + group * blocks * T::bytes, {w.scales, group * blocks}, blocks, AHEAD, in, token,
                            sums);
        } else {
            float_tile<T, TOKENS>(w.values + group * w.columns * T::bytes, {w.scales, group * (w.columns / BLOCK)},
                                  w.columns, in, token, sums);
        }
        store_sums<TOKENS>(sums, out + token * stride, stride);
    });
}

// The same by way of unpacked blocks. Where there are more than fit, sums go on from what is in `out`.
template <class T>
inline void ready_column_group(const Slice& w, i64 group, const Input& in, i64 first, i64 last, float* out, i64 stride,
                               u8* scratch) {
    const i64 blocks = w.columns / BLOCK;
    Ready<T>* const ready = ready_blocks<T>(scratch);
    ScalePlace<typename T::Scales> scales(w.scales, group * blocks);
    for (i64 start = 0, now; start < blocks; start += now) {
        now = blocks - start < blocks_at_once<T>() ? blocks - start : blocks_at_once<T>();
        scales = make_ready<T>(w.values + (group * blocks + start) * block_bytes<T>(), scales, now, ready);
        in.in_tiles(first, last, [&](i64 token, auto count) {
            constexpr int TOKENS = decltype(count)::value;
            Sums<TOKENS> sums = {};
            if (start > 0) load_sums<TOKENS>(out + token * stride, stride, sums);
            ready_tile<T, TOKENS>(ready, now, in.from_block(start), token, sums);
            store_sums<TOKENS>(sums, out + token * stride, stride);
        });
    }
}

// Whole tiles of tokens on AMX; returns the first token that is left.
template <class T>
inline i64 column_tiles(const Slice& w, const Input& in, i64 first, i64 last, float* out, i64 stride, u8* scratch) {
#ifdef MPILLAMA_HAS_TILES
    const i64 blocks = w.columns / BLOCK, tokens = in.tokens / AMX_TOKENS * AMX_TOKENS;
    if (!T::BLOCKS || tokens == 0) return 0;
    if constexpr (T::BLOCKS) {
        using Scales = typename T::Scales;
        const Tiles tiles(Scales::HALVES);
        u8* const steps = scratch + AMX_PRODUCTS;
        for (i64 group = first; group < last; group++) {
            const i64 place = group * blocks;
            for (i64 i = 0; i < blocks; i++) T::signed_steps(w.values + (place + i) * T::bytes, steps + 512 * i);
            for (i64 token = 0; token < tokens; token += AMX_TOKENS) {
                Vf sums[AMX_TOKENS] = {};
                amx_sums<Scales>(steps, {w.scales, place}, blocks, in.blocks(token), scratch, sums);
                for (int t = 0; t < AMX_TOKENS; t++) store(out + (token + t) * stride + group * LANES, sums[t]);
            }
        }
    }
    return tokens;
#else
    (void)w, (void)in, (void)first, (void)last, (void)out, (void)stride, (void)scratch;
    return 0;
#endif
}

template <class T>
inline void column_span(const Slice& w, const Input& in, i64 first, i64 last, float* out, i64 stride, i64 in_flight,
                        u8* scratch) {
    if (in.tokens == 1) {
        i64 group = first;
        if constexpr (!T::BLOCKS) group = column_stream<T, 4>(w, in, group, last, out);
        if (in_flight == 2 && T::BLOCKS) group = column_stream<T, 2>(w, in, group, last, out);
        column_stream<T, 1>(w, in, group, last, out);
        return;
    }
    const i64 begin = column_tiles<T>(w, in, first, last, out, stride, scratch);
    at_once(begin, in.tokens, TOKENS_AT_ONCE, [&](i64 token, i64 end) {
        for (i64 group = first; group < last; group++) {
            float* const rows = out + group * LANES;
            if constexpr (unpacks<T>())
                if (in.tokens > few_tokens<T>()) {
                    ready_column_group<T>(w, group, in, token, end, rows, stride, scratch);
                    continue;
                }
            column_group<T>(w, group, in, token, end, rows, stride);
        }
    });
}

// out[t, 16 first : 16 last] = the rows of groups first:last of an expert's matrix times x[t]; out float32 [tokens, stride].
inline void column_span(const Matrix& m, i64 expert, const Activations& x, i64 tokens, i64 first, i64 last, float* out,
                        i64 stride, i64 in_flight, u8* scratch) {
    with_type(m.type, [&](auto type) {
        using T = decltype(type);
        column_span<T>(slice<T>(m, expert, 0), Input{x, tokens, 0}, first, last, out, stride, in_flight, scratch);
    });
}

// -- row-parallel -------------------------------------------------------------------------------------------------------

template <class T, int GROUPS>
inline i64 row_stream(const Slice& w, const Input& in, i64 first, i64 last, double* out, double shift) {
    i64 group = first;
    for (; group + GROUPS <= last; group += GROUPS) {
        Vf sums[GROUPS][PARTS] = {};
        stream<T, GROUPS>(w, group, in, sums);
        for (int g = 0; g < GROUPS; g++)
            for (int part = 0; part < PARTS; part++) {
                double* at = out + (group + g) * LANES + W * part;
                store(at, add(load(at), round_to_grid(sums[g][part], shift)));
            }
    }
    return group;
}

// Add panels first_panel:last_panel of groups first:last times a single token to out, float64 [rows].
inline void add_panels(const Matrix& m, i64 expert, const Activations& x, i64 first_panel, i64 last_panel, i64 first,
                       i64 last, double* out, i64 in_flight, double shift = GRID_SHIFT) {
    with_type(m.type, [&](auto type) {
        using T = decltype(type);
        for (i64 panel = first_panel; panel < last_panel; panel++) {
            const Slice w = slice<T>(m, expert, panel);
            const Input in{x, 1, panel * m.columns};
            i64 group = first;
            if constexpr (!T::BLOCKS) group = row_stream<T, 4>(w, in, group, last, out, shift);
            if (in_flight == 2 && T::BLOCKS) group = row_stream<T, 2>(w, in, group, last, out, shift);
            row_stream<T, 1>(w, in, group, last, out, shift);
        }
    });
}

// Where the tokens' results are added to: row `rows[t]` of float64 [.., stride], or row t where `rows` is null; and the
// grids of these rows, or null.
struct Output {
    double* out;
    i64 stride;
    const i64* rows;
    const double* shifts = nullptr;

    i64 row(i64 token) const { return rows == nullptr ? token : rows[token]; }
    double* at(i64 token) const { return out + row(token) * stride; }
    double shift(i64 token) const { return shifts == nullptr ? GRID_SHIFT : shifts[row(token)]; }
};

template <int TOKENS> using Totals = Vd[PARTS][TOKENS];

template <int TOKENS> inline void load_totals(const Output& to, i64 token, i64 group, Totals<TOKENS>& totals) {
    for (int t = 0; t < TOKENS; t++)
        for (int part = 0; part < PARTS; part++) totals[part][t] = load(to.at(token + t) + group * LANES + W * part);
}

template <int TOKENS>
inline void add_panel(const Sums<TOKENS>& sums, const Output& to, i64 token, Totals<TOKENS>& totals) {
    for (int t = 0; t < TOKENS; t++) {
        const double shift = to.shift(token + t);
        for (int part = 0; part < PARTS; part++) totals[part][t] = add(totals[part][t], round_to_grid(sums[part][t], shift));
    }
}

template <int TOKENS> inline void store_totals(const Totals<TOKENS>& totals, const Output& to, i64 token, i64 group) {
    for (int t = 0; t < TOKENS; t++)
        for (int part = 0; part < PARTS; part++) store(to.at(token + t) + group * LANES + W * part, totals[part][t]);
}

// A group's panels times the tokens first:last, added to what the tokens have. Panels lie apart: a thread comes to the
// next run of a panel with its next group.
template <class T>
inline void panels(const Matrix& m, i64 expert, i64 group, const Input& in, i64 first, i64 last, const Output& to) {
    const i64 units = T::BLOCKS ? m.columns / BLOCK : m.columns;
    in.in_tiles(first, last, [&](i64 token, auto count) {
        constexpr int TOKENS = decltype(count)::value;
        Totals<TOKENS> totals;
        load_totals<TOKENS>(to, token, group, totals);
        for (i64 panel = 0; panel < m.panels; panel++) {
            const Slice from = slice<T>(m, expert, panel);
            const u8* values = from.values + group * units * T::bytes;
            const Input here{in.from, in.tokens, panel * m.columns};
            Sums<TOKENS> sums = {};
            if constexpr (T::BLOCKS) {
                const ScalePlace<typename T::Scales> scales(from.scales, group * units);
                prefetch_run(scales.scales + units * T::Scales::bytes, units * T::Scales::bytes);
                tile<T, TOKENS>(values, scales, units, units * T::bytes, here, token, sums);
            } else
                float_tile<T, TOKENS>(values, {from.scales, group * (units / BLOCK)}, units, here, token, sums);
            add_panel<TOKENS>(sums, to, token, totals);
        }
        store_totals<TOKENS>(totals, to, token, group);
    });
}

// The same, some panels at a time, which are brought together once and stay in the cache while the tokens pass: blocks
// unpacked, floats as they are.
template <class T>
inline void ready_panels(const Matrix& m, i64 expert, i64 group, i64 first_panel, i64 last_panel, const Input& in,
                         i64 first, i64 last, const Output& to, u8* scratch) {
    const i64 blocks = m.columns / BLOCK, units = T::BLOCKS ? blocks : m.columns;
    for (i64 panel = first_panel; panel < last_panel; panel++) {
        const Slice from = slice<T>(m, expert, panel);
        const u8* run = from.values + group * units * T::bytes;
        if constexpr (unpacks<T>()) {
            make_ready<T>(run, {from.scales, group * blocks}, blocks, ready_blocks<T>(scratch) + (panel - first_panel) * blocks);
        } else {
            std::memcpy(scratch + (panel - first_panel) * units * T::bytes, run, units * T::bytes);
            prefetch_run(run + units * T::bytes, units * T::bytes);
        }
    }
    in.in_tiles(first, last, [&](i64 token, auto count) {
        constexpr int TOKENS = decltype(count)::value;
        Totals<TOKENS> totals;
        load_totals<TOKENS>(to, token, group, totals);
        for (i64 panel = first_panel; panel < last_panel; panel++) {
            const i64 place = panel - first_panel;
            const Input here{in.from, in.tokens, panel * m.columns};
            Sums<TOKENS> sums = {};
            if constexpr (unpacks<T>())
                ready_tile<T, TOKENS>(ready_blocks<T>(scratch) + place * blocks, blocks, here, token, sums);
            else
                float_tile<T, TOKENS>(scratch + place * units * T::bytes,
                                      {slice<T>(m, expert, panel).scales, group * blocks}, units, here, token, sums);
            add_panel<TOKENS>(sums, to, token, totals);
        }
        store_totals<TOKENS>(totals, to, token, group);
    });
}

// Whole tiles of tokens on AMX; returns the first token that is left.
template <class T>
inline i64 panel_tiles(const Matrix& m, i64 expert, const Input& in, i64 first, i64 last, const Output& to, u8* scratch) {
#ifdef MPILLAMA_HAS_TILES
    const i64 blocks = m.columns / BLOCK, tokens = in.tokens / AMX_TOKENS * AMX_TOKENS;
    if (!T::BLOCKS || tokens == 0) return 0;
    if constexpr (T::BLOCKS) {
        using Scales = typename T::Scales;
        const Tiles tiles(Scales::HALVES);
        u8* const steps = scratch + AMX_PRODUCTS;
        for (i64 group = first; group < last; group++) {
            for (i64 panel = 0; panel < m.panels; panel++) {
                const u8* run = slice<T>(m, expert, panel).values + group * blocks * T::bytes;
                u8* const to_steps = steps + 512 * panel * blocks;
                for (i64 i = 0; i < blocks; i++) T::signed_steps(run + i * T::bytes, to_steps + 512 * i);
            }
            for (i64 token = 0; token < tokens; token += AMX_TOKENS) {
                for (i64 panel = 0; panel < m.panels; panel++) {
                    const InputBlocks x = Input{in.from, in.tokens, panel * m.columns}.blocks(token);
                    const ScaleArrays scales = slice<T>(m, expert, panel).scales;
                    Vf sums[AMX_TOKENS] = {};
                    amx_sums<Scales>(steps + 512 * panel * blocks, {scales, group * blocks}, blocks, x, scratch, sums);
                    for (int t = 0; t < AMX_TOKENS; t++) {
                        double* row = to.at(token + t) + group * LANES;
                        store(row, add(load(row), round_to_grid(sums[t], to.shift(token + t))));
                    }
                }
            }
        }
    }
    return tokens;
#else
    (void)m, (void)expert, (void)in, (void)first, (void)last, (void)to, (void)scratch;
    return 0;
#endif
}

// Add all panels of groups first:last times x[t].
template <class T>
inline void add_rows(const Matrix& m, i64 expert, const Input& in, i64 first, i64 last, const Output& to, u8* scratch) {
    // A panel that lies together already, or is wider than what is unpacked at a time, is read where it is.
    const bool in_place = unpacks<T>() ? m.columns / BLOCK > blocks_at_once<T>() : T::BLOCKS || m.panels == 1;
    const bool few = in_place || in.tokens <= (unpacks<T>() ? few_tokens<T>() : FEW_FLOAT_TOKENS);
    const i64 together = panels_at_once<T>(m);
    const i64 begin = panel_tiles<T>(m, expert, in, first, last, to, scratch);
    at_once(begin, in.tokens, T::BLOCKS || unpacks<T>() ? TOKENS_AT_ONCE : in.tokens, [&](i64 token, i64 end) {
        for (i64 group = first; group < last; group++) {
            if (few) {
                panels<T>(m, expert, group, in, token, end, to);
                continue;
            }
            if constexpr (unpacks<T>() || !T::BLOCKS)
                for (i64 panel = 0; panel < m.panels; panel += together) {
                    const i64 last_panel = panel + together < m.panels ? panel + together : m.panels;
                    ready_panels<T>(m, expert, group, panel, last_panel, in, token, end, to, scratch);
                }
        }
    });
}

inline void add_rows(const Matrix& m, i64 expert, const Activations& x, i64 tokens, i64 first, i64 last, const Output& to,
                     u8* scratch) {
    with_type(m.type, [&](auto type) { add_rows<decltype(type)>(m, expert, Input{x, tokens, 0}, first, last, to, scratch); });
}

}  // namespace mpillama
