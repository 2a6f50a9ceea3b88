// Which positions a token of latent attention sees: those whose keys score highest with its index queries
// (https://arxiv.org/abs/2512.02556).
//
// A position leaves one index key for all index heads. Its score for a token is the sum over heads of weight *
// max(0, query . key): channels in ascending order, one FMA each, a head as a lane; of the heads 16 apart one FMA each,
// and then ordered_sum. All of it is float32, and every rank computes all of it, so that all choose alike. The `chosen`
// positions with the highest scores are kept in ascending order; ties go to the lower position, and -0 is 0. A token that
// has no more positions than that sees all of them and does not choose.
#pragma once
#include "latent_attention.h"
#include "layers.h"

namespace mpillama {

constexpr i64 TOKENS_CHOOSING = 16;  // whose scores wait in shared memory together
constexpr i64 DIGITS = 11;           // bits of a score that are counted at a time
constexpr i64 BINS = 1 << DIGITS;

inline bool has_indexer(const Indexer& indexer) { return indexer.k.groups > 0; }

struct IndexSizes {
    i64 width, sets;

    explicit IndexSizes(const Indexer& indexer)
        : width(LatentSizes::padded(indexer.channels)), sets((indexer.heads + LANES - 1) / LANES) {}
};

// What the indexer's matrices make of the tokens, in step.gates: queries [tokens, heads, width], keys [tokens, width] and
// weights [tokens, heads padded to 16].
struct IndexRows {
    float *queries, *keys, *weights;
    i64 of_weights;

    IndexRows(const Indexer& indexer, const Step& step)
        : queries(step.gates),
          keys(queries + step.tokens * indexer.q.groups * LANES),
          weights(keys + step.tokens * indexer.k.groups * LANES),
          of_weights(indexer.weights.groups * LANES) {}
};

// What a thread works with: of a token its query rows [sets, width, 16] and weights [sets, 16], a block of keys
// [64, width], scores of a set and of all heads [64, 16], a row [width], and counts.
struct IndexPlace {
    float *queries, *weights, *block, *scores, *sums, *row;
    i32* counts;

    IndexPlace(Room& room, const IndexSizes& sizes)
        : queries(room.take<float>(sizes.sets * sizes.width * LANES)),
          weights(room.take<float>(sizes.sets * LANES)),
          block(room.take<float>(POSITIONS * sizes.width)),
          scores(room.take<float>(POSITIONS * LANES)),
          sums(room.take<float>(POSITIONS * LANES)),
          row(room.take<float>(sizes.width)),
          counts(room.take<i32>(BINS)) {}
};

inline i64 index_scratch_bytes(const Indexer& indexer) {
    if (!has_indexer(indexer)) return 0;
    Room room{nullptr};
    IndexPlace(room, IndexSizes(indexer));
    return room.used;
}

// Call `use` with every token that must choose, and with the table and the position of it.
template <class Use> inline void for_each_choosing(const Indexer& indexer, const Step& step, Use use) {
    TokenRange().for_each_segment(step, [&](i64 s, i64 token, i64 count, i64 position) {
        for (i64 t = larger(0, indexer.chosen - position); t < count; t++)
            use(token + t, step.tables + s * step.table_width, position + t);
    });
}

// How many scores of a token there are at most, in whole blocks; 0 if no token must choose.
inline i64 scores_of_token(const Indexer& indexer, const Step& step) {
    i64 most = 0;
    if (has_indexer(indexer))
        for_each_choosing(indexer, step, [&](i64, const i64*, i64 position) { most = larger(most, position + 1); });
    return (most + POSITIONS - 1) / POSITIONS * POSITIONS;
}

inline i64 index_shared_bytes(const Indexer& indexer, const Step& step) {
    return smaller(step.tokens, TOKENS_CHOOSING) * scores_of_token(indexer, step) * static_cast<i64>(sizeof(float));
}

// Turn the first channels of a head of queries or keys, which lie `pairs` or half a turn apart.
inline void turn_index_row(const LatentLayer& layer, const Step& step, i64 t, const float* from, float* to) {
    const i64 half = step.rotary_half;
    rotate_to(from, step.cosines + t * half, step.sines + t * half, half, layer.indexer.pairs != 0, to);
    std::memcpy(to + 2 * half, from + 2 * half, (IndexSizes(layer.indexer).width - 2 * half) * sizeof(float));
}

// LayerNorm of a token's index key, in float64 but for the result, its rotation, and the cache.
inline void store_index_key(const LatentLayer& layer, const Step& step, i64 t, float* scratch) {
    const Indexer& indexer = layer.indexer;
    const i64 size = indexer.channels, width = IndexSizes(indexer).width;
    float* row = IndexRows(indexer, step).keys + t * width;
    double sum = 0.0, squares = 0.0;
    for (i64 i = 0; i < size; i++) sum += static_cast<double>(row[i]);
    const double mean = sum / static_cast<double>(size);
    for (i64 i = 0; i < size; i++) {
        const double off = static_cast<double>(row[i]) - mean;
        squares += off * off;
    }
    const double inverse = 1.0 / __builtin_sqrt(squares / static_cast<double>(size) + indexer.eps);
    for (i64 i = 0; i < width; i++) {
        const double normalised = (static_cast<double>(row[i]) - mean) * inverse;
        row[i] = i < size ? static_cast<float>(normalised * indexer.k_norm[i] + indexer.k_bias[i]) : 0.0f;
    }
    turn_index_row(layer, step, t, row, scratch);
    if (step.slots[t] >= 0) store_latent(indexer.cache, scratch, width, step.slots[t]);
}

// A token's queries with heads as lanes, and its weights with both scales in them; lanes without a head are zeros.
inline void gather_index_queries(const LatentLayer& layer, const Step& step, i64 t, const IndexPlace& place) {
    const Indexer& indexer = layer.indexer;
    const IndexSizes sizes(indexer);
    const IndexRows rows(indexer, step);
    const double scale = 1.0 / __builtin_sqrt(static_cast<double>(indexer.heads * indexer.channels));
    for (i64 h = 0; h < sizes.sets * LANES; h++) {
        const bool present = h < indexer.heads;
        place.weights[h] = present ? static_cast<float>(rows.weights[t * rows.of_weights + h] * scale) : 0.0f;
        if (present) turn_index_row(layer, step, t, rows.queries + (t * indexer.heads + h) * sizes.width, place.row);
        float* to = place.queries + h / LANES * sizes.width * LANES + h % LANES;
        for (i64 i = 0; i < sizes.width; i++) to[i * LANES] = present ? place.row[i] : 0.0f;
    }
}

// scores[p] of the positions of one block for the gathered token; what lies in the `next` block is asked for meanwhile.
template <class Kv>
inline void score_block(const Indexer& indexer, const IndexSizes& sizes, i64 block, i64 next, i64 count,
                        const IndexPlace& place, float* scores) {
    constexpr i64 bytes = BLOCK * sizeof(typename Kv::Number) / Kv::PACKED;
    const u8* ahead = next >= 0 ? indexer.cache.values + next * POSITIONS * sizes.width * bytes / BLOCK : nullptr;
    unpack_latents<Kv>(indexer.cache, block * POSITIONS, count, sizes.width, place.block);
    std::memset(place.sums, 0, POSITIONS * LANES * sizeof(float));
    for (i64 set = 0; set < sizes.sets; set++) {
        latent_scores(place.queries + set * sizes.width * LANES, place.block, count, sizes.width,
                      set == 0 ? ahead : nullptr, bytes, place.scores);
        for (int part = 0; part < PARTS; part++) {
            const Vf weight = load(place.weights + set * LANES + W * part), zero = splat(0.0f);
            for (i64 at = W * part; at < count * LANES; at += LANES) {
                const Vf dot = load(place.scores + at);
                store(place.sums + at, fma(weight, select(less(zero, dot), dot, zero), load(place.sums + at)));
            }
        }
    }
    for (i64 p = 0; p < count; p++) {
        float lanes[LANES];
        std::memcpy(lanes, place.sums + p * LANES, sizeof lanes);
        scores[p] = ordered_sum(lanes);
    }
}

// A score as an integer of the same order; both zeros are one, and NaN, whose sign differs between processors, is the least.
inline u32 as_ordered(float score) {
    if (score != score) return 0;
    score += 0.0f;
    u32 bits;
    std::memcpy(&bits, &score, sizeof bits);
    return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// The `chosen` highest of more scores, in ascending order of their places; of equal ones the first. Their smallest is found
// digit by digit.
inline void choose_highest(const float* scores, i64 count, i64 chosen, i32* counts, i32* out) {
    u32 least = 0, known = 0;  // of the smallest that is chosen: the digits found so far, and where they are
    i64 left = chosen;         // how many of those that begin with these digits are wanted
    for (i64 shift = 32 - DIGITS; known != ~0u; shift = larger(0, shift - DIGITS)) {
        std::memset(counts, 0, BINS * sizeof(i32));
        for (i64 i = 0; i < count; i++) {
            const u32 key = as_ordered(scores[i]);
            if (((key ^ least) & known) == 0) counts[(key >> shift) & (BINS - 1)]++;
        }
        i64 bin = BINS - 1;
        while (counts[bin] < left) left -= counts[bin--];
        least |= static_cast<u32>(bin) << shift, known |= static_cast<u32>(BINS - 1) << shift;
    }
    for (i64 i = 0, n = 0; n < chosen; i++) {
        const u32 key = as_ordered(scores[i]);
        if (key > least || (key == least && left-- > 0)) out[n++] = static_cast<i32>(i);
    }
}

// step.chosen [tokens, chosen] of the tokens that must choose. Called by all threads of a region; ends with a barrier if
// there is such a token.
inline void choose_positions(const Member& member, const LatentLayer& layer, const Step& step) {
    struct Choosing {
        i64 token, position;
        const i64* table;
    };
    const Indexer& indexer = layer.indexer;
    const IndexSizes sizes(indexer);
    Room room{member.scratch};
    const IndexPlace place(room, sizes);
    const i64 each = scores_of_token(indexer, step);
    float* scores = reinterpret_cast<float*>(member.shared);
    Choosing tokens[TOKENS_CHOOSING];
    i64 count = 0;
    const auto choose = [&] {
        for (i64 i = 0; i < count; i++) {
            const Choosing& at = tokens[i];
            const i64 blocks = at.position / POSITIONS + 1, first = member.first(blocks), last = member.last(blocks);
            if (first < last) gather_index_queries(layer, step, at.token, place);
            const auto score = [&](auto type) {
                for (i64 b = first; b < last; b++)
                    score_block<decltype(type)>(indexer, sizes, at.table[b], b + 1 < last ? at.table[b + 1] : -1,
                                                smaller(POSITIONS, at.position + 1 - b * POSITIONS), place,
                                                scores + i * each + b * POSITIONS);
            };
            indexer.cache.type == CachedF32::NUMBER ? score(CachedF32()) : score(CachedF16());
        }
        member.barrier();
        for (i64 i = member.thread; i < count; i += member.threads)
            choose_highest(scores + i * each, tokens[i].position + 1, indexer.chosen, place.counts,
                           step.chosen + tokens[i].token * indexer.chosen);
        member.barrier();
        count = 0;
    };
    for_each_choosing(indexer, step, [&](i64 token, const i64* table, i64 position) {
        tokens[count++] = Choosing{token, position, table};
        if (count == TOKENS_CHOOSING) choose();
    });
    if (count > 0) choose();
}

}  // namespace mpillama
