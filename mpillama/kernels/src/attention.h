// Causal attention over the KV cache: online softmax in fixed blocks of 64 positions.
//
// Blocks go in ascending order within spans of 1,024 positions; spans are combined in ascending order. Both sizes are
// constants of the arithmetic: the bits do not depend on threads, chunking or other sequences. (Online softmax:
// https://arxiv.org/abs/1805.02867.)
#pragma once
#include "attention_plan.h"
#include "elementwise.h"

#include <type_traits>

namespace mpillama {

// Copy the query rows of a tile, scaled (in float64, rounded once) and, for scaled caches, transformed as they are and quantised.
template <class Kv>
inline void gather_rows(const AttentionLayer& layer, const Step& step, const Tile& tile, const Queries& to) {
    const i64 size = layer.head_dim;
    for (i64 t = 0; t < tile.tokens; t++) {
        const float* q = step.q + ((tile.token + t) * layer.heads + tile.first_head) * size;
        float* x = to.x + t * tile.heads * size;
        for (i64 i = 0; i < tile.heads * size; i++) x[i] = static_cast<float>(q[i] * layer.scale);
    }
    if constexpr (Kv::SCALED)
        for (i64 i = 0; i < tile.rows() * size / BLOCK; i++) {
            if constexpr (Kv::HADAMARD) hadamard(to.x + BLOCK * i, SEEN_FACTOR);
            quantise_block(to.x + BLOCK * i, to.values + BLOCK * i, to.scales + i, to.starts + i);
        }
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

// Call `use` with how many of `count` rows go together: 8, 4, 2 or 1. Returns that number.
template <class Use> inline i64 rows_together(i64 count, Use use) {
    if (count >= 8) return use(std::integral_constant<int, 8>()), 8;
    if (count >= 4) return use(std::integral_constant<int, 4>()), 4;
    if (count >= 2) return use(std::integral_constant<int, 2>()), 2;
    return use(std::integral_constant<int, 1>()), 1;
}

// Let `rows` query rows see one cache block; `next` is the block that comes after, which the first rows ask for.
template <class Kv>
inline void attend_block(CacheBlock<Kv> here, CacheBlock<Kv> next, const Workplace& place, i64 rows,
                         const AttentionLayer& layer, const TileSums& sums) {
    const i64 head_dim = layer.head_dim;
    const CacheBlock<Kv>* ahead = &next;
    for (i64 r = 0; r < rows; ahead = &here)
        r += rows_together(rows - r, [&](auto together) {
            float* out = place.scores + r * POSITIONS;
            scores<Kv, together.value>(here, *ahead, place.queries.from(r, head_dim), head_dim, out);
        });
    const auto sees = [&](i64 r) { return place.counts[r] > place.hidden[r]; };
    for (i64 r = 0; r < rows; r++)
        if (sees(r)) {
            const RowSums row = sums.row(r, head_dim);
            float* weights = place.scores + r * POSITIONS;
            if (layer.soft_cap > 0.0) soft_cap(weights, static_cast<float>(layer.soft_cap), POSITIONS);
            softmax_block(weights, place.hidden[r], place.counts[r], row.largest, row.sums, row.out, head_dim);
        }
    ahead = &next;
    for (i64 r = 0; r < rows;) {
        i64 count = 0;
        while (count < 8 && r + count < rows && sees(r + count)) count++;
        if (count == 0) {
            r++;
            continue;
        }
        r += rows_together(count, [&](auto together) {
            add_values_of_rows<Kv, together.value>(here, *ahead, place, r, head_dim, sums.out);
        });
        ahead = &here;
    }
}

// Attend the gathered rows of a tile over one span.
template <class Kv>
inline void attend_span(const AttentionLayer& layer, const Tile& tile, i64 span, const Workplace& place,
                        const TileSums& sums) {
    const i64 rows = tile.rows(), blocks = (tile.position + tile.tokens - 1) / POSITIONS + 1;
    const i64 seen = first_seen(layer, tile.position) / POSITIONS;
    sums.clear(rows, layer.head_dim);
    for (i64 b = larger(span * SPAN_BLOCKS, seen); b < smaller((span + 1) * SPAN_BLOCKS, blocks); b++) {
        for (i64 r = 0; r < rows; r++) {
            const i64 position = tile.row_position(r), start = b * POSITIONS;
            place.counts[r] = smaller(larger(position + 1 - start, 0), POSITIONS);
            place.hidden[r] = smaller(larger(first_seen(layer, position) - start, 0), POSITIONS);
        }
        const i64 block = tile.table[b], following = tile.table[smaller(b + 1, blocks - 1)];
        attend_block<Kv>({layer, block, tile.kv_head}, {layer, following, tile.kv_head}, place, rows, layer, sums);
    }
}

// Add a span to the total of the spans before it, for the rows that see it.
inline void combine(const Tile& tile, i64 span, i64 head_dim, const TileSums& total, const TileSums& part) {
    for (i64 r = 0; r < tile.rows(); r++)
        if (tile.row_position(r) >= span * SPAN)
            combine_span(total.row(r, head_dim), part.row(r, head_dim), head_dim);
}

// Divide by the sums and write the rows to their tokens and heads, transformed back if values are transformed, gated if
// heads are, quantised too if a matrix of blocks follows.
inline void scatter_rows(const AttentionLayer& layer, const Step& step, const Tile& tile, const TileSums& total) {
    const bool quantised = has_blocks(layer.o.type);
    const i64 blocks = layer.head_dim / BLOCK;
    for (i64 r = 0; r < tile.rows(); r++) {
        const i64 token = tile.token + r / tile.heads, head = tile.first_head + r % tile.heads;
        float* out = step.context.x + token * step.context.columns + head * layer.head_dim;
        if (layer.sinks != nullptr) add_sink(total.row(r, layer.head_dim), layer.sinks[head], layer.head_dim);
        finish_row(total.row(r, layer.head_dim), layer.head_dim, out);
        for (i64 i = 0; has_hadamard(layer.cache.type) && i < blocks; i++) hadamard(out + BLOCK * i, SEEN_FACTOR);
        if (layer.gate.groups > 0)
            multiply_by_sigmoid(out, step.latent.x + (token * layer.heads + head) * layer.head_dim, layer.head_dim);
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
        for (i64 i = 0; i < tile.spans(); i++) {
            const TileSums part = span_sums(member, layer, sharing, first + i);
            combine(tile, tile.first_span + i, layer.head_dim, place.total, part);
        }
        scatter_rows(layer, step, tile, place.total);
    });
}

// context[t, h] = softmax over the positions up to t's own of (q . k * scale), times v; and its quantised form. With a
// `window` > 0 a token sees that many positions only, its own the last of them, with a `chunk` > 0 those from the last
// multiple of it on. Called by all threads of a region.
inline void attend(const Member& member, const AttentionLayer& layer, const Step& step) {
    const Sharing sharing(layer, step, member.threads);
    with_cache_type(layer.cache.type, [&](auto type) {
        if (sharing.by_span) attend_spans<decltype(type)>(member, layer, step, sharing);
        else attend_tiles<decltype(type)>(member, layer, step);
    });
}

}  // namespace mpillama
