// Attention to the blocks of positions that an index chooses (https://arxiv.org/abs/2606.13392).
//
// A position leaves one index key for all heads; a token has an index query for each KV head. A block scores what its best
// position does, a dot product of float32: channels in ascending order, one FMA each, a position as a lane. A token keeps
// `chosen` blocks: its own and those right before it (`local` together) whatever they score, then those that score
// highest; of equal ones the first. The heads of the KV head attend to what it keeps exactly as attention.h says, in the
// same spans, and no other keys and values are read. A token that sees no more than `chosen` blocks keeps all of them, and
// its bits are those of full attention.
//
// `block` is a multiple of 64 that divides 1,024, so that a block of the cache is kept whole or not, and lies in one span.
#pragma once
#include "layers.h"

namespace mpillama {

constexpr i64 TOKENS_SCORED = 16;  // whose index queries pass over a span of keys together

inline i64 blocks_seen(const BlockSparseLayer& layer, i64 position) { return position / layer.block + 1; }

// The most blocks that a token of the step sees; 0 if none must choose.
inline i64 blocks_to_choose_from(const BlockSparseLayer& layer, const Step& step) {
    i64 most = 0;
    TokenRange().for_each_segment(step, [&](i64, i64, i64 count, i64 start) {
        most = larger(most, blocks_seen(layer, start + count - 1));
    });
    return most > layer.chosen ? most : 0;
}

// What the index matrices make of the tokens, in step.latent: queries [tokens, kv_heads, channels], keys [tokens, channels].
struct BlockIndexRows {
    float *queries, *keys;

    BlockIndexRows(const BlockSparseLayer& layer, const Step& step)
        : queries(step.latent.x), keys(queries + step.tokens * layer.index_q.groups * LANES) {}
};

// Of each token and KV head: the scores of blocks, and which of them are kept. In memory that the threads share.
struct Choices {
    i64 heads, block, width;
    float* scores;
    u8* kept;

    Choices(Room& room, const BlockSparseLayer& layer, const Step& step)
        : heads(layer.attention.kv_heads), block(layer.block), width(blocks_to_choose_from(layer, step)),
          scores(room.take<float>(step.tokens * heads * width)), kept(room.take<u8>(step.tokens * heads * width)) {}

    i64 row(i64 token, i64 head) const { return (token * heads + head) * width; }

    // Whether a block of the cache is kept.
    bool keeps(i64 token, i64 head, i64 cached) const { return kept[row(token, head) + cached * POSITIONS / block] != 0; }

    bool keeps_some(i64 token, i64 head, i64 span) const {
        const i64 first = span * SPAN / block, last = smaller((span + 1) * SPAN / block, width);
        for (i64 b = first; b < last; b++)
            if (kept[row(token, head) + b] != 0) return true;
        return false;
    }
};

// Call `use` with the type of the index keys, which are float32 or float16.
template <class Use> inline void with_index_type(i64 number, Use use) {
    if (number == CachedF32::NUMBER) use(CachedF32());
    else use(CachedF16());
}

template <class Kv> inline CacheBlock<Kv> index_block(const BlockSparseLayer& layer, i64 block) {
    return CacheBlock<Kv>(reinterpret_cast<typename Kv::Number*>(layer.index_keys.values) +
                          block * layer.index_dim * POSITIONS);
}

inline void turn_index_head(const BlockSparseLayer& layer, const Step& step, i64 t, const float* norm, float* head) {
    const i64 half = step.rotary_half;
    rms_norm_row(head, norm, layer.index_dim, layer.index_channels, layer.attention.eps, head);
    rotate_head(head, step.cosines + t * half, step.sines + t * half, half);
}

// Norm and RoPE of index queries and keys in place; the keys go into the cache.
inline void prepare_index(const BlockSparseLayer& layer, const Step& step, i64 first_token, i64 last_token) {
    const BlockIndexRows rows(layer, step);
    const i64 heads = layer.attention.kv_heads, size = layer.index_dim;
    for (i64 t = first_token; t < last_token; t++) {
        for (i64 h = 0; h < heads; h++)
            turn_index_head(layer, step, t, layer.index_q_norm, rows.queries + (t * heads + h) * size);
        float* key = rows.keys + t * size;
        turn_index_head(layer, step, t, layer.index_k_norm, key);
        with_index_type(layer.index_keys.type, [&](auto type) {
            using Kv = decltype(type);
            store_key<Kv>(index_block<Kv>(layer, step.slots[t] / POSITIONS).keys, step.slots[t] % POSITIONS, key, size);
        });
    }
}

// The largest of 64 scores, of which those from `count` on are overwritten; no NaN.
inline float largest_score(float* scores, i64 count) {
    for (i64 i = count; i < POSITIONS; i++) scores[i] = -__builtin_inff();
    F32x16 most = splat16(-__builtin_inff());
    for (i64 p = 0; p < POSITIONS; p += LANES)
        most = lift<F32x16>([&](int i) {
            const Vf score = load(scores + p + W * i);
            return select(less(most.part[i], score), score, most.part[i]);
        });
    float lanes[LANES];
    store16(lanes, most);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i] < lanes[i + half] ? lanes[i + half] : lanes[i];
    return lanes[0];
}

// What the blocks of a span score for `tokens` tokens from `token` on, of which the first is at `position`.
template <class Kv>
inline void score_span(const BlockSparseLayer& layer, const Step& step, const Choices& choices, const i64* table,
                       i64 token, i64 tokens, i64 position, i64 span) {
    const i64 size = layer.index_dim, heads = choices.heads, rows = tokens * heads;
    const i64 last = smaller((span + 1) * SPAN_BLOCKS, (position + tokens - 1) / POSITIONS + 1);
    const float* queries = BlockIndexRows(layer, step).queries + token * heads * size;
    alignas(64) float dots[8 * POSITIONS];
    for (i64 b = span * SPAN_BLOCKS; b < last; b++) {
        const auto here = index_block<Kv>(layer, table[b]), next = index_block<Kv>(layer, table[smaller(b + 1, last - 1)]);
        for (i64 r = 0; r < rows;)
            r += rows_together(rows - r, [&](auto together) {
                float_scores<Kv, together.value>(here, r == 0 ? next : here, queries + r * size, size, dots);
                for (i64 i = r; i < r + together.value; i++) {
                    const i64 seen = smaller(position + i / heads + 1 - b * POSITIONS, POSITIONS);
                    if (seen <= 0) continue;
                    const float most = largest_score(dots + (i - r) * POSITIONS, seen);
                    float& score = choices.scores[choices.row(token + i / heads, i % heads) + b * POSITIONS / layer.block];
                    if (b * POSITIONS % layer.block == 0 || score < most) score = most;
                }
            });
    }
}

// Every threads-th span of the tokens that must choose.
inline void score_blocks(const Member& member, const BlockSparseLayer& layer, const Step& step, const Choices& choices) {
    i64 unit = 0;
    TokenRange().for_each_segment(step, [&](i64 s, i64 token, i64 count, i64 start) {
        const i64* table = step.tables + s * step.table_width;
        for (i64 t = larger(0, layer.chosen * layer.block - start); t < count; t += TOKENS_SCORED) {
            const i64 tokens = smaller(TOKENS_SCORED, count - t), position = start + t;
            for (i64 span = 0; span <= (position + tokens - 1) / SPAN; span++)
                if (unit++ % member.threads == member.thread)
                    with_index_type(layer.index_keys.type, [&](auto type) {
                        score_span<decltype(type)>(layer, step, choices, table, token + t, tokens, position, span);
                    });
        }
    });
}

// The blocks kept so far, the best first.
struct Best {
    float* scores;
    i64* blocks;

    Best(Room& room, i64 chosen) : scores(room.take<float>(chosen)), blocks(room.take<i64>(chosen)) {}
};

// Mark what a token keeps of the blocks up to its own.
inline void choose_blocks(const BlockSparseLayer& layer, i64 position, const Choices& choices, i64 row, const Best& best) {
    const i64 seen = blocks_seen(layer, position);
    u8* kept = choices.kept + row;
    std::memset(kept, 0, choices.width);
    if (seen <= layer.chosen) {
        std::memset(kept, 1, seen);
        return;
    }
    float* scores = choices.scores + row;
    for (i64 l = 0; l < layer.local; l++) scores[seen - 1 - l] = __builtin_inff();
    i64 count = 0;
    for (i64 b = 0; b < seen; b++) {
        if (count == layer.chosen && !(best.scores[count - 1] < scores[b])) continue;
        i64 at = count < layer.chosen ? count++ : count - 1;
        for (; at > 0 && best.scores[at - 1] < scores[b]; at--)
            best.scores[at] = best.scores[at - 1], best.blocks[at] = best.blocks[at - 1];
        best.scores[at] = scores[b], best.blocks[at] = b;
    }
    for (i64 i = 0; i < count; i++) kept[best.blocks[i]] = 1;
}

// Every threads-th token and KV head.
inline void choose_all(const Member& member, const BlockSparseLayer& layer, const Step& step, const Choices& choices) {
    Room room{member.scratch};
    const Best best(room, layer.chosen);
    TokenRange().for_each_segment(step, [&](i64, i64 token, i64 count, i64 start) {
        for (i64 i = 0; i < count * choices.heads; i++) {
            const i64 t = i / choices.heads, unit = token * choices.heads + i;
            if (unit % member.threads == member.thread)
                choose_blocks(layer, start + t, choices, choices.row(token + t, i % choices.heads), best);
        }
    });
}

// Which of a tile's rows see what.
struct TileChoices {
    const Choices& choices;
    const Tile& tile;

    bool keeps(i64 row, i64 cached) const { return choices.keeps(tile.token + row / tile.heads, tile.kv_head, cached); }
    bool keeps_some(i64 row, i64 span) const {
        return choices.keeps_some(tile.token + row / tile.heads, tile.kv_head, span);
    }
    // Whether some token keeps something of a span.
    bool reads(i64 span) const {
        for (i64 r = 0; r < tile.rows(); r += tile.heads)
            if (keeps_some(r, span)) return true;
        return false;
    }
    // The next block of the cache from `cached` on that some token keeps; `last` if there is none before that.
    i64 next(i64 cached, i64 last) const {
        for (; cached < last; cached++)
            for (i64 r = 0; r < tile.rows(); r += tile.heads)
                if (keeps(r, cached)) return cached;
        return last;
    }
};

// Attend the gathered rows of a tile over what they keep of one span.
template <class Kv>
inline void attend_kept(const AttentionLayer& layer, const TileChoices& choices, i64 span, const Workplace& place,
                        const TileSums& sums) {
    const Tile& tile = choices.tile;
    const i64 last = smaller((span + 1) * SPAN_BLOCKS, (tile.position + tile.tokens - 1) / POSITIONS + 1);
    sums.clear(tile.rows(), layer.head_dim);
    for (i64 b = choices.next(span * SPAN_BLOCKS, last); b < last;) {
        const i64 following = choices.next(b + 1, last);
        for (i64 r = 0; r < tile.rows(); r++) {
            const i64 seen = smaller(larger(tile.row_position(r) + 1 - b * POSITIONS, 0), POSITIONS);
            place.counts[r] = choices.keeps(r, b) ? seen : 0;
            place.hidden[r] = 0;
        }
        const i64 ahead = tile.table[following < last ? following : b];
        attend_block<Kv>({layer, tile.table[b], tile.kv_head}, {layer, ahead, tile.kv_head}, place, tile.rows(), layer, sums);
        b = following;
    }
}

// Add a span to the total of the spans before it, for the rows that keep something of it.
inline void combine_kept(const TileChoices& choices, i64 span, i64 head_dim, const TileSums& total, const TileSums& part) {
    for (i64 r = 0; r < choices.tile.rows(); r++)
        if (choices.keeps_some(r, span)) combine_span(total.row(r, head_dim), part.row(r, head_dim), head_dim);
}

// How many spans of all tiles are read at the most.
inline i64 spans_read(const BlockSparseLayer& layer, const Step& step) {
    i64 count = 0;
    for_each_tile(layer.attention, step,
                  [&](const Tile& tile) { count += smaller(tile.spans(), tile.tokens * layer.chosen); });
    return count;
}

// As attend_tiles of attention.h.
template <class Kv>
inline void attend_kept_tiles(const Member& member, const AttentionLayer& layer, const Step& step, const Choices& choices) {
    Room room{member.scratch};
    const Workplace place(room, most_rows(layer), layer.head_dim);
    i64 item = 0;
    for_each_tile(layer, step, [&](const Tile& tile) {
        if (item++ % member.threads != member.thread) return;
        const TileChoices kept{choices, tile};
        gather_rows<Kv>(layer, step, tile, place.queries);
        place.total.clear(tile.rows(), layer.head_dim);
        for (i64 span = tile.first_span; span < tile.last_span; span++) {
            if (!kept.reads(span)) continue;
            attend_kept<Kv>(layer, kept, span, place, place.part);
            combine_kept(kept, span, layer.head_dim, place.total, place.part);
        }
        scatter_rows(layer, step, tile, place.total);
    });
}

// As attend_spans of attention.h: only spans that are read are counted.
template <class Kv>
inline void attend_kept_spans(const Member& member, const AttentionLayer& layer, const Step& step, const Choices& choices,
                              const Sharing& sharing) {
    Room room{member.scratch};
    const Workplace place(room, most_rows(layer), layer.head_dim);
    i64 unit = 0, item = 0;
    for_each_tile(layer, step, [&](const Tile& tile) {
        const TileChoices kept{choices, tile};
        bool gathered = false;
        for (i64 span = tile.first_span; span < tile.last_span; span++) {
            if (!kept.reads(span) || unit++ % member.threads != member.thread) continue;
            if (!gathered) gather_rows<Kv>(layer, step, tile, place.queries);
            gathered = true;
            attend_kept<Kv>(layer, kept, span, place, span_sums(member, layer, sharing, unit - 1));
        }
    });
    member.barrier();
    unit = 0;
    for_each_tile(layer, step, [&](const Tile& tile) {
        const TileChoices kept{choices, tile};
        const bool own = item++ % member.threads == member.thread;
        if (own) place.total.clear(tile.rows(), layer.head_dim);
        for (i64 span = tile.first_span; span < tile.last_span; span++) {
            if (!kept.reads(span)) continue;
            const TileSums part = span_sums(member, layer, sharing, unit++);
            if (own) combine_kept(kept, span, layer.head_dim, place.total, part);
        }
        if (own) scatter_rows(layer, step, tile, place.total);
    });
}

inline i64 block_sparse_scratch_bytes(const BlockSparseLayer& layer) {
    Room room{nullptr};
    Best(room, layer.chosen);
    const i64 products = larger(product_scratch_bytes(layer.index_q), product_scratch_bytes(layer.index_k));
    return larger(larger(room.used, products), attention_half_scratch_bytes(layer.attention));
}

inline i64 block_sparse_shared_bytes(const BlockSparseLayer& layer, const Step& step, i64 threads) {
    if (blocks_to_choose_from(layer, step) == 0) return attention_shared_bytes(layer.attention, step, threads);
    const Sharing sharing(layer.attention, step, threads);
    Room room{nullptr}, sums{nullptr};
    Choices(room, layer, step);
    TileSums(sums, sharing.rows, layer.attention.head_dim);
    return room.used + (sharing.by_span ? spans_read(layer, step) * sums.used : 0);
}

// Choose, and attend to what is chosen.
inline void attend_blocks(const Member& member, const BlockSparseLayer& layer, const Step& step) {
    const Sharing sharing(layer.attention, step, member.threads);
    Room room{member.shared};
    const Choices choices(room, layer, step);
    score_blocks(member, layer, step, choices);
    member.barrier();
    choose_all(member, layer, step, choices);
    member.barrier();
    Member beside = member;
    beside.shared += room.used;
    with_cache_type(layer.attention.cache.type, [&](auto type) {
        using Kv = decltype(type);
        if (sharing.by_span) attend_kept_spans<Kv>(beside, layer.attention, step, choices, sharing);
        else attend_kept_tiles<Kv>(beside, layer.attention, step, choices);
    });
}

inline void block_sparse_half(const Member& member, const BlockSparseLayer& layer, const Step& step) {
    const i64 tokens = step.tokens, first = member.first(tokens), last = member.last(tokens);
    const BlockIndexRows rows(layer, step);
    project(member, layer.attention, step);
    column_part(member, layer.index_q, step.hidden, tokens, rows.queries, step.in_flight);
    column_part(member, layer.index_k, step.hidden, tokens, rows.keys, step.in_flight);
    member.did(Part::QKV);
    rotate_and_store(layer.attention, step, first, last);
    member.did(Part::ROPE);
    member.barrier();
    prepare_index(layer, step, first, last);
    member.did(Part::ROPE);
    member.barrier();
    if (blocks_to_choose_from(layer, step) > 0) attend_blocks(member, layer, step);
    else attend(member, layer.attention, step);
    member.did(Part::ATTENTION);
    member.barrier();
    project_attended(member, layer.attention, step);
}

}  // namespace mpillama
