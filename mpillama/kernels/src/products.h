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
constexpr int MOST_TOKENS = 8;

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

    // How many tokens from this one on go through a tile together: 8, 4, 2 or 1 of the same tile.
    int together(i64 token) const {
        const i64 in_tile = width() - token % width(), left = tokens - token < in_tile ? tokens - token : in_tile;
        return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    }
};

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

// sums[t] += W rows of a group times some tokens. Unrolled, so that the sums stay in registers where there are enough.
template <class T, int TOKENS>
inline void tile(const Slice& w, i64 group, int part, const Input& in, i64 token, Vf (&sums)[TOKENS]) {
    if constexpr (T::BLOCKS) {
        const i64 blocks = w.columns / BLOCK, width = in.width(), place = in.place(token);
        const i8* x = in.from.values + BLOCK * place;
        const float* x_scales = in.from.scales + place;
        const i32* starts = in.from.starts + place;
        const u8* values = w.values + group * blocks * T::bytes;
        const u8* scales = w.scales + group * blocks * T::Scales::bytes;
        for (i64 i = 0; i < blocks; i++) {
            if (part == 0) prefetch_run(values + i * T::bytes + AHEAD, T::bytes);
            const BlockPart<T> rows(values + i * T::bytes, scales + i * T::Scales::bytes, part);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; t++)
                sums[t] = rows.add(x + BLOCK * (i * width + t), x_scales[i * width + t], starts[i * width + t], sums[t]);
        }
    } else {
        const float* x = in.x(token);
        const u8* values = w.values + group * w.columns * T::bytes;
        for (i64 k = 0; k < w.columns; k++) {
            const Vf rows = T::load(values + k * T::bytes, part);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; t++) sums[t] = fma(rows, splat(x[t * in.from.columns + k]), sums[t]);
        }
    }
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

template <class T, int TOKENS>
inline void column_tile(const Slice& w, i64 group, const Input& in, i64 token, float* out, i64 stride) {
    for (int part = 0; part < PARTS; part++) {
        Vf sums[TOKENS] = {};
        tile<T, TOKENS>(w, group, part, in, token, sums);
        for (int t = 0; t < TOKENS; t++) store(out + (token + t) * stride + group * LANES + W * part, sums[t]);
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
    const i64 begin = column_tiles<T>(w, in, first, last, out, stride, scratch);
    for (i64 group = first; group < last; group++) {
        for (i64 token = begin, count; token < in.tokens; token += count) {
            count = in.together(token);
            switch (count) {
                case 8: column_tile<T, 8>(w, group, in, token, out, stride); break;
                case 4: column_tile<T, 4>(w, group, in, token, out, stride); break;
                case 2: column_tile<T, 2>(w, group, in, token, out, stride); break;
                default: column_tile<T, 1>(w, group, in, token, out, stride);
            }
        }
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

// Bytes of a thread's scratch that a product with a group of this matrix needs on AMX: its signed steps.
inline i64 steps_bytes([[maybe_unused]] const Matrix& m) {
#ifdef MPILLAMA_HAS_TILES
    return AMX_PRODUCTS + m.panels * (m.columns / BLOCK) * 512;
#else
    return 0;
#endif
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

template <class T, int TOKENS>
inline void panel_tile(const Slice& w, i64 panels, const Input& in, i64 token, const Output& to, i64 group) {
    const i64 units = T::BLOCKS ? w.columns / BLOCK : w.columns;
    for (int part = 0; part < PARTS; part++) {
        Vd totals[TOKENS];
        for (int t = 0; t < TOKENS; t++) totals[t] = load(to.at(token + t) + group * LANES + W * part);
        for (i64 panel = 0; panel < panels; panel++) {
            const Slice here{w.values + panel * units * T::bytes, w.scales + panel * units * scale_bytes<T>(), w.columns};
            Vf sums[TOKENS] = {};
            tile<T, TOKENS>(here, 0, part, Input{in.from, in.tokens, panel * w.columns}, token, sums);
            for (int t = 0; t < TOKENS; t++) totals[t] = add(totals[t], round_to_grid(sums[t]));
        }
        for (int t = 0; t < TOKENS; t++) store(to.at(token + t) + group * LANES + W * part, totals[t]);
    }
}

// Whole tiles of tokens on AMX; returns the first token that is left.
template <class T>
inline i64 panel_tiles(const Slice& w, i64 panels, const Input& in, const Output& to, i64 group, u8* scratch) {
#ifdef MPILLAMA_HAS_TILES
    const i64 blocks = w.columns / BLOCK, tokens = in.tokens / AMX_TOKENS * AMX_TOKENS;
    if (!T::BLOCKS || tokens == 0) return 0;
    if constexpr (T::BLOCKS) {
        const Tiles tiles;
        u8* const steps = scratch + AMX_PRODUCTS;
        for (i64 i = 0; i < panels * blocks; i++) T::signed_steps(w.values + i * T::bytes, steps + 512 * i);
        for (i64 token = 0; token < tokens; token += AMX_TOKENS) {
            for (i64 panel = 0; panel < panels; panel++) {
                const i64 at = Input{in.from, in.tokens, panel * w.columns}.place(token);
                Vf sums[AMX_TOKENS] = {};
                amx_sums<typename T::Scales>(steps + 512 * panel * blocks,
                                             w.scales + panel * blocks * T::Scales::bytes, blocks,
                                             in.from.values + BLOCK * at, in.from.scales + at, in.from.starts + at,
                                             scratch, sums);
                for (int t = 0; t < AMX_TOKENS; t++) {
                    double* row = to.at(token + t) + group * LANES;
                    store(row, add(load(row), round_to_grid(sums[t])));
                }
            }
        }
    }
    return tokens;
#else
    (void)w, (void)panels, (void)in, (void)to, (void)group, (void)scratch;
    return 0;
#endif
}

// Bytes of a thread's scratch that add_rows needs: one group's panels.
inline i64 row_scratch_bytes(const Matrix& m) {
    return m.groups == 0 ? 0 : steps_bytes(m) + m.panels * (panel_bytes(m) / m.groups + (m.columns / BLOCK) * MOST_SCALE_BYTES) + 2 * AHEAD;
}

// Add all panels of groups first:last times x[t]. A group's panels are brought together once, so that they stay in the
// cache while the tokens pass.
inline void add_rows(const Matrix& m, i64 expert, const Activations& x, i64 tokens, i64 first, i64 last, const Output& to,
                     u8* scratch) {
    with_type(m.type, [&](auto type) {
        using T = decltype(type);
        const i64 units = T::BLOCKS ? m.columns / BLOCK : m.columns;
        constexpr i64 scales_of_unit = scale_bytes<T>();
        u8* const scales = scratch + m.panels * units * T::bytes + AHEAD;
        u8* const steps = scales + m.panels * units * scales_of_unit;
        const Slice together{scratch, scales, m.columns};
        const Input in{x, tokens, 0};
        for (i64 group = first; group < last; group++) {
            for (i64 panel = 0; panel < m.panels; panel++) {
                const Slice from = slice<T>(m, expert, panel);
                const u8* run = from.values + group * units * T::bytes;
                std::memcpy(scratch + panel * units * T::bytes, run, units * T::bytes);
                prefetch_run(run + units * T::bytes, units * T::bytes);
                if constexpr (T::BLOCKS)
                    std::memcpy(scales + panel * units * scales_of_unit, from.scales + group * units * scales_of_unit,
                                units * scales_of_unit);
            }
            const i64 begin = panel_tiles<T>(together, m.panels, in, to, group, steps);
            for (i64 token = begin, count; token < tokens; token += count) {
                count = in.together(token);
                switch (count) {
                    case 8: panel_tile<T, 8>(together, m.panels, in, token, to, group); break;
                    case 4: panel_tile<T, 4>(together, m.panels, in, token, to, group); break;
                    case 2: panel_tile<T, 2>(together, m.panels, in, token, to, group); break;
                    default: panel_tile<T, 1>(together, m.panels, in, token, to, group);
                }
            }
        }
    });
}

}  // namespace mpillama
