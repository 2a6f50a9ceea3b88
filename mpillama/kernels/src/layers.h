// The two halves of a decoder layer, each one region of the team.
#pragma once
#include <initializer_list>

#include "attention.h"
#include "cache.h"
#include "elementwise.h"
#include "experts.h"
#include "norm.h"
#include "products.h"
#include "rope.h"
#include "team.h"

namespace mpillama {

// h = RMSNorm(x), or x itself without a weight, for this thread's tokens; and its quantised form if a matrix of blocks
// follows.
inline void normalise(const Member& member, const float* x, i64 tokens, const float* weight, i64 size, double eps,
                      bool quantised, const Activations& h) {
    for (i64 t = member.first(tokens); t < member.last(tokens); t++) {
        float* row = h.x + t * h.columns;
        if (weight != nullptr) rms_norm_row(x + t * h.columns, weight, h.columns, size, eps, row);
        else std::memcpy(row, x + t * h.columns, h.columns * sizeof(float));
        if (quantised) quantise_blocks(row, h.columns / BLOCK, h, tokens, t, 0);
    }
}

// The grids of what this half adds to this thread's tokens, if they are coarser than 2^-30.
inline void choose_grids(const Member& member, const Step& step, i64 size) {
    for (i64 t = member.first(step.tokens); step.shifts != nullptr && t < member.last(step.tokens); t++)
        step.shifts[t] = coarse_shift(step.x + t * step.hidden.columns, size);
}

inline void column_part(const Member& member, const Matrix& m, const Activations& x, i64 tokens, float* out,
                        i64 in_flight) {
    column_span(m, 0, x, tokens, member.first(m.groups), member.last(m.groups), out, m.groups * LANES, in_flight,
                member.scratch);
}

constexpr i64 RUN_BYTES = 256 * 1024;  // the shortest run of weights that a thread should read of a panel before it jumps

// Over how many parts of the rows the threads are divided; the rest of the division is over panels.
inline i64 row_parts(const Matrix& m, i64 threads) {
    const i64 runs = panel_bytes(m) / RUN_BYTES;
    i64 parts = threads < runs ? threads : runs < 1 ? 1 : runs;
    while (threads % parts != 0) parts--;
    return parts;
}

inline i64 row_shared_bytes(const Matrix& m, i64 tokens, i64 threads) {
    return tokens > 1 ? 0 : threads * m.groups * LANES * static_cast<i64>(sizeof(double));
}

// out = this rank's panels times x, on the grid: float64 [tokens, rows].
inline void row_parallel(const Member& member, const Matrix& m, const Activations& x, i64 tokens, double* out,
                         i64 in_flight, Part name, const double* shifts = nullptr) {
    const i64 rows = m.groups * LANES;
    if (tokens > 1 || m.panels == 0) {
        const i64 first = member.first(m.groups), last = member.last(m.groups);
        for (i64 t = 0; t < tokens; t++)
            std::memset(out + t * rows + LANES * first, 0, (last - first) * LANES * sizeof(double));
        if (m.panels > 0) add_rows(m, 0, x, tokens, first, last, Output{out, rows, nullptr, shifts}, member.scratch);
        return;
    }
    const i64 parts = row_parts(m, member.threads), panel_parts = member.threads / parts;
    const i64 row = member.thread % parts, part = member.thread / parts;
    const i64 first = m.groups * row / parts, last = m.groups * (row + 1) / parts;
    double* sums = panel_parts == 1 ? out : reinterpret_cast<double*>(member.shared) + part * rows;
    std::memset(sums + LANES * first, 0, (last - first) * LANES * sizeof(double));
    add_panels(m, 0, x, m.panels * part / panel_parts, m.panels * (part + 1) / panel_parts, first, last, sums, in_flight,
               shifts == nullptr ? GRID_SHIFT : shifts[0]);
    if (panel_parts == 1) return;
    member.did(name);
    member.barrier();
    for (i64 i = LANES * member.first(m.groups); i < LANES * member.last(m.groups); i++) {  // on the grid: any order is exact
        double total = 0.0;
        for (i64 p = 0; p < panel_parts; p++) total += reinterpret_cast<const double*>(member.shared)[p * rows + i];
        out[i] = total;
    }
}

inline i64 attention_half_scratch_bytes(const AttentionLayer& layer) {
    i64 most = attention_scratch_bytes(layer);
    for (const Matrix* m : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate})
        if (m->groups > 0) most = larger(most, product_scratch_bytes(*m));
    return most;
}

// Call `use` with every matrix that meets the hidden state; those that a layer lacks have no groups.
template <class Use> inline void for_each_input_matrix(const MlpLayer& layer, Use use) {
    use(layer.gate), use(layer.up), use(layer.router.matrix);
    use(layer.shared_gate), use(layer.shared_up), use(layer.shared_router);
}

inline i64 mlp_half_scratch_bytes(const MlpLayer& layer) {
    i64 most = larger(product_scratch_bytes(layer.down), product_scratch_bytes(layer.shared_down));
    for_each_input_matrix(layer, [&](const Matrix& m) { most = larger(most, product_scratch_bytes(m)); });
    return most;
}

// Norm, q/k/v and, into step.latent, the gate of heads.
inline void project(const Member& member, const AttentionLayer& layer, const Step& step) {
    const bool gated = layer.gate.groups > 0;
    const bool quantised = has_blocks(layer.q.type) || has_blocks(layer.k.type) || has_blocks(layer.v.type) ||
                           (gated && has_blocks(layer.gate.type));
    choose_grids(member, step, layer.hidden_size);
    normalise(member, step.x, step.tokens, layer.norm, layer.hidden_size, layer.eps, quantised, step.hidden);
    member.did(Part::NORM);
    member.barrier();
    column_part(member, layer.q, step.hidden, step.tokens, step.q, step.in_flight);
    column_part(member, layer.k, step.hidden, step.tokens, step.k, step.in_flight);
    column_part(member, layer.v, step.hidden, step.tokens, step.v, step.in_flight);
    if (gated) column_part(member, layer.gate, step.hidden, step.tokens, step.latent.x, step.in_flight);
    member.did(Part::QKV);
    member.barrier();
}

// The same, and what this rank adds to the sums of squares for norms of whole projections.
inline void project_and_sum(const Member& member, const AttentionLayer& layer, const Step& step) {
    project(member, layer, step);
    sum_squares(layer, step, member.first(step.tokens), member.last(step.tokens));
    member.did(Part::NORM);
}

// o_proj: step.partial is this rank's part of the sum.
inline void project_attended(const Member& member, const AttentionLayer& layer, const Step& step) {
    row_parallel(member, layer.o, step.context, step.tokens, step.partial, step.in_flight, Part::O_PROJ, step.shifts);
    member.did(Part::O_PROJ);
}

// RoPE and cache, attention, o_proj.
inline void attend_projected(const Member& member, const AttentionLayer& layer, const Step& step) {
    rotate_and_store(layer, step, member.first(step.tokens), member.last(step.tokens));
    member.did(Part::ROPE);
    member.barrier();
    attend(member, layer, step);
    member.did(Part::ATTENTION);
    member.barrier();
    project_attended(member, layer, step);
}

inline void attention_half(const Member& member, const AttentionLayer& layer, const Step& step) {
    project(member, layer, step);
    attend_projected(member, layer, step);
}

// Norm, then the gated MLP or experts: step.partial is this rank's part of the sum.
inline void mlp_half(const Member& member, const MlpLayer& layer, const Step& step) {
    bool quantised = false;
    for_each_input_matrix(layer, [&](const Matrix& m) { quantised = quantised || (m.groups > 0 && has_blocks(m.type)); });
    choose_grids(member, step, layer.hidden_size);
    normalise(member, step.x, step.tokens, layer.norm, layer.hidden_size, layer.eps, quantised, step.hidden);
    member.did(Part::NORM);
    member.barrier();
    if (layer.router.matrix.groups > 0) return mixture(member, layer, step);
    const i64 pairs = layer.gate.groups / 2;  // a quantised block is two groups
    gate_up_span(layer, 0, step.hidden, step.tokens, nullptr, step.gate, step.up, member.first(pairs),
                 member.last(pairs), step.in_flight, member.scratch);
    member.did(Part::GATE_UP);
    member.barrier();
    row_parallel(member, layer.down, step.gate, step.tokens, step.partial, step.in_flight, Part::DOWN, step.shifts);
    member.did(Part::DOWN);
}

}  // namespace mpillama
