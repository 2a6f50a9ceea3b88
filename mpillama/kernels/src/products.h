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
#ifdef MPILLAMA_HAS_TILES
#include "isa/amx.h"
#endif

namespace mpillama {

constexpr i64 AHEAD = 4096;  // bytes between what is multiplied and what is fetched
constexpr int MOST_TOKENS = PARTS == 1 ? 8 : 4;  // of a tile: its sums and dots should fit the registers
constexpr i64 READY_BLOCKS = 128;  // blocks of 16 rows that are unpacked at a time: they stay in the cache for all tokens
constexpr i64 TOKENS_AT_ONCE = 128;  // so do these tokens' activations, for all rows

template <int N> struct Count {
    static constexpr int value = N;
};

// So many tokens need no blocks unpacked to memory, nor panels brought together.
template <class T> constexpr i64 few_tokens() { return PARTS == 1 || !T::BLOCKS ? 32 : 4; }

// One column-parallel matrix, or one panel of a row-parallel one: [groups, columns].
struct Slice {
    const u8* values;
    const u8* scales;
    i64 columns;
};

// Panel `panel` of expert `expert`.
template <class T> inline Slice slice(const Matrix& m, i64 expert, i64 panel) {
    const i64 units = T::BLOCKS ? m.columns / BLOCK : m.columns, groups = (expert * m.panels + panel) * m.groups;
    return {m.values + groups * units * T::bytes, m.scales + groups * units * scale_bytes<T>(), m.columns};
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

    i64 place(i64 token) const { return block_place(tokens, from.columns / BLOCK, token, column / BLOCK); }
    const float* x(i64 token) const { return from.x + token * from.columns + column; }
    i64 width() const { return tile_width(tokens); }
    Input from_block(i64 block) const { return {from, tokens, column + BLOCK * block}; }

    // How many tokens from this one on go through a tile together: 8 (where tiles have as many), 4, 2 or 1.
    int together(i64 token) const {
        const i64 in_tile = width() - token % width(), left = tokens - token < in_tile ? tokens - token : in_tile;
        return MOST_TOKENS == 8 && left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    }
};

// Call use(token, Count<N>()) for the tokens first:last, as many together as a tile takes.
template <class Use> inline void in_tiles(const Input& in, i64 first, i64 last, Use use) {
    for (i64 token = first, count; token < last; token += count) {
        count = in.together(token);
        switch (count) {
            case 8: if constexpr (MOST_TOKENS == 8) use(token, Count<8>()); break;
            case 4: use(token, Count<4>()); break;
            case 2: use(token, Count<2>()); break;
            default: use(token, Count<1>());
        }
    }
}

inline void prefetch_run(const u8* at, i64 bytes) {
    for (i64 line = 0; line < bytes; line += 64) prefetch(at + line);
}

// -- sums over one slice's columns --------------------------------------------------------------------------------------

// sums[g][part] += rows of adjacent groups times a single token: nothing but streaming the weights.
template <class T, int GROUPS> inline void stream(const Slice& w, i64 group, const Input& in, Vf (&sums)[GROUPS][PARTS]) {
    if constexpr (T::BLOCKS) {
        const i64 blocks = w.columns / BLOCK, place = in.place(0);
        const i8* x = in.from.values + BLOCK * place;
        const float* x_scales = in.from.scales + place;
        const i32* starts = in.from.starts + place;
        const u8* values = w.values + group * blocks * T::bytes;
        const u8* scales = w.scales + group * blocks * T::Scales::bytes;
        for (i64 i = 0; i < blocks; i++) {
            for (int g = 0; g < GROUPS; g++) {
                const u8* here = values + (g * blocks + i) * T::bytes;
                const u8* here_scales = scales + (g * blocks + i) * T::Scales::bytes;
                prefetch_run(here + AHEAD, T::bytes);
                for (int part = 0; part < PARTS; part++)
                    sums[g][part] = BlockPart<T>(here, here_scales, part)
                                        .add(x + BLOCK * i, x_scales[i], starts[i], sums[g][part]);
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

// sums[part][t] += a group's rows times some tokens, over blocks that are unpacked.
template <class T, int TOKENS>
inline void tile(const ReadyBlock<T>* rows, i64 blocks, const Input& in, i64 token, Vf (&sums)[PARTS][TOKENS]) {
    const i64 width = in.width(), place = in.place(token);
    const i8* x = in.from.values + BLOCK * place;
    const float* x_scales = in.from.scales + place;
    const i32* starts = in.from.starts + place;
    for (i64 i = 0; i < blocks; i++, x += BLOCK * width, x_scales += width, starts += width) {
        T::template dots<TOKENS>(rows[i].steps, x, starts, [&](int part, int t, Vi dot) {
            sums[part][t] = rows[i].scales[part].add_scaled(dot, x_scales[t], starts[t], sums[part][t]);
        });
    }
}

// The same of few tokens, who share a tile: blocks are unpacked on the way, W rows at a time.
template <class T, int TOKENS>
inline void few_tile(const u8* values, const u8* scales, i64 blocks, const Input& in, i64 token, i64 ahead,
                     Vf (&sums)[PARTS][TOKENS]) {
    const i64 width = in.width(), place = in.place(token);
    for (int part = 0; part < PARTS; part++) {
        const i8* x = in.from.values + BLOCK * place;
        const float* x_scales = in.from.scales + place;
        const i32* starts = in.from.starts + place;
        for (i64 i = 0; i < blocks; i++, x += BLOCK * width, x_scales += width, starts += width) {
            if (part == 0) prefetch_run(values + i * T::bytes + ahead, T::bytes);
            typename T::Steps steps[1];
            T::load(values + i * T::bytes, part, steps[0]);
            const auto of_rows = T::Scales::load(scales + i * T::Scales::bytes, part);
            T::template dots<TOKENS>(steps, x, starts, [&](int, int t, Vi dot) {
                sums[part][t] = of_rows.add_scaled(dot, x_scales[t], starts[t], sums[part][t]);
            });
        }
    }
}

// The same over columns of floats.
template <class T, int TOKENS>
inline void float_tile(const u8* values, i64 columns, const Input& in, i64 token, Vf (&sums)[PARTS][TOKENS]) {
    const float* x = in.x(token);
    Vf here_sums[PARTS][TOKENS];
    std::memcpy(&here_sums, &sums, sizeof sums);
    for (i64 k = 0; k < columns; k++) {
        Vf rows[PARTS];
        for (int part = 0; part < PARTS; part++) rows[part] = T::load(values + k * T::bytes, part);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) {
            const Vf here = splat(x[t * in.from.columns + k]);
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; part++) here_sums[part][t] = fma(rows[part], here, here_sums[part][t]);
        }
    }
    std::memcpy(&sums, &here_sums, sizeof sums);
}

// Unpack adjacent blocks of a group.
template <class T> inline void make_ready(const u8* values, const u8* scales, i64 blocks, ReadyBlock<T>* ready) {
    for (i64 i = 0; i < blocks; i++) {
        prefetch_run(values + i * T::bytes + AHEAD, T::bytes);
        for (int part = 0; part < PARTS; part++) {
            T::load(values + i * T::bytes, part, ready[i].steps[part]);
            ready[i].scales[part] = T::Scales::load(scales + i * T::Scales::bytes, part);
        }
    }
}

template <class T> inline ReadyBlock<T>* ready_blocks(u8* scratch) { return reinterpret_cast<ReadyBlock<T>*>(scratch); }

// Bytes of a thread's scratch for a matrix: blocks that are unpacked, or the copied panels of a group of floats.
inline i64 product_scratch_bytes(const Matrix& m) {
    i64 bytes = 0;
    with_type(m.type, [&](auto type) {
        using T = decltype(type);
        if constexpr (T::BLOCKS) {
            const i64 least = m.columns / BLOCK, all = m.panels * least;
            bytes = (all < READY_BLOCKS ? all : least < READY_BLOCKS || m.panels == 1 ? READY_BLOCKS : least) *
                    static_cast<i64>(sizeof(ReadyBlock<T>));
#ifdef MPILLAMA_HAS_TILES
            const i64 steps = AMX_PRODUCTS + all * 512;
            bytes = steps > bytes ? steps : bytes;
#endif
        } else if (m.panels > 1) {
            bytes = m.panels * m.columns * T::bytes;
        }
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

template <int TOKENS> using Sums = Vf[PARTS][TOKENS];

template <int TOKENS> inline void load_sums(const float* out, i64 stride, Sums<TOKENS>& sums) {
    for (int t = 0; t < TOKENS; t++)
        for (int part = 0; part < PARTS; part++) sums[part][t] = load(out + t * stride + W * part);
}

template <int TOKENS> inline void store_sums(const Sums<TOKENS>& sums, float* out, i64 stride) {
    for (int t = 0; t < TOKENS; t++)
        for (int part = 0; part < PARTS; part++) store(out + t * stride + W * part, sums[part][t]);
}

// A group's rows times few tokens, out float32 [token, stride] at the group's first row.
template <class T> inline void column_few(const Slice& w, i64 group, const Input& in, float* out, i64 stride) {
    const i64 blocks = w.columns / BLOCK, place = group * blocks;
    in_tiles(in, 0, in.tokens, [&](i64 token, auto tokens) {
        Sums<tokens.value> sums = {};
        few_tile<T, tokens.value>(w.values + place * T::bytes, w.scales + place * T::Scales::bytes, blocks, in, token,
                                  AHEAD, sums);
        store_sums<tokens.value>(sums, out + token * stride, stride);
    });
}

// The same of the tokens first_token:last_token of many.
template <class T>
inline void column_many(const Slice& w, i64 group, const Input& in, i64 first_token, i64 last_token, float* out,
                         i64 stride, u8* scratch) {
    if constexpr (T::BLOCKS) {
        const i64 blocks = w.columns / BLOCK;
        ReadyBlock<T>* const ready = ready_blocks<T>(scratch);
        for (i64 start = 0, count; start < blocks; start += count) {
            count = blocks - start < READY_BLOCKS ? blocks - start : READY_BLOCKS;
            const i64 place = group * blocks + start;
            make_ready<T>(w.values + place * T::bytes, w.scales + place * T::Scales::bytes, count, ready);
            in_tiles(in, first_token, last_token, [&](i64 token, auto tokens) {
                Sums<tokens.value> sums = {};
                if (start > 0) load_sums<tokens.value>(out + token * stride, stride, sums);
                tile<T, tokens.value>(ready, count, in.from_block(start), token, sums);
                store_sums<tokens.value>(sums, out + token * stride, stride);
            });
        }
    } else {
        in_tiles(in, first_token, last_token, [&](i64 token, auto tokens) {
            Sums<tokens.value> sums = {};
            float_tile<T, tokens.value>(w.values + group * w.columns * T::bytes, w.columns, in, token, sums);
            store_sums<tokens.value>(sums, out + token * stride, stride);
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
        const Tiles tiles;
        u8* const steps = scratch + AMX_PRODUCTS;
        for (i64 group = first; group < last; group++) {
            const i64 place = group * blocks;
            for (i64 i = 0; i < blocks; i++) T::signed_steps(w.values + (place + i) * T::bytes, steps + 512 * i);
            for (i64 token = 0; token < tokens; token += AMX_TOKENS) {
                const i64 at = in.place(token);
                Vf sums[AMX_TOKENS] = {};
                amx_sums<typename T::Scales>(steps, w.scales + place * T::Scales::bytes, blocks,
                                             in.from.values + BLOCK * at, in.from.scales + at, in.from.starts + at,
                                             scratch, sums);
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
    if constexpr (T::BLOCKS)
        if (in.tokens <= few_tokens<T>()) {
            for (i64 group = first; group < last; group++) column_few<T>(w, group, in, out + group * LANES, stride);
            return;
        }
    const i64 begin = column_tiles<T>(w, in, first, last, out, stride, scratch);
    for (i64 token = begin; token < in.tokens; token += TOKENS_AT_ONCE) {
        const i64 end = in.tokens < token + TOKENS_AT_ONCE ? in.tokens : token + TOKENS_AT_ONCE;
        for (i64 group = first; group < last; group++)
            column_many<T>(w, group, in, token, end, out + group * LANES, stride, scratch);
    }
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

template <class T, int GROUPS> inline i64 row_stream(const Slice& w, const Input& in, i64 first, i64 last, double* out) {
    i64 group = first;
    for (; group + GROUPS <= last; group += GROUPS) {
        Vf sums[GROUPS][PARTS] = {};
        stream<T, GROUPS>(w, group, in, sums);
        for (int g = 0; g < GROUPS; g++)
            for (int part = 0; part < PARTS; part++) {
                double* at = out + (group + g) * LANES + W * part;
                store(at, add(load(at), round_to_grid(sums[g][part])));
            }
    }
    return group;
}

// Add panels first_panel:last_panel of groups first:last times a single token to out, float64 [rows].
inline void add_panels(const Matrix& m, i64 expert, const Activations& x, i64 first_panel, i64 last_panel, i64 first,
                       i64 last, double* out, i64 in_flight) {
    with_type(m.type, [&](auto type) {
        using T = decltype(type);
        for (i64 panel = first_panel; panel < last_panel; panel++) {
            const Slice w = slice<T>(m, expert, panel);
            const Input in{x, 1, panel * m.columns};
            i64 group = first;
            if constexpr (!T::BLOCKS) group = row_stream<T, 4>(w, in, group, last, out);
            if (in_flight == 2 && T::BLOCKS) group = row_stream<T, 2>(w, in, group, last, out);
            row_stream<T, 1>(w, in, group, last, out);
        }
    });
}

// Where the tokens' results are added to: row `rows[t]` of float64 [.., stride], or row t where `rows` is null.
struct Output {
    double* out;
    i64 stride;
    const i64* rows;

    double* at(i64 token) const { return out + (rows == nullptr ? token : rows[token]) * stride; }
};

template <int TOKENS> using Totals = Vd[PARTS][TOKENS];

template <int TOKENS> inline void load_totals(const Output& to, i64 token, i64 group, Totals<TOKENS>& totals) {
    for (int t = 0; t < TOKENS; t++)
        for (int part = 0; part < PARTS; part++) totals[part][t] = load(to.at(token + t) + group * LANES + W * part);
}

template <int TOKENS> inline void add_panel(const Sums<TOKENS>& sums, Totals<TOKENS>& totals) {
    for (int t = 0; t < TOKENS; t++)
        for (int part = 0; part < PARTS; part++) totals[part][t] = add(totals[part][t], round_to_grid(sums[part][t]));
}

template <int TOKENS> inline void store_totals(const Totals<TOKENS>& totals, const Output& to, i64 token, i64 group) {
    for (int t = 0; t < TOKENS; t++)
        for (int part = 0; part < PARTS; part++) store(to.at(token + t) + group * LANES + W * part, totals[part][t]);
}

// A group's panels times few tokens, added to what the tokens have. Panels lie apart: a thread comes to the next run
// of a panel with its next group.
template <class T>
inline void panels_few(const Matrix& m, i64 expert, i64 group, const Input& in, const Output& to) {
    const i64 units = T::BLOCKS ? m.columns / BLOCK : m.columns, place = group * units;
    in_tiles(in, 0, in.tokens, [&](i64 token, auto tokens) {
        constexpr int TOKENS = decltype(tokens)::value;
        Totals<TOKENS> totals;
        load_totals<TOKENS>(to, token, group, totals);
        for (i64 panel = 0; panel < m.panels; panel++) {
            const Slice from = slice<T>(m, expert, panel);
            const Input here{in.from, in.tokens, panel * m.columns};
            Sums<TOKENS> sums = {};
            if constexpr (T::BLOCKS)
                few_tile<T, TOKENS>(from.values + place * T::bytes, from.scales + place * T::Scales::bytes, units, here,
                                    token, units * T::bytes, sums);
            else
                float_tile<T, TOKENS>(from.values + place * T::bytes, units, here, token, sums);
            add_panel<TOKENS>(sums, totals);
        }
        store_totals<TOKENS>(totals, to, token, group);
    });
}

// The panels first:last of a group times the tokens first_token:last_token of many: brought together once, they stay in
// the cache while the tokens pass.
template <class T>
inline void panels_many(const Matrix& m, i64 expert, i64 group, i64 first, i64 last, const Input& in, i64 first_token,
                        i64 last_token, const Output& to, u8* scratch) {
    const i64 units = T::BLOCKS ? m.columns / BLOCK : m.columns;
    for (i64 panel = first; panel < last; panel++) {
        const Slice from = slice<T>(m, expert, panel);
        const u8* run = from.values + group * units * T::bytes;
        if constexpr (T::BLOCKS) {
            make_ready<T>(run, from.scales + group * units * T::Scales::bytes, units,
                          ready_blocks<T>(scratch) + (panel - first) * units);
        } else {
            std::memcpy(scratch + (panel - first) * units * T::bytes, run, units * T::bytes);
            prefetch_run(run + units * T::bytes, units * T::bytes);
        }
    }
    in_tiles(in, first_token, last_token, [&](i64 token, auto tokens) {
        constexpr int TOKENS = decltype(tokens)::value;
        Totals<TOKENS> totals;
        load_totals<TOKENS>(to, token, group, totals);
        for (i64 panel = first; panel < last; panel++) {
            const i64 place = (panel - first) * units;
            const Input here{in.from, in.tokens, panel * m.columns};
            Sums<TOKENS> sums = {};
            if constexpr (T::BLOCKS) tile<T, TOKENS>(ready_blocks<T>(scratch) + place, units, here, token, sums);
            else float_tile<T, TOKENS>(scratch + place * T::bytes, units, here, token, sums);
            add_panel<TOKENS>(sums, totals);
        }
        store_totals<TOKENS>(totals, to, token, group);
    });
}

// Whole tiles of tokens on AMX; returns the first token that is left.
template <class T>
inline i64 panel_tiles(const Matrix& m, i64 expert, const Input& in, const Output& to, i64 first, i64 last, u8* scratch) {
#ifdef MPILLAMA_HAS_TILES
    const i64 blocks = m.columns / BLOCK, tokens = in.tokens / AMX_TOKENS * AMX_TOKENS;
    if (!T::BLOCKS || tokens == 0) return 0;
    if constexpr (T::BLOCKS) {
        const Tiles tiles;
        u8* const steps = scratch + AMX_PRODUCTS;
        for (i64 group = first; group < last; group++) {
            for (i64 panel = 0; panel < m.panels; panel++) {
                const u8* run = slice<T>(m, expert, panel).values + group * blocks * T::bytes;
                for (i64 i = 0; i < blocks; i++)
                    T::signed_steps(run + i * T::bytes, steps + 512 * (panel * blocks + i));
            }
            for (i64 token = 0; token < tokens; token += AMX_TOKENS) {
                for (i64 panel = 0; panel < m.panels; panel++) {
                    const i64 at = Input{in.from, in.tokens, panel * m.columns}.place(token);
                    const u8* scales = slice<T>(m, expert, panel).scales + group * blocks * T::Scales::bytes;
                    Vf sums[AMX_TOKENS] = {};
                    amx_sums<typename T::Scales>(steps + 512 * panel * blocks, scales, blocks,
                                                 in.from.values + BLOCK * at, in.from.scales + at, in.from.starts + at,
                                                 scratch, sums);
                    for (int t = 0; t < AMX_TOKENS; t++) {
                        double* row = to.at(token + t) + group * LANES;
                        store(row, add(load(row), round_to_grid(sums[t])));
                    }
                }
            }
        }
    }
    return tokens;
#else
    (void)m, (void)expert, (void)in, (void)to, (void)first, (void)last, (void)scratch;
    return 0;
#endif
}

// Add all panels of groups first:last times x[t].
inline void add_rows(const Matrix& m, i64 expert, const Activations& x, i64 tokens, i64 first, i64 last, const Output& to,
                     u8* scratch) {
    with_type(m.type, [&](auto type) {
        using T = decltype(type);
        const i64 blocks = m.columns / BLOCK, most = T::BLOCKS ? (blocks < READY_BLOCKS ? READY_BLOCKS / blocks : 1) : m.panels;
        const Input in{x, tokens, 0};
        if (tokens <= few_tokens<T>()) {
            for (i64 group = first; group < last; group++) panels_few<T>(m, expert, group, in, to);
            return;
        }
        const i64 begin = panel_tiles<T>(m, expert, in, to, first, last, scratch);
        const i64 together = T::BLOCKS ? TOKENS_AT_ONCE : tokens;
        for (i64 token = begin; token < tokens; token += together) {
            const i64 end = tokens < token + together ? tokens : token + together;
            for (i64 group = first; group < last; group++)
                for (i64 panel = 0; panel < m.panels; panel += most)
                    panels_many<T>(m, expert, group, panel, panel + most < m.panels ? panel + most : m.panels, in, token,
                                   end, to, scratch);
        }
    });
}

}  // namespace mpillama
