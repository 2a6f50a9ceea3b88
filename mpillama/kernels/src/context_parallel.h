// Attention where each rank holds some positions of the cache, for all heads.
//
// Pieces of 16 blocks of a sequence lie on one rank each. A rank attends with the queries of all heads over the spans
// that lie in its own pieces, and sends each rank the records (sums of weights, largest score, weighted values) of that
// rank's heads. A rank combines the records of its own heads in ascending order of spans, as one rank would: these are
// the same operations on the same numbers, so the bits do not depend on who holds what.
#pragma once
#include "attention.h"
#include "latent_attention.h"
#include "latent_layer.h"
#include "rope.h"

namespace mpillama {

constexpr i64 PIECE_BLOCKS = 16;
static_assert(PIECE_BLOCKS % SPAN_BLOCKS == 0 && PIECE_BLOCKS % LATENT_SPAN_BLOCKS == 0, "a span lies on one rank");

// Records that come before those of a token, among those that a rank has for the tokens of this round.
inline i64 spans_before(const Pieces& pieces, i64 rank, i64 token) {
    const i64* counts = pieces.counts + rank * (pieces.tokens + 1);
    return counts[token] - counts[pieces.first];
}

inline i64 spans_of(const Pieces& pieces, i64 rank) { return spans_before(pieces, rank, pieces.last); }

template <i64 BLOCKS> inline i64 owner_of(const Pieces& pieces, i64 segment, i64 span) {
    return pieces.owners[segment * pieces.owner_width + span * BLOCKS / PIECE_BLOCKS];
}

// Where the record of a head (of all) goes for the k-th of this rank's spans that a token sees; `size` floats each.
inline float* record_to_send(const Pieces& pieces, i64 token, i64 k, i64 head, i64 size) {
    i64 to = 0;
    while (head >= pieces.head_start[to + 1]) to++;
    const i64 first = pieces.head_start[to], heads = pieces.head_start[to + 1] - first;
    const i64 before = spans_of(pieces, pieces.rank) * first;
    return pieces.sent + size * (before + (spans_before(pieces, pieces.rank, token) + k) * heads + head - first);
}

// Where the record of one of this rank's `heads` is for the k-th of the spans of rank `from` that a token sees.
inline float* received_record(const Pieces& pieces, i64 from, i64 token, i64 k, i64 head, i64 heads, i64 size) {
    const i64 before = pieces.received_before[from] + spans_before(pieces, from, token) + k;
    return pieces.received + size * (before * heads + head);
}

// -- grouped queries: a record is out [head_dim], sums [16], largest -------------------------------------------------

inline i64 record_floats(const AttentionLayer& layer) { return layer.head_dim + LANES + 1; }

inline RowSums in_record(float* record, i64 head_dim) {
    return {record + head_dim + LANES, record + head_dim, record};
}

// Of tokens first : last what all ranks need: queries, and the keys and values of some of this rank's KV heads.
inline void rotate_to_message(const AttentionLayer& layer, const Step& step, i64 first, i64 last, i64 first_kv,
                              i64 kv_count, float* out) {
    const i64 queries = layer.heads * layer.head_dim, all = layer.kv_heads * layer.head_dim;
    const i64 from = first_kv * layer.head_dim, keys = kv_count * layer.head_dim;
    for (i64 t = first; t < last; t++) {
        rotate_token(layer, step, t);
        float* to = out + t * (queries + 2 * keys);
        std::memcpy(to, step.q + t * queries, queries * sizeof(float));
        std::memcpy(to + queries, step.k + t * all + from, keys * sizeof(float));
        std::memcpy(to + queries + keys, step.v + t * all + from, keys * sizeof(float));
    }
}

// Keys and values of this rank's positions into the cache; `layer` has the heads of all ranks.
inline void store_pieces(const Member& member, const AttentionLayer& layer, const Step& step, const Pieces& pieces) {
    Step whole = step;
    whole.k = pieces.keys, whole.v = pieces.values;
    for (i64 t = member.first(step.tokens); t < member.last(step.tokens); t++)
        if (step.slots[t] >= 0) store_token(layer, whole, t);
}

// The records of this rank's spans for the queries of all heads, which `layer` has: every threads-th span.
inline void attend_pieces(const Member& member, const AttentionLayer& layer, const Step& step, const Pieces& pieces) {
    if (pieces.first == 0) {
        store_pieces(member, layer, step, pieces);
        member.did(Part::ROPE);
        member.barrier();
    }
    Room room{member.scratch};
    const Workplace place(room, most_rows(layer), layer.head_dim);
    const i64 size = record_floats(layer), head_dim = layer.head_dim;
    Step whole = step;
    whole.q = pieces.queries;
    i64 unit = 0;
    const auto owned = [&](const Tile& tile, i64 from, i64 to) {
        i64 count = 0;
        for (i64 span = from; span < to; span++)
            count += owner_of<SPAN_BLOCKS>(pieces, tile.segment, span) == pieces.rank;
        return count;
    };
    with_cache_type(layer.cache.type, [&](auto type) {
        using Kv = decltype(type);
        for_each_tile(layer, whole, [&](const Tile& tile) {
            bool gathered = false;
            i64 found = 0;
            for (i64 span = tile.first_span; span < tile.last_span; span++) {
                if (owner_of<SPAN_BLOCKS>(pieces, tile.segment, span) != pieces.rank) continue;
                const i64 number = found++;
                if (unit++ % member.threads != member.thread) continue;
                if (!gathered) gather_rows<Kv>(layer, whole, tile, place.queries);
                gathered = true;
                attend_span<Kv>(layer, tile, span, place, place.part);
                for (i64 r = 0; r < tile.rows(); r++) {
                    const i64 position = tile.row_position(r), first = first_seen(layer, position) / SPAN;
                    if (span < first || position < span * SPAN) continue;
                    const i64 k = number - owned(tile, tile.first_span, first), head = tile.first_head + r % tile.heads;
                    float* record = record_to_send(pieces, tile.token + r / tile.heads, k, head, size);
                    const RowSums from = place.part.row(r, head_dim), to = in_record(record, head_dim);
                    std::memcpy(to.out, from.out, head_dim * sizeof(float));
                    std::memcpy(to.sums, from.sums, LANES * sizeof(float));
                    *to.largest = *from.largest;
                }
            }
        }, TokenRange{pieces.first, pieces.last});
    });
    member.did(Part::ATTENTION);
}

inline i64 pieces_scratch_bytes(const AttentionLayer& layer, const Pieces& pieces) {
    return attention_scratch_bytes(layer) + 64 + pieces.ranks * static_cast<i64>(sizeof(i64));
}

// The context of this rank's heads, of which `layer` is, from the records of all ranks: every threads-th tile.
inline void combine_pieces(const Member& member, const AttentionLayer& layer, const Step& step, const Pieces& pieces) {
    Room room{member.scratch};
    const Workplace place(room, most_rows(layer), layer.head_dim);
    i64* const seen = room.take<i64>(pieces.ranks);
    const i64 size = record_floats(layer), head_dim = layer.head_dim;
    i64 item = 0;
    for_each_tile(layer, step, [&](const Tile& tile) {
        if (item++ % member.threads != member.thread) return;
        place.total.clear(tile.rows(), head_dim);
        for (i64 t = 0; t < tile.tokens; t++) {
            for (i64 rank = 0; rank < pieces.ranks; rank++) seen[rank] = 0;
            const i64 position = tile.position + t;
            for (i64 span = first_seen(layer, position) / SPAN; span <= position / SPAN; span++) {
                const i64 from = owner_of<SPAN_BLOCKS>(pieces, tile.segment, span), k = seen[from]++;
                for (i64 h = 0; h < tile.heads; h++) {
                    float* record =
                        received_record(pieces, from, tile.token + t, k, tile.first_head + h, layer.heads, size);
                    combine_span(place.total.row(t * tile.heads + h, head_dim), in_record(record, head_dim), head_dim);
                }
            }
        }
        scatter_rows(layer, step, tile, place.total);
    }, TokenRange{pieces.first, pieces.last});
    member.did(Part::ATTENTION);
}

// -- latents: a record is out [latent], sum, largest ------------------------------------------------------------------

inline i64 record_floats(const LatentSizes& sizes) { return sizes.latent + 2; }

// This rank's queries, scaled and transformed as the cache is: float32 [tokens, heads, width].
inline void scale_latent_queries(const Member& member, const LatentLayer& layer, const Step& step, float* out) {
    const LatentSizes sizes(layer);
    const i64 count = step.tokens * layer.heads, width = sizes.width();
    for (i64 i = member.first(count); i < member.last(count); i++) {
        const float* absorbed = step.latent.x + i * sizes.latent;
        const float* turned = step.q + i * sizes.head + layer.nope;
        for (i64 d = 0; d < sizes.latent; d++) out[i * width + d] = static_cast<float>(absorbed[d] * layer.scale);
        for (i64 d = 0; d < sizes.rope; d++)
            out[i * width + sizes.latent + d] = d < layer.rope ? static_cast<float>(turned[d] * layer.scale) : 0.0f;
        for (i64 d = 0; has_hadamard(layer.cache.type) && d < width; d += BLOCK) hadamard(out + i * width + d, SEEN_FACTOR);
    }
    member.did(Part::ROPE);
}

// The largest tiles of which the threads have enough spans.
inline i64 sets_of_pieces(const LatentLayer& layer, const Step& step, const Pieces& pieces, i64 threads) {
    for (i64 sets = MOST_SETS;; sets /= 2) {
        i64 units = 0;
        for_each_latent_tile(layer, step, sets, [&](const LatentTile& tile) {
            for (i64 span = 0; span < tile.spans(); span++)
                units += owner_of<LATENT_SPAN_BLOCKS>(pieces, tile.segment, span) == pieces.rank;
        }, TokenRange{pieces.first, pieces.last});
        if (threads == 1 || units >= 2 * threads || sets == 1) return sets;
    }
}

// As attend_pieces for grouped queries.
inline void attend_latent_pieces(const Member& member, const LatentLayer& layer, const Step& step, const Pieces& pieces) {
    const LatentSizes sizes(layer);
    const i64 sets = sets_of_pieces(layer, step, pieces, member.threads), width = sizes.width();
    const i64 size = record_floats(sizes);
    Room room{member.scratch};
    const LatentWorkplace place(room, sizes, MOST_SETS);
    i64 unit = 0;
    const auto gather = [&](const LatentTile& tile) {
        for (i64 r = 0; r < tile.sets() * LANES; r++) {
            float* to = place.queries + r / LANES * width * LANES + r % LANES;
            const float* from = r < tile.rows ? pieces.queries + (tile.token_of(r) * layer.heads + tile.head_of(r)) * width
                                              : nullptr;
            for (i64 i = 0; i < width; i++) to[i * LANES] = from == nullptr ? 0.0f : from[i];
        }
    };
    with_cache_type(layer.cache.type, [&](auto type) {
        using Kv = decltype(type);
        for_each_latent_tile(layer, step, sets, [&](const LatentTile& tile) {
            bool gathered = false;
            i64 found = 0;
            for (i64 span = 0; span < tile.spans(); span++) {
                if (owner_of<LATENT_SPAN_BLOCKS>(pieces, tile.segment, span) != pieces.rank) continue;
                const i64 k = found++;
                if (unit++ % member.threads != member.thread) continue;
                if (!gathered) gather(tile);
                gathered = true;
                attend_latent_span<Kv>(layer, sizes, tile, span, place, place.part);
                for (i64 r = 0; r < tile.rows; r++) {
                    if (tile.position_of(r) < span * LATENT_SPAN) continue;
                    float* record = record_to_send(pieces, tile.token_of(r), k, tile.head_of(r), size);
                    const LatentSums from = place.part.set(r / LANES);
                    const i64 lane = r % LANES;
                    for (i64 d = 0; d < sizes.latent; d++) record[d] = from.out[d * LANES + lane];
                    record[sizes.latent] = from.sums[lane], record[sizes.latent + 1] = from.largest[lane];
                }
            }
        }, TokenRange{pieces.first, pieces.last});
    });
    member.did(Part::ATTENTION);
}

// Add a record to a total of the same form: as combine_latent, for one row.
inline void combine_latent_record(float* total, const float* record, i64 latent) {
    float &largest = total[latent + 1], &sum = total[latent];
    const float now = largest < record[latent + 1] ? record[latent + 1] : largest;
    const Vf keep = exponential(splat(largest - now)), take = exponential(splat(record[latent + 1] - now));
    for (i64 d = 0; d < latent; d += W) store(total + d, fma(load(record + d), take, mul(load(total + d), keep)));
    float lanes[W];
    store(lanes, fma(splat(record[latent]), take, mul(splat(sum), keep)));
    sum = lanes[0];
    largest = now;
}

// As combine_pieces for grouped queries; every threads-th token and head.
inline void combine_latent_pieces(const Member& member, const LatentLayer& layer, const Step& step,
                                  const Pieces& pieces) {
    const LatentSizes sizes(layer);
    const Activations to = as_columns(step.latent, layer.heads * sizes.latent);
    const i64 size = record_floats(sizes), blocks = sizes.latent / BLOCK;
    Room room{member.scratch};
    float* const total = room.take<float>(size);
    i64* const seen = room.take<i64>(pieces.ranks);
    i64 item = 0;
    TokenRange{pieces.first, pieces.last}.for_each_segment(step, [&](i64 s, i64 token, i64 count, i64 start) {
        for (i64 i = 0; i < count * layer.heads; i++) {
            if (item++ % member.threads != member.thread) continue;
            const i64 t = token + i / layer.heads, head = i % layer.heads, position = start + i / layer.heads;
            std::memset(total, 0, size * sizeof(float));
            total[sizes.latent + 1] = FAR_BELOW;
            for (i64 rank = 0; rank < pieces.ranks; rank++) seen[rank] = 0;
            for (i64 span = 0; span <= position / LATENT_SPAN; span++) {
                const i64 from = owner_of<LATENT_SPAN_BLOCKS>(pieces, s, span), k = seen[from]++;
                combine_latent_record(total, received_record(pieces, from, t, k, head, layer.heads, size), sizes.latent);
            }
            float* out = to.x + t * to.columns + head * sizes.latent;
            for (i64 d = 0; d < sizes.latent; d++) out[d] = total[d] / total[sizes.latent];
            for (i64 b = 0; has_hadamard(layer.cache.type) && b < blocks; b++) hadamard(out + BLOCK * b, SEEN_FACTOR);
            if (has_blocks(layer.v_b.type)) quantise_blocks(out, blocks, to, step.tokens, t, head * blocks);
        }
    });
    member.did(Part::ATTENTION);
}

inline i64 pieces_scratch_bytes(const LatentLayer& layer, const Pieces& pieces) {
    return latent_half_scratch_bytes(layer) + 128 + pieces.ranks * static_cast<i64>(sizeof(i64));
}

}  // namespace mpillama
