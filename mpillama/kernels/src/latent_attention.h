// Causal attention over cached latents: every head of a rank meets the same keys, which are values too.
//
// A row is a head of a token. 16 rows are the lanes of everything here, so a block of the cache is unpacked once for all
// rows of a tile, and nothing is added up across lanes: a row's bits do not depend on its company. As in attention.h,
// softmax runs online over blocks of 64 positions in ascending order within spans, and spans are combined in ascending
// order; their size is a constant of the arithmetic.
#pragma once
#include "attention_plan.h"
#include "latent_cache.h"

namespace mpillama {

constexpr i64 LATENT_SPAN_BLOCKS = 8;
constexpr i64 LATENT_SPAN = LATENT_SPAN_BLOCKS * POSITIONS;
constexpr i64 MOST_SETS = 4;  // sets of 16 rows that pass over the cache together
constexpr int LATENT_RUN = REGISTERS / 2 / PARTS > 1 ? REGISTERS / 2 / PARTS : 1;  // accumulators of 16 lanes in flight
static_assert(BLOCK % LATENT_RUN == 0, "a run divides channels and positions");

// Rows first : first + rows of a segment, token after token with all their heads. With positions `chosen` (indexer.h) the
// rows are of one token, which sees the `count` of them in their order as if there were no others.
struct LatentTile {
    const i64* table;
    i64 segment, token, position, first, rows, heads;
    const i32* chosen = nullptr;

    i64 sets() const { return (rows + LANES - 1) / LANES; }
    i64 token_of(i64 row) const { return token + (first + row) / heads; }
    i64 head_of(i64 row) const { return (first + row) % heads; }
    i64 position_of(i64 row) const { return position + (first + row) / heads; }
    i64 positions() const { return position_of(rows - 1) + 1; }
    i64 slot_of(i64 place) const {
        const i64 at = chosen == nullptr ? place : chosen[place];
        return table[at / POSITIONS] * POSITIONS + at % POSITIONS;
    }
    i64 spans() const { return (positions() + LATENT_SPAN - 1) / LATENT_SPAN; }
};

template <class Use>
inline void for_each_latent_tile(const LatentLayer& layer, const Step& step, i64 sets, Use use, TokenRange range = {}) {
    range.for_each_segment(step, [&](i64 s, i64 token, i64 count, i64 position) {
        const i64* table = step.tables + s * step.table_width;
        const i64 most = layer.indexer.chosen, seen = most > 0 ? smaller(larger(most - position, 0), count) : count;
        const i64 rows = seen * layer.heads;  // of the tokens that see all positions
        for (i64 first = 0; first < rows; first += sets * LANES)
            use(LatentTile{table, s, token, position, first, smaller(sets * LANES, rows - first), layer.heads});
        for (i64 t = token + seen; t < token + count; t++)
            for (i64 first = 0; first < layer.heads; first += sets * LANES)
                use(LatentTile{table, s, t, most - 1, first, smaller(sets * LANES, layer.heads - first), layer.heads,
                               step.chosen + t * most});
    });
}

// How the threads share a step: the largest tiles of which there are enough, or else the tiles' spans.
struct LatentSharing {
    i64 sets = MOST_SETS, tiles = 0, spans = 0;
    bool by_span = false;

    LatentSharing(const LatentLayer& layer, const Step& step, i64 threads) {
        for (sets = MOST_SETS;; sets /= 2) {
            tiles = spans = 0;
            for_each_latent_tile(layer, step, sets, [&](const LatentTile& tile) {
                tiles++;
                spans += tile.spans();
            });
            by_span = threads > 1 && tiles < 2 * threads && spans > tiles;
            if (threads == 1 || (by_span ? spans : tiles) >= 2 * threads || sets == 1) return;
        }
    }
};

// What is summed up for a tile's rows: of each set `largest` [16], sums [16] and out [latent, 16].
struct LatentSums {
    float *largest, *sums, *out;
    i64 latent;

    LatentSums(Room& room, i64 sets, i64 channels)
        : largest(room.take<float>(sets * LANES)),
          sums(room.take<float>(sets * LANES)),
          out(room.take<float>(sets * channels * LANES)),
          latent(channels) {}

    LatentSums set(i64 i) const {
        LatentSums one = *this;
        one.largest += i * LANES, one.sums += i * LANES, one.out += i * latent * LANES;
        return one;
    }

    void clear(i64 sets) const {
        for (i64 i = 0; i < sets * LANES; i++) largest[i] = FAR_BELOW, sums[i] = 0.0f;
        std::memset(out, 0, sets * latent * LANES * sizeof(float));
    }
};

// What a thread works with: query rows [sets, width, 16], a block [64, width], scores of a set [64, 16].
struct LatentWorkplace {
    float *queries, *block, *scores;
    LatentSums part, total;

    LatentWorkplace(Room& room, const LatentSizes& sizes, i64 sets)
        : queries(room.take<float>(sets * sizes.width() * LANES)),
          block(room.take<float>(POSITIONS * sizes.width())),
          scores(room.take<float>(POSITIONS * LANES)),
          part(room, sets, sizes.latent),
          total(room, sets, sizes.latent) {}
};

inline i64 latent_attention_scratch_bytes(const LatentLayer& layer) {
    Room room{nullptr};
    LatentWorkplace(room, LatentSizes(layer), MOST_SETS);
    return room.used;
}

inline i64 latent_attention_shared_bytes(const LatentLayer& layer, const Step& step, i64 threads) {
    const LatentSharing sharing(layer, step, threads);
    Room room{nullptr};
    LatentSums(room, sharing.sets, LatentSizes(layer).latent);
    return sharing.by_span ? sharing.spans * room.used : 0;
}

// What the threads leave of a span for the combination.
inline LatentSums latent_span_sums(const Member& member, const LatentSharing& sharing, i64 latent, i64 unit) {
    Room size{nullptr};
    LatentSums(size, sharing.sets, latent);
    Room room{member.shared + unit * size.used};
    return LatentSums(room, sharing.sets, latent);
}

// The queries of a tile, scaled (in float64, rounded once) and transformed as the cache is, rows as lanes; lanes without a row
// are zeros.
inline void gather_latent_rows(const LatentLayer& layer, const Step& step, const LatentSizes& sizes,
                               const LatentTile& tile, float* out) {
    for (i64 r = 0; r < tile.sets() * LANES; r++) {
        float* to = out + r / LANES * sizes.width() * LANES + r % LANES;
        for (i64 i = 0; r >= tile.rows && i < sizes.width(); i++) to[i * LANES] = 0.0f;
        if (r >= tile.rows) continue;
        const i64 token = tile.token_of(r), head = tile.head_of(r);
        const float* absorbed = step.latent.x + token * layer.heads * sizes.latent + head * sizes.latent;
        const float* turned = step.q + (token * layer.heads + head) * sizes.head + layer.nope;
        for (i64 i = 0; i < sizes.latent; i++) to[i * LANES] = static_cast<float>(absorbed[i] * layer.scale);
        for (i64 i = 0; i < sizes.rope; i++)
            to[(sizes.latent + i) * LANES] = i < layer.rope ? static_cast<float>(turned[i] * layer.scale) : 0.0f;
        for (i64 i = 0; has_hadamard(layer.cache.type) && i < sizes.width(); i += BLOCK) {
            float block[BLOCK];
            for (i64 j = 0; j < BLOCK; j++) block[j] = to[(i + j) * LANES];
            hadamard(block, SEEN_FACTOR);
            for (i64 j = 0; j < BLOCK; j++) to[(i + j) * LANES] = block[j];
        }
    }
}

// scores[p] = queries . block[p] for the first `count` positions, rounded up to whole runs; channels in ascending order.
// Meanwhile what lies `ahead`, `bytes` for each position and 32 channels, is asked for.
inline void latent_scores(const float* queries, const float* block, i64 count, i64 width, const u8* ahead, i64 bytes,
                          float* scores) {
    for (i64 p = 0; p < count; p += LATENT_RUN) {
        Vf sums[LATENT_RUN][PARTS] = {};
        const float* at = block + p * width;
        for (i64 d = 0; d < width; d++) {
            if (ahead != nullptr && d % 8 == 0)
                prefetch_run(ahead + (p * width + d * LATENT_RUN) * bytes / BLOCK, 8 * LATENT_RUN * bytes / BLOCK);
            Vf query[PARTS];
            for (int part = 0; part < PARTS; part++) query[part] = load(queries + d * LANES + W * part);
#pragma GCC unroll 16
            for (int i = 0; i < LATENT_RUN; i++)
                for (int part = 0; part < PARTS; part++)
                    sums[i][part] = fma(query[part], splat(at[i * width + d]), sums[i][part]);
        }
        for (int i = 0; i < LATENT_RUN; i++)
            for (int part = 0; part < PARTS; part++) store(scores + (p + i) * LANES + W * part, sums[i][part]);
    }
}

// out += weights . block over positions, in ascending order; positions from `common` on only for rows that see them.
inline void add_latents(const float* weights, const float* block, i64 common, i64 count, const i32* counts, i64 width,
                        i64 latent, float* out) {
    for (i64 d = 0; d < latent; d += LATENT_RUN) {
        Vf sums[LATENT_RUN][PARTS];
        float* to = out + d * LANES;
        for (int i = 0; i < LATENT_RUN; i++)
            for (int part = 0; part < PARTS; part++) sums[i][part] = load(to + i * LANES + W * part);
        for (i64 p = 0; p < common; p++) {
            Vf weight[PARTS];
            for (int part = 0; part < PARTS; part++) weight[part] = load(weights + p * LANES + W * part);
#pragma GCC unroll 16
            for (int i = 0; i < LATENT_RUN; i++)
                for (int part = 0; part < PARTS; part++)
                    sums[i][part] = fma(weight[part], splat(block[p * width + d + i]), sums[i][part]);
        }
        for (i64 p = common; p < count; p++)
            for (int part = 0; part < PARTS; part++) {
                const Vm sees = less(splat(static_cast<i32>(p)), load(counts + W * part));
                const Vf weight = load(weights + p * LANES + W * part);
                for (int i = 0; i < LATENT_RUN; i++) {
                    const Vf sum = fma(weight, splat(block[p * width + d + i]), sums[i][part]);
                    sums[i][part] = select(sees, sum, sums[i][part]);
                }
            }
        for (int i = 0; i < LATENT_RUN; i++)
            for (int part = 0; part < PARTS; part++) store(to + i * LANES + W * part, sums[i][part]);
    }
}

// Turn scores [count, 16] into weights e^(score - maximum), 0 where a row does not see the position, and rescale what was
// summed under the old maximum.
inline void latent_softmax(float* scores, i64 count, const i32* counts, const LatentSums& to) {
    for (int part = 0; part < PARTS; part++) {
        const Vi seen = load(counts + W * part);
        const Vf before = load(to.largest + W * part);
        Vf top = before;
        for (i64 p = 0; p < count; p++) {
            float* at = scores + p * LANES + W * part;
            const Vf score = select(less(splat(static_cast<i32>(p)), seen), load(at), splat(-__builtin_inff()));
            store(at, score);
            top = select(less(top, score), score, top);  // a NaN is passed over here and comes back in its weight
        }
        const Vf correction = exponential(sub(before, top));
        Vf sum = mul(load(to.sums + W * part), correction);
        for (i64 p = 0; p < count; p++) {
            float* at = scores + p * LANES + W * part;
            const Vf weight = exponential(sub(load(at), top));
            store(at, weight);
            sum = add(sum, weight);
        }
        store(to.sums + W * part, sum);
        store(to.largest + W * part, top);
        float change[W];
        store(change, sub(before, top));
        bool any = false;
        for (float x : change) any = any || x != 0.0f;
        for (i64 d = 0; any && d < to.latent; d++) {  // a row without a change is multiplied by exactly 1
            float* at = to.out + d * LANES + W * part;
            store(at, mul(load(at), correction));
        }
    }
}

// The chosen positions first : first + count as float32 [count, width]; those of the next block are asked for meanwhile.
template <class Kv>
inline void gather_chosen(const LatentCache& cache, const LatentTile& tile, i64 first, i64 count, i64 width, float* out) {
    const i64 bytes = width * static_cast<i64>(sizeof(typename Kv::Number)) / Kv::PACKED;
    for (i64 i = 0; i < count; i++) {
        const i64 next = first + POSITIONS + i;
        if (next < tile.positions()) prefetch_run(cache.values + tile.slot_of(next) * bytes, bytes);
        unpack_latents<Kv>(cache, tile.slot_of(first + i), 1, width, out + i * width);
    }
}

// Attend the gathered rows of a tile over one span.
template <class Kv>
inline void attend_latent_span(const LatentLayer& layer, const LatentSizes& sizes, const LatentTile& tile, i64 span,
                               const LatentWorkplace& place, const LatentSums& sums) {
    const i64 width = sizes.width(), blocks = (tile.positions() + POSITIONS - 1) / POSITIONS;
    constexpr i64 bytes = BLOCK * sizeof(typename Kv::Number) / Kv::PACKED;
    sums.clear(tile.sets());
    for (i64 b = span * LATENT_SPAN_BLOCKS; b < smaller((span + 1) * LATENT_SPAN_BLOCKS, blocks); b++) {
        const i64 held = smaller(tile.positions() - b * POSITIONS, POSITIONS);
        const u8* ahead = nullptr;
        if (tile.chosen == nullptr) {
            unpack_latents<Kv>(layer.cache, tile.table[b] * POSITIONS, held, width, place.block);
            if (b + 1 < blocks) ahead = layer.cache.values + tile.table[b + 1] * POSITIONS * width * bytes / BLOCK;
        } else {
            gather_chosen<Kv>(layer.cache, tile, b * POSITIONS, held, width, place.block);
        }
        for (i64 set = 0; set < tile.sets(); set++) {
            alignas(64) i32 counts[LANES];
            i64 common = POSITIONS, most = 0;
            for (i64 i = 0; i < LANES; i++) {
                const i64 row = set * LANES + i;
                const i64 count = row < tile.rows ? tile.position_of(row) + 1 - b * POSITIONS : 0;
                counts[i] = static_cast<i32>(smaller(larger(count, 0), POSITIONS));
                if (row < tile.rows) common = smaller(common, counts[i]), most = larger(most, counts[i]);
            }
            if (most == 0) continue;
            const LatentSums of_set = sums.set(set);
            latent_scores(place.queries + set * width * LANES, place.block, most, width, set == 0 ? ahead : nullptr, bytes,
                          place.scores);
            latent_softmax(place.scores, most, counts, of_set);
            add_latents(place.scores, place.block, common, most, counts, width, sizes.latent, of_set.out);
        }
    }
}

// Add a span to the total of the spans before it, for the rows that see it.
inline void combine_latent(const LatentTile& tile, i64 span, const LatentSums& total, const LatentSums& part) {
    for (i64 set = 0; set < tile.sets(); set++) {
        alignas(64) i32 seen[LANES];
        for (i64 i = 0; i < LANES; i++) {
            const i64 row = set * LANES + i;
            seen[i] = row < tile.rows && tile.position_of(row) >= span * LATENT_SPAN;
        }
        const LatentSums to = total.set(set), from = part.set(set);
        for (int lanes = 0; lanes < LANES; lanes += W) {
            const Vm sees = less(splat(0), load(seen + lanes));
            const Vf old = load(to.largest + lanes), new_one = load(from.largest + lanes);
            const Vf now = select(less(old, new_one), new_one, old);
            const Vf keep = exponential(sub(old, now)), take = exponential(sub(new_one, now));
            const auto mix = [&](float* x, const float* y) {
                const Vf before = load(x + lanes);
                store(x + lanes, select(sees, fma(load(y + lanes), take, mul(before, keep)), before));
            };
            mix(to.sums, from.sums);
            for (i64 d = 0; d < to.latent; d++) mix(to.out + d * LANES, from.out + d * LANES);
            store(to.largest + lanes, select(sees, now, old));
        }
    }
}

// Divide by the sums and write the rows to their tokens and heads, quantised too if a matrix of blocks follows.
inline void scatter_latent_rows(const LatentLayer& layer, const Step& step, const LatentSizes& sizes,
                                const LatentTile& tile, const LatentSums& total, const Activations& to) {
    const bool quantised = has_blocks(layer.v_b.type);
    for (i64 r = 0; r < tile.rows; r++) {
        const i64 token = tile.token_of(r), head = tile.head_of(r), lane = r % LANES;
        const LatentSums from = total.set(r / LANES);
        float* out = to.x + token * to.columns + head * sizes.latent;
        for (i64 d = 0; d < sizes.latent; d++) out[d] = from.out[d * LANES + lane] / from.sums[lane];
        const i64 blocks = sizes.latent / BLOCK;
        for (i64 i = 0; has_hadamard(layer.cache.type) && i < blocks; i++) hadamard(out + BLOCK * i, SEEN_FACTOR);
        if (quantised) quantise_blocks(out, blocks, to, step.tokens, token, head * blocks);
    }
}

// latents[t, h] = softmax over the positions up to t's own of (query . key * scale), times the latents, in place of the
// queries; and its quantised form. Called by all threads of a region.
inline void attend_latents(const Member& member, const LatentLayer& layer, const Step& step, const LatentSizes& sizes,
                           const Activations& latents) {
    const LatentSharing sharing(layer, step, member.threads);
    Room room{member.scratch};
    const LatentWorkplace place(room, sizes, MOST_SETS);
    i64 item = 0, unit = 0;
    with_cache_type(layer.cache.type, [&](auto type) {
        using Kv = decltype(type);
        for_each_latent_tile(layer, step, sharing.sets, [&](const LatentTile& tile) {
            if (!sharing.by_span && item++ % member.threads != member.thread) return;
            bool gathered = false;
            if (!sharing.by_span) place.total.clear(tile.sets());
            for (i64 span = 0; span < tile.spans(); span++) {
                if (sharing.by_span && unit++ % member.threads != member.thread) continue;
                if (!gathered) gather_latent_rows(layer, step, sizes, tile, place.queries);
                gathered = true;
                const LatentSums part =
                    sharing.by_span ? latent_span_sums(member, sharing, sizes.latent, unit - 1) : place.part;
                attend_latent_span<Kv>(layer, sizes, tile, span, place, part);
                if (!sharing.by_span) combine_latent(tile, span, place.total, part);
            }
            if (!sharing.by_span) scatter_latent_rows(layer, step, sizes, tile, place.total, latents);
        });
    });
    if (!sharing.by_span) return;
    member.barrier();
    unit = 0;
    for_each_latent_tile(layer, step, sharing.sets, [&](const LatentTile& tile) {
        const i64 first = unit;
        unit += tile.spans();
        if (item++ % member.threads != member.thread) return;
        place.total.clear(tile.sets());
        for (i64 span = 0; span < tile.spans(); span++)
            combine_latent(tile, span, place.total, latent_span_sums(member, sharing, sizes.latent, first + span));
        scatter_latent_rows(layer, step, sizes, tile, place.total, latents);
    });
}

}  // namespace mpillama
