// The first half of a decoder layer with a gated delta net: projections, a causal convolution of 4 taps, the delta rule,
// a norm of heads gated by z, o_proj.
//
// step.q, step.k, step.v hold the projections and, in their place, what the convolution makes of them; step.latent z;
// step.gates a of all tokens and then b, and in their place decays and betas; step.context the heads' outputs.
#pragma once
#include "delta_rule.h"
#include "layers.h"

namespace mpillama {

constexpr i64 TAPS = 4;
constexpr double KEY_EPS = 1e-6;  // of the length of queries and keys

// Where a layer's state lies: tails [slot, 3, channels], of queries, keys and values; sums [slot, value_heads, S].
struct StateSizes {
    i64 keys, values, channels, sums;

    explicit StateSizes(const DeltaLayer& layer)
        : keys(layer.key_heads * layer.key_dim),
          values(layer.value_heads * layer.value_dim),
          channels(2 * keys + values),
          sums(layer.key_dim * layer.value_dim) {}
};

// The snapshots of a segment: those of its tokens, first : last.
struct Snapshots {
    const i64* places;  // [count, 2]: token, slot
    i64 at, count;

    Snapshots(const Step& step, i64 first_token) : places(step.snapshots), at(0), count(step.snapshot_count) {
        while (at < count && places[2 * at] < first_token) at++;
    }
    // Call `use` with every slot that wants the state after this token; tokens come in ascending order.
    template <class Use> void after(i64 token, Use use) {
        for (; at < count && places[2 * at] == token; at++) use(places[2 * at + 1]);
    }
};

// One head's channels of one segment: convolved and SiLU; queries and keys then get the length `length`, unless it is 0.
// `taps` [4, width], `tails` the head's channels in slot 0.
inline void convolve_head(const DeltaLayer& layer, const Step& step, i64 segment, float* x, i64 width, const float* taps,
                          i64 dim, float* tails, double length, float* history) {
    const i64 first = step.segments[3 * segment], tokens = step.segments[3 * segment + 1];
    const i64 from = step.states[2 * segment], to = step.states[2 * segment + 1], channels = StateSizes(layer).channels;
    const auto write = [&](i64 slot) {
        for (i64 i = 0; i < TAPS - 1; i++)
            std::memcpy(tails + (slot * (TAPS - 1) + i) * channels, history + i * dim, dim * sizeof(float));
    };
    for (i64 i = 0; i < TAPS - 1; i++)
        if (from < 0) std::memset(history + i * dim, 0, dim * sizeof(float));
        else std::memcpy(history + i * dim, tails + (from * (TAPS - 1) + i) * channels, dim * sizeof(float));
    Snapshots snapshots(step, first);
    for (i64 t = first; t < first + tokens; t++) {
        float* row = x + t * width;
        for (i64 i = 0; i < dim; i += W) {
            Vf past[TAPS];
            for (int tap = 0; tap < TAPS - 1; tap++) past[tap] = load(history + tap * dim + i);
            past[TAPS - 1] = load(row + i);
            Vf sum = mul(past[0], load(taps + i));
            for (int tap = 1; tap < TAPS; tap++) sum = fma(past[tap], load(taps + tap * width + i), sum);
            for (int tap = 1; tap < TAPS; tap++) store(history + (tap - 1) * dim + i, past[tap]);
            store(row + i, silu(sum));
        }
        if (length > 0.0) {
            const float factor = static_cast<float>(length / __builtin_sqrt(sum_of_squares(row, dim) + KEY_EPS));
            for (i64 i = 0; i < dim; i += W) store(row + i, mul(load(row + i), splat(factor)));
        }
        snapshots.after(t, write);
    }
    write(to);
}

// Heads of queries, keys and values one after the other, each with all segments.
inline void convolve(const Member& member, const DeltaLayer& layer, const Step& step) {
    const StateSizes sizes(layer);
    const i64 units = (2 * layer.key_heads + layer.value_heads) * step.segment_count;
    const double of_queries = 1.0 / __builtin_sqrt(static_cast<double>(layer.key_channels));
    float* history = reinterpret_cast<float*>(member.scratch);
    for (i64 unit = member.first(units); unit < member.last(units); unit++) {
        const i64 segment = unit % step.segment_count, any = unit / step.segment_count;
        const bool is_value = any >= 2 * layer.key_heads, is_query = any < layer.key_heads;
        const i64 head = is_query ? any : is_value ? any - 2 * layer.key_heads : any - layer.key_heads;
        const i64 dim = is_value ? layer.value_dim : layer.key_dim, place = head * dim;
        float *x = is_query ? step.q : is_value ? step.v : step.k;
        const float* taps = is_query ? layer.q_taps : is_value ? layer.v_taps : layer.k_taps;
        float* tails = layer.states.tails + (is_query ? 0 : is_value ? 2 * sizes.keys : sizes.keys) + place;
        convolve_head(layer, step, segment, x + place, is_value ? sizes.values : sizes.keys, taps + place, dim, tails,
                      is_query ? of_queries : is_value ? 0.0 : 1.0, history);
    }
}

// Decays and betas of a token's heads, in the place of a and b.
inline void open_gates(const DeltaLayer& layer, const Step& step, i64 token) {
    const i64 width = layer.a.groups * LANES;
    float *a = step.gates + token * width + layer.first_head, *b = a + step.tokens * width;
    for (i64 h = 0; h < layer.value_heads; h++) {
        a[h] = exponential(layer.decays[h] * softplus(a[h] + layer.biases[h]));
        b[h] = sigmoid(b[h]);
    }
}

// The key head of a value head.
inline i64 key_head_of(const DeltaLayer& layer, i64 value_head) {
    i64 head = 0;
    while (layer.head_start[head + 1] <= value_head) head++;
    return head;
}

// SLABS * 16 channels of one value head, over all tokens of a segment.
inline void remember(const DeltaLayer& layer, const Step& step, i64 segment, i64 head, i64 channel) {
    const StateSizes sizes(layer);
    const i64 first = step.segments[3 * segment], tokens = step.segments[3 * segment + 1], dim = layer.key_dim;
    const i64 read = step.states[2 * segment], width = layer.a.groups * LANES, bytes = dim * LANES * SLABS * sizeof(float);
    const auto in_slot = [&](i64 slot) {
        return layer.states.sums + (slot * layer.value_heads + head) * sizes.sums + channel * dim;
    };
    float* to = in_slot(step.states[2 * segment + 1]);
    const float* from = read < 0 ? to : in_slot(read);
    if (read < 0) std::memset(to, 0, bytes);
    const i64 of_key = key_head_of(layer, head) * dim;
    Snapshots snapshots(step, first);
    Vf recalled[VECTORS];
    recall(from, step.k + first * sizes.keys + of_key, dim, recalled);
    for (i64 t = first; t < first + tokens; t++, from = to) {
        const float *gate = step.gates + t * width + layer.first_head + head, *key = step.k + t * sizes.keys + of_key;
        const float decay = gate[0], beta = gate[step.tokens * width], *query = step.q + t * sizes.keys + of_key;
        const float* values = step.v + t * sizes.values + head * layer.value_dim + channel;
        Vf u[VECTORS], out[VECTORS];
        for (int p = 0; p < VECTORS; p++)
            u[p] = mul(splat(beta), fnma(splat(decay), recalled[p], load(values + W * p)));
        if (t + 1 < first + tokens)
            learn<false>(from, to, decay, u, key, query, key + sizes.keys, dim, out, recalled);
        else
            learn<true>(from, to, decay, u, key, query, nullptr, dim, out, recalled);
        float* context = step.context.x + t * sizes.values + head * layer.value_dim + channel;
        for (int p = 0; p < VECTORS; p++) store(context + W * p, out[p]);
        snapshots.after(t, [&](i64 slot) { std::memcpy(in_slot(slot), to, bytes); });
    }
}

// A token's head: RMSNorm, times SiLU of z; and its quantised form if a matrix of blocks follows.
inline void norm_and_gate(const DeltaLayer& layer, const Step& step, const Activations& context, i64 token, i64 head) {
    const i64 dim = layer.value_dim, place = token * context.columns + head * dim;
    float* x = context.x + place;
    const float* z = step.latent.x + place;
    rms_norm_row(x, layer.head_norm, dim, layer.value_channels, layer.eps, x);
    for (i64 i = 0; i < dim; i += W) store(x + i, mul(load(x + i), silu(load(z + i))));
    if (has_blocks(layer.o.type)) quantise_blocks(x, dim / BLOCK, context, step.tokens, token, head * (dim / BLOCK));
}

// Call `use` with every matrix that meets the hidden state.
template <class Use> inline void for_each_input_matrix(const DeltaLayer& layer, Use use) {
    use(layer.q), use(layer.k), use(layer.v), use(layer.z), use(layer.a), use(layer.b);
}

inline i64 delta_half_scratch_bytes(const DeltaLayer& layer) {
    i64 most = larger(product_scratch_bytes(layer.o),
                      (TAPS - 1) * larger(layer.key_dim, layer.value_dim) * static_cast<i64>(sizeof(float)));
    for_each_input_matrix(layer, [&](const Matrix& m) { most = larger(most, product_scratch_bytes(m)); });
    return most;
}

// step.partial is this rank's part of the sum.
inline void delta_half(const Member& member, const DeltaLayer& layer, const Step& step) {
    const StateSizes sizes(layer);
    const i64 tokens = step.tokens, channels = SLABS * LANES;
    bool quantised = false;
    for_each_input_matrix(layer, [&](const Matrix& m) { quantised = quantised || has_blocks(m.type); });
    choose_grids(member, step, layer.hidden_size);
    normalise(member, step.x, tokens, layer.norm, layer.hidden_size, layer.eps, quantised, step.hidden);
    member.did(Part::NORM);
    member.barrier();
    float* const outputs[] = {step.q, step.k, step.v, step.latent.x, step.gates,
                              step.gates + tokens * layer.a.groups * LANES};
    int number = 0;
    for_each_input_matrix(layer, [&](const Matrix& m) {
        column_part(member, m, step.hidden, tokens, outputs[number++], step.in_flight);
    });
    member.did(Part::QKV);
    member.barrier();
    convolve(member, layer, step);
    for (i64 t = member.first(tokens); t < member.last(tokens); t++) open_gates(layer, step, t);
    member.did(Part::ROPE);
    member.barrier();
    const i64 segments = step.segment_count, slabs = sizes.values / channels * segments;
    for (i64 i = member.first(slabs); i < member.last(slabs); i++) {
        const i64 channel = i / segments * channels;
        remember(layer, step, i % segments, channel / layer.value_dim, channel % layer.value_dim);
    }
    member.did(Part::ATTENTION);
    member.barrier();
    const Activations context = as_columns(step.context, sizes.values);
    const i64 pieces = tokens * layer.value_heads;
    for (i64 i = member.first(pieces); i < member.last(pieces); i++)
        norm_and_gate(layer, step, context, i / layer.value_heads, i % layer.value_heads);
    member.did(Part::ATTENTION);
    member.barrier();
    row_parallel(member, layer.o, context, tokens, step.partial, step.in_flight, Part::O_PROJ, step.shifts);
    member.did(Part::O_PROJ);
}

}  // namespace mpillama
