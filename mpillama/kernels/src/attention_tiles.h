// The pieces of attention: scores and weighted values of one cache block, online softmax, combination of spans.
//
// Positions are the lanes of a score, channels are the lanes of an output; cache.h says how a cache block lies. A row
// is a query head of a token. Rows are handled 8, 4, 2 or 1 together, which changes nothing in a row's arithmetic.
#pragma once
#include "cache.h"

namespace mpillama {

constexpr float FAR_BELOW = -1e30f;  // the maximum before any position was seen; finite, so differences are never NaN

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

// How many accumulators of each of `rows` rows are in flight: together half of the registers, which hides the latency
// of the FMAs and leaves room for what they multiply.
constexpr int in_flight(int rows, int most) { return REGISTERS / 2 / rows < most ? REGISTERS / 2 / rows : most; }

// Query rows, scaled: float32 [rows, head_dim] and, for scaled caches, int8 blocks row after row.
struct Queries {
    float* x;
    i8* values;
    float* scales;
    i32* starts;

    Queries from(i64 row, i64 head_dim) const {
        const i64 blocks = row * (head_dim / BLOCK);
        return {x + row * head_dim, values + BLOCK * blocks, scales + blocks, starts + blocks};
    }
};

inline void prefetch_run(const void* p, i64 bytes) {
    for (i64 line = 0; line < bytes; line += 64) prefetch(static_cast<const u8*>(p) + line);
}

template <class Kv, int ROWS>
inline void float_scores(const CacheBlock<Kv>& here, const CacheBlock<Kv>& next, const float* q, i64 head_dim,
                         float* out) {
    constexpr int RUN = in_flight(ROWS, POSITIONS / W);
    constexpr i64 BYTES = RUN * W * sizeof(typename Kv::Number);
    constexpr int TURNS = BYTES < 64 ? 64 / BYTES : 1;  // channels that have a cache line's worth of this run
    const typename Kv::Number* ahead = next.keys;
    for (i64 position = 0; position < POSITIONS; position += RUN * W) {
        const typename Kv::Number* keys = here.keys + position;
        Vf sums[ROWS][RUN];
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < RUN; i++) sums[r][i] = splat(0.0f);
        for (i64 d = 0; d < head_dim; d += TURNS) {
            prefetch_run(ahead, BYTES * TURNS);
            ahead += RUN * W * TURNS;
            for (int turn = 0; turn < TURNS; turn++, keys += POSITIONS) {
                Vf key[RUN];
                for (int i = 0; i < RUN; i++) key[i] = Kv::load(keys + W * i);
                for (int r = 0; r < ROWS; r++) {
                    const Vf x = splat(q[r * head_dim + d + turn]);
                    for (int i = 0; i < RUN; i++) sums[r][i] = fma(key[i], x, sums[r][i]);
                }
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < RUN; i++) store(out + POSITIONS * r + position + W * i, sums[r][i]);
    }
}

template <class Kv, int ROWS>
inline void block_scores(const CacheBlock<Kv>& here, const CacheBlock<Kv>& next, const Queries& q, i64 head_dim,
                         float* out) {
    const i64 blocks = head_dim / BLOCK;
    for (i64 group = 0; group < POSITIONS / LANES; group++)
        for (int part = 0; part < PARTS; part++) {
            Vf sums[ROWS];
            for (int r = 0; r < ROWS; r++) sums[r] = splat(0.0f);
            for (i64 i = 0; i < blocks; i++) {
                const i64 at = (group * blocks + i) * Kv::Keys::bytes, scales_at = POSITIONS * i + LANES * group;
                prefetch_run(next.keys + at + Kv::Keys::bytes / PARTS * part, Kv::Keys::bytes / PARTS);
                prefetch(next.key_scales + scales_at);
                const u8* steps = reinterpret_cast<const u8*>(here.keys) + at;
                const u8* scales = reinterpret_cast<const u8*>(here.key_scales + scales_at);
                const BlockPart<typename Kv::Keys> keys(steps, scales, nullptr, part);
                for (int r = 0; r < ROWS; r++) {
                    const i64 place = r * blocks + i;
                    sums[r] = keys.add({q.values + BLOCK * place, q.scales[place], q.starts[place], 0}, sums[r]);
                }
            }
            for (int r = 0; r < ROWS; r++) store(out + POSITIONS * r + LANES * group + W * part, sums[r]);
        }
}

// out[r, p] = sum over d of q[r, d] * keys[d, p]; the keys of the block `next` are asked for.
template <class Kv, int ROWS>
inline void scores(const CacheBlock<Kv>& here, const CacheBlock<Kv>& next, const Queries& q, i64 head_dim, float* out) {
    if constexpr (Kv::SCALED) block_scores<Kv, ROWS>(here, next, q, head_dim, out);
    else float_scores<Kv, ROWS>(here, next, q.x, head_dim, out);
}

// RUN * W channels of `values` from channel d on. `weights` [ROWS, 64], for scaled values one such array for each 32 channels.
template <class Kv, int ROWS, int RUN>
inline void value_run(const typename Kv::Number* values, const typename Kv::Number* ahead, const float* weights,
                      i64 first, i64 last, i64 d, i64 head_dim, float* out) {
    constexpr int BYTES = RUN * W * sizeof(typename Kv::Number) / Kv::PACKED, LINE = BYTES < 64 ? 64 / BYTES : 1;
    Vf sums[ROWS][RUN];
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < RUN; i++) sums[r][i] = load(out + r * head_dim + W * i);
    for (i64 p = first; p < last; p++) {
        if (p % LINE == 0) prefetch_run(ahead + p * RUN * W / Kv::PACKED, BYTES);
        Vf value[RUN];
        for (int i = 0; i < RUN; i++) value[i] = Kv::load(values + p * head_dim / Kv::PACKED, d + W * i);
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < RUN; i++) {
                const int block = Kv::SCALED ? i * W / BLOCK : 0;
                sums[r][i] = fma(value[i], splat(weights[(block * ROWS + r) * POSITIONS + p]), sums[r][i]);
            }
    }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < RUN; i++) store(out + r * head_dim + W * i, sums[r][i]);
}

template <class Kv, int ROWS, int RUN>
inline void value_runs(const CacheBlock<Kv>& here, const CacheBlock<Kv>& next, const float* weights, i64 first,
                       i64 last, i64 d, i64 head_dim, float* out) {
    constexpr int CHANNELS = RUN * W < BLOCK ? BLOCK : RUN * W;
    alignas(64) float scaled[Kv::SCALED ? CHANNELS / BLOCK * ROWS * POSITIONS : 1];
    for (; d + CHANNELS <= head_dim; d += CHANNELS) {
        if constexpr (Kv::SCALED) {
            for (i64 block = 0; block < CHANNELS / BLOCK; block++) {
                const i64 at = (d / BLOCK + block) * POSITIONS;
                prefetch_run(next.value_scales + at, POSITIONS * sizeof(u16));
                for (i64 p = first / W * W; p < last; p += W) {
                    const Vf scale = load_half(here.value_scales + at + p);
                    for (i64 r = 0; r < ROWS; r++) {
                        float* to = scaled + (block * ROWS + r) * POSITIONS + p;
                        store(to, mul(load(weights + r * POSITIONS + p), scale));
                    }
                }
            }
        }
        for (i64 c = d; c < d + CHANNELS; c += RUN * W)
            value_run<Kv, ROWS, RUN>(here.values, next.values + c * POSITIONS / Kv::PACKED,
                                     Kv::SCALED ? scaled : weights, first, last, c, head_dim, out + c);
    }
    if constexpr (RUN * W > BLOCK)
        if (d < head_dim) value_runs<Kv, ROWS, RUN / 2>(here, next, weights, first, last, d, head_dim, out);
}

// out[r, d] += sum over first <= p < last of weights[r, p] * values[p, d], positions in ascending order; the values of
// the block `next` are asked for.
template <class Kv, int ROWS>
inline void add_values(const CacheBlock<Kv>& here, const CacheBlock<Kv>& next, const float* weights, i64 first,
                       i64 last, i64 head_dim, float* out) {
    value_runs<Kv, ROWS, in_flight(ROWS, 4 * BLOCK / W)>(here, next, weights, first, last, 0, head_dim, out);
}

inline void multiply_row(float* x, Vf factor, i64 count) {
    for (i64 i = 0; i < count; i += W) store(x + i, mul(load(x + i), factor));
}

// Turn 64 scores into weights e^(score - maximum) and rescale what was summed under the old maximum. The first `hidden`
// scores and those from `count` on are masked. `largest` [1], sums [16] and out [head_dim] are updated.
inline void softmax_block(float* scores, i64 hidden, i64 count, float* largest, float* sums, float* out, i64 head_dim) {
    static const i32 numbers[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if (hidden > 0 || count < POSITIONS)
        for (i64 p = 0; p < POSITIONS; p += W) {
            const Vi place = add(load(numbers), splat(static_cast<i32>(p)));
            const Vm early = less(place, splat(static_cast<i32>(count)));
            const Vm seen = both(early, less(splat(static_cast<i32>(hidden) - 1), place));
            store(scores + p, select(seen, load(scores + p), splat(-__builtin_inff())));
        }
    F32x16 top = splat16(FAR_BELOW);
    for (i64 p = 0; p < POSITIONS; p += LANES)
        top = lift<F32x16>([&](int i) {  // "not less" lets a NaN through
            const Vf score = load(scores + p + W * i);
            return select(not_less(score, top.part[i]), score, top.part[i]);
        });
    float lanes[LANES];
    store16(lanes, top);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = maximum(lanes[i], lanes[i + half]);
    const float now = maximum(*largest, lanes[0]), change = *largest - now;
    if (change != 0.0f) {  // else the correction is exactly 1
        const Vf correction = exponential(splat(change));
        multiply_row(sums, correction, LANES);
        multiply_row(out, correction, head_dim);
        *largest = now;
    }
    F32x16 sum = load16(sums);
    for (i64 p = 0; p < POSITIONS; p += LANES) {
        const F32x16 weight = exponential(sub(load16(scores + p), splat16(now)));
        store16(scores + p, weight);
        sum = add(sum, weight);
    }
    store16(sums, sum);
}

// What a row has summed up over some positions: `largest` [1], sums [16], out [head_dim].
struct RowSums {
    float *largest, *sums, *out;
};

// Add a span to the total of the spans before it.
inline void combine_span(const RowSums& total, const RowSums& span, i64 head_dim) {
    const float now = maximum(*total.largest, *span.largest);
    const Vf keep = exponential(splat(*total.largest - now)), take = exponential(splat(*span.largest - now));
    const auto mix = [&](float* to, const float* from, i64 count) {
        for (i64 i = 0; i < count; i += W) store(to + i, fma(load(from + i), take, mul(load(to + i), keep)));
    };
    mix(total.sums, span.sums, LANES);
    mix(total.out, span.out, head_dim);
    *total.largest = now;
}

// Let a score without a value take part in the softmax.
inline void add_sink(const RowSums& total, float sink, i64 head_dim) {
    const float now = maximum(*total.largest, sink);
    const Vf keep = exponential(splat(*total.largest - now));
    multiply_row(total.sums, keep, LANES);
    multiply_row(total.out, keep, head_dim);
    total.sums[0] += exponential(sink - now);
    *total.largest = now;
}

// out = total / (sum of the 16 lanes of sums).
inline void finish_row(const RowSums& total, i64 head_dim, float* out) {
    float lanes[LANES];
    store16(lanes, load16(total.sums));
    const Vf divisor = splat(ordered_sum(lanes));
    for (i64 i = 0; i < head_dim; i += W) store(out + i, div(load(total.out + i), divisor));
}

}  // namespace mpillama
