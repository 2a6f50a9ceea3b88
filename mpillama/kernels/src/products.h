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
    ScaleArrays scales;
    i64 columns;
};

// Panel `panel` of expert `expert`.
template <class T> inline Slice slice(const Matrix& m, i64 expert, i64 panel) {
    const i64 units = T::BLOCKS ? m.columns / BLOCK : m.columns, groups = (expert * m.panels + panel) * m.groups;
    const ScaleArrays scales{m.scales, m.supers, m.super_columns / BLOCK};
    if constexpr (T::BLOCKS)
        return {m.values + groups * units * T::bytes, scales.from<typename T::Scales>(groups * units), m.columns};
    else
        return {m.values + groups * units * T::bytes, scales, m.columns};
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
        const i64 blocks = w.columns / BLOCK, width = in.width();
        const InputBlocks x = in.blocks(token);
        const u8* values = w.values + group * blocks * T::bytes;
        ScalePlace<typename T::Scales> scales(w.scales, group * blocks);
        for (i64 i = 0; i < blocks; i++, scales.advance()) {
            if (part == 0) prefetch_run(values + i * T::bytes + AHEAD, T::bytes);
            const BlockPart<T> rows(values + i * T::bytes, scales, part);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; t++) sums[t] = rows.add(x[i * width + t], sums[t]);
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

// `w` has the panels of one group, each in the place of a group.
template <class T, int TOKENS>
inline void panel_tile(const Slice& w, i64 panels, const Input& in, i64 token, const Output& to, i64 group) {
    for (int part = 0; part < PARTS; part++) {
        Vd totals[TOKENS];
        for (int t = 0; t < TOKENS; t++) totals[t] = load(to.at(token + t) + group * LANES + W * part);
        for (i64 panel = 0; panel < panels; panel++) {
            Vf sums[TOKENS] = {};
            tile<T, TOKENS>(w, panel, part, Input{in.from, in.tokens, panel * w.columns}, token, sums);
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
        using Scales = typename T::Scales;
        const Tiles tiles(Scales::HALVES);
        u8* const steps = scratch + AMX_PRODUCTS;
        for (i64 i = 0; i < panels * blocks; i++) T::signed_steps(w.values + i * T::bytes, steps + 512 * i);
        for (i64 token = 0; token < tokens; token += AMX_TOKENS) {
            for (i64 panel = 0; panel < panels; panel++) {
                const InputBlocks x = Input{in.from, in.tokens, panel * w.columns}.blocks(token);
                Vf sums[AMX_TOKENS] = {};
                amx_sums<Scales>(steps + 512 * panel * blocks, {w.scales, panel * blocks}, blocks, x, scratch, sums);
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

// Bytes of a panel's group: its values, its scales, and what several blocks have in common.
struct PanelGroup {
    i64 values, scales, supers;

    template <class T> static PanelGroup of(const Matrix& m) {
        const i64 units = T::BLOCKS ? m.columns / BLOCK : m.columns;
        const i64 supers = super_bytes<T>() > 0 ? m.columns / m.super_columns * super_bytes<T>() : 0;
        return {units * T::bytes, units * scale_bytes<T>(), supers};
    }
    i64 all() const { return values + scales + supers; }
};

// Bytes of a thread's scratch that add_rows needs: one group's panels.
inline i64 row_scratch_bytes(const Matrix& m) {
    i64 panel = 0;
    with_type(m.type, [&](auto type) { panel = PanelGroup::of<decltype(type)>(m).all(); });
    return steps_bytes(m) + m.panels * panel + 2 * AHEAD;
}

// Add all panels of groups first:last times x[t]. A group's panels are brought together once, so that they stay in the
// cache while the tokens pass.
inline void add_rows(const Matrix& m, i64 expert, const Activations& x, i64 tokens, i64 first, i64 last, const Output& to,
                     u8* scratch) {
    with_type(m.type, [&](auto type) {
        using T = decltype(type);
        const PanelGroup bytes = PanelGroup::of<T>(m);
        u8* const scales = scratch + m.panels * bytes.values + AHEAD;
        u8* const supers = scales + m.panels * bytes.scales;
        u8* const steps = supers + m.panels * bytes.supers;
        const Slice together{scratch, {scales, supers, m.super_columns / BLOCK}, m.columns};
        const Input in{x, tokens, 0};
        for (i64 group = first; group < last; group++) {
            for (i64 panel = 0; panel < m.panels; panel++) {
                const Slice from = slice<T>(m, expert, panel);
                const u8* run = from.values + group * bytes.values;
                std::memcpy(scratch + panel * bytes.values, run, bytes.values);
                prefetch_run(run + bytes.values, bytes.values);
                if constexpr (scale_bytes<T>() > 0)
                    std::memcpy(scales + panel * bytes.scales, from.scales.scales + group * bytes.scales, bytes.scales);
                if constexpr (super_bytes<T>() > 0)
                    std::memcpy(supers + panel * bytes.supers, from.scales.supers + group * bytes.supers, bytes.supers);
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
