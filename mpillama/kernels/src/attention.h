// Causal attention over the KV cache: online softmax in fixed blocks of 64 positions.
//
// Blocks go in ascending order within spans of 1,024 positions; spans are combined in ascending order. Both sizes are
// constants of the arithmetic: the bits do not depend on threads, chunking or other sequences. (Online softmax:
// https://arxiv.org/abs/1805.02867.)
#pragma once
#include "attention_tiles.h"
#include "team.h"

namespace mpillama {

constexpr i64 SPAN_BLOCKS = 16;  // blocks of a span; spans may be computed apart
constexpr i64 TILE_ROWS = 16;    // most query rows that pass over the cache together, but for a token's heads

inline i64 smaller(i64 x, i64 y) { return x < y ? x : y; }
inline i64 larger(i64 x, i64 y) { return x > y ? x : y; }

// Query rows that pass over the cache together: some tokens of a segment with the heads that share a KV head. Its
// spans are first_span : last_span, those before lie outside the window of all rows.
struct Tile {
    const i64* table;
    i64 kv_head, first_head, heads, token, tokens, position, first_span, last_span;

    i64 rows() const { return heads * tokens; }
    i64 spans() const { return last_span - first_span; }
    i64 row_position(i64 row) const { return position + row / heads; }
};

// Call `use` with every tile of a step, in the same order for every thread.
template <class Use> inline void for_each_tile(const AttentionLayer& layer, const Step& step, Use use) {
    for (i64 s = 0; s < step.segment_count; s++) {
        const i64 *segment = step.segments + 3 * s, *table = step.tables + s * step.table_width;
        for (i64 kv_head = 0; kv_head < layer.kv_heads; kv_head++) {
            const i64 first_head = layer.head_start[kv_head], heads = layer.head_start[kv_head + 1] - first_head;
            if (heads == 0) continue;
            const i64 most = larger(1, TILE_ROWS / heads);
            for (i64 first = 0; first < segment[1]; first += most) {
                const i64 tokens = smaller(most, segment[1] - first), position = segment[2] + first;
                const i64 seen = layer.window > 0 ? larger(0, position + 1 - layer.window) : 0, span = SPAN_BLOCKS * POSITIONS;
                use(Tile{table, kv_head, first_head, heads, segment[0] + first, tokens, position, seen / span,
                         (position + tokens - 1) / span + 1});
            }
        }
    }
}

// How the threads share a step: tiles, or the tiles' spans where there are few tiles and any has several.
struct Sharing {
    i64 tiles = 0, spans = 0, rows = 0;
    bool by_span;

    Sharing(const AttentionLayer& layer, const Step& step, i64 threads) {
        for_each_tile(layer, step, [&](const Tile& tile) {
            tiles++;
            spans += tile.spans();
            rows = larger(rows, tile.rows());
        });
        const bool few = tiles < 2 * threads || (tiles < 4 * threads && tiles % threads != 0);
        by_span = threads > 1 && few && spans > tiles;
    }
};

// Memory handed out piece by piece, in cache lines; without memory it only counts.
struct Room {
    u8* memory;
    i64 used = 0;

    template <class T> T* take(i64 count) {
        T* piece = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
        used += (count * static_cast<i64>(sizeof(T)) + 63) / 64 * 64;
        return piece;
    }
};

// `largest` [rows], sums [rows, 16], out [rows, head_dim].
struct TileSums {
    float *largest, *sums, *out;

    TileSums(Room& room, i64 rows, i64 head_dim)
        : largest(room.take<float>(rows)), sums(room.take<float>(rows * LANES)), out(room.take<float>(rows * head_dim)) {}

    RowSums row(i64 r, i64 head_dim) const { return {largest + r, sums + r * LANES, out + r * head_dim}; }

    void clear(i64 rows, i64 head_dim) const {
        for (i64 r = 0; r < rows; r++) largest[r] = FAR_BELOW;
        for (i64 i = 0; i < rows * LANES; i++) sums[i] = 0.0f;
        for (i64 i = 0; i < rows * head_dim; i++) out[i] = 0.0f;
    }
};

// What a thread works with: the query rows of a tile, their scores [rows, 64], and which positions of a block each sees:
// its first counts[row] but the first hidden[row].
struct Workplace {
    Queries queries;
    TileSums part, total;
    float* scores;
    i64 *counts, *hidden;

    Workplace(Room& room, i64 rows, i64 head_dim)
        : queries{room.take<float>(rows * head_dim), room.take<i8>(rows * head_dim),
                  room.take<float>(rows * head_dim / BLOCK), room.take<i32>(rows * head_dim / BLOCK)},
          part(room, rows, head_dim), total(room, rows, head_dim), scores(room.take<float>(rows * POSITIONS)),
          counts(room.take<i64>(rows)), hidden(room.take<i64>(rows)) {}
};

// The most query rows of a tile: a single token may have more heads on a KV head than TILE_ROWS.
inline i64 most_rows(const AttentionLayer& layer) {
    i64 most = TILE_ROWS;
    for (i64 i = 0; i < layer.kv_heads; i++) most = larger(most, layer.head_start[i + 1] - layer.head_start[i]);
    return most;
}

inline i64 attention_scratch_bytes(const AttentionLayer& layer) {
    Room room{nullptr};
    Workplace(room, most_rows(layer), layer.head_dim);
    return room.used;
}

inline i64 attention_shared_bytes(const AttentionLayer& layer, const Step& step, i64 threads) {
    const Sharing sharing(layer, step, threads);
    Room room{nullptr};
    TileSums(room, sharing.rows, layer.head_dim);
    return sharing.by_span ? sharing.spans * room.used : 0;
}

// What the threads leave of a span for the combination.
inline TileSums span_sums(const Member& member, const AttentionLayer& layer, const Sharing& sharing, i64 unit) {
    Room size{nullptr};
    TileSums(size, sharing.rows, layer.head_dim);
    Room room{member.shared + unit * size.used};
    return TileSums(room, sharing.rows, layer.head_dim);
}

// Copy the query rows of a tile, scaled (in float64, rounded once) and, for scaled caches, quantised.
template <class Kv>
inline void gather_rows(const AttentionLayer& layer, const Step& step, const Tile& tile, const Queries& to) {
    const i64 size = layer.head_dim;
    for (i64 t = 0; t < tile.tokens; t++) {
        const float* q = step.q + ((tile.token + t) * layer.heads + tile.first_head) * size;
        float* x = to.x + t * tile.heads * size;
        for (i64 i = 0; i < tile.heads * size; i++) x[i] = static_cast<float>(q[i] * layer.scale);
    }
    if constexpr (Kv::SCALED)
        for (i64 i = 0; i < tile.rows() * size / BLOCK; i++)
            quantise_block(to.x + BLOCK * i, to.values + BLOCK * i, to.scales + i, to.starts + i);
}

// Rows r : r + ROWS, all of which see something of the block: the positions that all of them see, then each its others.
template <class Kv, int ROWS>
inline void add_values_of_rows(const CacheBlock<Kv>& here, const CacheBlock<Kv>& next, const Workplace& place, i64 r,
                               i64 head_dim, float* out) {
    i64 common = place.counts[r];
    for (i64 i = 1; i < ROWS; i++) common = smaller(common, place.counts[r + i]);
    add_values<Kv, ROWS>(here, next, place.scores + r * POSITIONS, 0, common, head_dim, out + r * head_dim);
    for (i64 i = r; i < r + ROWS; i++)
        if (place.counts[i] > common)
            add_values<Kv, 1>(here, here, place.scores + i * POSITIONS, common, place.counts[i], head_dim,
                              out + i * head_dim);
}

// Let `rows` query rows see one cache block; `next` is the block that comes after, which the first rows ask for.
template <class Kv>
inline void attend_block(CacheBlock<Kv> here, CacheBlock<Kv> next, const Workplace& place, i64 rows, i64 head_dim,
                         const TileSums& sums) {
    const CacheBlock<Kv>* ahead = &next;
    for (i64 r = 0, width; r < rows; r += width, ahead = &here) {
        const Queries q = place.queries.from(r, head_dim);
        float* out = place.scores + r * POSITIONS;
        width = rows - r >= 8 ? 8 : rows - r >= 4 ? 4 : 1;
        if (width == 8) scores<Kv, 8>(here, *ahead, q, head_dim, out);
        else if (width == 4) scores<Kv, 4>(here, *ahead, q, head_dim, out);
        else scores<Kv, 1>(here, *ahead, q, head_dim, out);
    }
    const auto sees = [&](i64 r) { return place.counts[r] > place.hidden[r]; };
    for (i64 r = 0; r < rows; r++)
        if (sees(r)) {
            const RowSums row = sums.row(r, head_dim);
            softmax_block(place.scores + r * POSITIONS, place.hidden[r], place.counts[r], row.largest, row.sums, row.out,
                          head_dim);
        }
    ahead = &next;
    for (i64 r = 0; r < rows;) {
        i64 together = 0;
        while (together < 8 && r + together < rows && sees(r + together)) together++;
        if (together == 8) add_values_of_rows<Kv, 8>(here, *ahead, place, r, head_dim, sums.out);
        else if (together >= 4) add_values_of_rows<Kv, 4>(here, *ahead, place, r, head_dim, sums.out);
        else if (together > 0) add_values_of_rows<Kv, 1>(here, *ahead, place, r, head_dim, sums.out);
        if (together > 0) ahead = &here;
        r += together == 8 ? 8 : together >= 4 ? 4 : 1;
    }
}

// Attend the gathered rows of a tile over one span.
template <class Kv>
inline void attend_span(const AttentionLayer& layer, const Tile& tile, i64 span, const Workplace& place,
                        const TileSums& sums) {
    const i64 rows = tile.rows(), blocks = (tile.position + tile.tokens - 1) / POSITIONS + 1, window = layer.window;
    const i64 seen = window > 0 ? larger(0, tile.position + 1 - window) / POSITIONS : 0;
    sums.clear(rows, layer.head_dim);
    for (i64 b = larger(span * SPAN_BLOCKS, seen); b < smaller((span + 1) * SPAN_BLOCKS, blocks); b++) {
        for (i64 r = 0; r < rows; r++) {
            const i64 count = tile.row_position(r) + 1 - b * POSITIONS;
            place.counts[r] = smaller(larger(count, 0), POSITIONS);
            place.hidden[r] = window > 0 ? smaller(larger(count - window, 0), POSITIONS) : 0;
        }
        const i64 block = tile.table[b], following = tile.table[smaller(b + 1, blocks - 1)];
        attend_block<Kv>({layer, block, tile.kv_head}, {layer, following, tile.kv_head}, place, rows, layer.head_dim, sums);
    }
}

// Add a span to the total of the spans before it, for the rows that see it.
inline void combine(const Tile& tile, i64 span, i64 head_dim, const TileSums& total, const TileSums& part) {
    for (i64 r = 0; r < tile.rows(); r++)
        if (tile.row_position(r) >= span * SPAN_BLOCKS * POSITIONS)
            combine_span(total.row(r, head_dim), part.row(r, head_dim), head_dim);
}

// Divide by the sums and write the rows to their tokens and heads, quantised too if a matrix of blocks follows.
inline void scatter_rows(const AttentionLayer& layer, const Step& step, const Tile& tile, const TileSums& total) {
    const bool quantised = has_blocks(layer.o.type);
    const i64 blocks = layer.head_dim / BLOCK;
    for (i64 r = 0; r < tile.rows(); r++) {
        const i64 token = tile.token + r / tile.heads, head = tile.first_head + r % tile.heads;
        float* out = step.context.x + token * step.context.columns + head * layer.head_dim;
        finish_row(total.row(r, layer.head_dim), layer.head_dim, out);
        if (quantised) quantise_blocks(out, blocks, step.context, step.tokens, token, head * blocks);
    }
}

// Every threads-th tile from start to end.
template <class Kv> inline void attend_tiles(const Member& member, const AttentionLayer& layer, const Step& step) {
    Room room{member.scratch};
    const Workplace place(room, most_rows(layer), layer.head_dim);
    i64 item = 0;
    for_each_tile(layer, step, [&](const Tile& tile) {
        if (item++ % member.threads != member.thread) return;
        gather_rows<Kv>(layer, step, tile, place.queries);
        place.total.clear(tile.rows(), layer.head_dim);
        for (i64 span = tile.first_span; span < tile.last_span; span++) {
            attend_span<Kv>(layer, tile, span, place, place.part);
            combine(tile, span, layer.head_dim, place.total, place.part);
        }
        scatter_rows(layer, step, tile, place.total);
    });
}

// Every threads-th span of all tiles; when all are done, every threads-th tile: its spans in ascending order.
template <class Kv>
inline void attend_spans(const Member& member, const AttentionLayer& layer, const Step& step, const Sharing& sharing) {
    Room room{member.scratch};
    const Workplace place(room, most_rows(layer), layer.head_dim);
    i64 unit = 0, item = 0;
    for_each_tile(layer, step, [&](const Tile& tile) {
        bool gathered = false;
        for (i64 span = tile.first_span; span < tile.last_span; span++) {
            if (unit++ % member.threads != member.thread) continue;
            if (!gathered) gather_rows<Kv>(layer, step, tile, place.queries);
            gathered = true;
            attend_span<Kv>(layer, tile, span, place, span_sums(member, layer, sharing, unit - 1));
        }
    });
    member.barrier();
    unit = 0;
    for_each_tile(layer, step, [&](const Tile& tile) {
        const i64 first = unit;
        unit += tile.spans();
        if (item++ % member.threads != member.thread) return;
        place.total.clear(tile.rows(), layer.head_dim);
        for (i64 i = 0; i < tile.spans(); i++)
            combine(tile, tile.first_span + i, layer.head_dim, place.total, span_sums(member, layer, sharing, first + i));
        scatter_rows(layer, step, tile, place.total);
    });
}

// context[t, h] = softmax over the positions up to t's own of (q . k * scale), times v; and its quantised form. With a
// `window` > 0 a token sees that many positions only, its own the last of them. Called by all threads of a region.
inline void attend(const Member& member, const AttentionLayer& layer, const Step& step) {
    const Sharing sharing(layer, step, member.threads);
    with_cache_type(layer.cache.type, [&](auto type) {
        if (sharing.by_span) attend_spans<decltype(type)>(member, layer, step, sharing);
        else attend_tiles<decltype(type)>(member, layer, step);
    });
}

}  // namespace mpillama
