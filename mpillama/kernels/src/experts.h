// The mixture of experts: which experts each token takes, and their products.
//
// Each rank has a slice of every expert; only chosen experts are read. A token's sum over its experts is on the grid, so
// it does not depend on the order of experts, threads or ranks. An expert that all tokens share is one more part of the
// sum; its activations lie in the step's own arrays.
#pragma once
#include "elementwise.h"
#include "products.h"
#include "router.h"
#include "team.h"

namespace mpillama {

// Hands out the team's shared memory; every thread computes the same addresses.
struct Arena {
    u8* at;

    template <class Element> Element* take(i64 count) {
        Element* taken = reinterpret_cast<Element*>(at);
        at += (count * static_cast<i64>(sizeof(Element)) + 63) / 64 * 64;
        return taken;
    }

    Activations activations(i64 tokens, i64 tiled, i64 columns, bool floats) {
        const i64 blocks = tiled * (columns / BLOCK);
        return {floats ? take<float>(tokens * columns) : nullptr, take<i8>(blocks * BLOCK), take<float>(blocks),
                take<i32>(blocks), take<i32>(blocks), columns};
    }
};

// The tokens of a step by the experts they chose: pairs of token and place, sorted by expert. An expert's tokens lie in
// tiles of their own, which begin at tile places `tiles[expert]`.
struct Routing {
    i64 *chosen, *ends, *tiles, *tokens;
    float *shares, *pair_shares;
    float *logits, *choices, *shared_logits, *shared_shares;
    Activations x, gate;
    float* up;

    // For `pairs` of tokens and experts in all.
    static Routing in(Arena arena, const MlpLayer& layer, const Step& step) {
        const i64 pairs = step.tokens * layer.router.chosen, experts = layer.gate.experts, inner = layer.gate.groups * LANES;
        const i64 tiled = step.tokens == 1 ? pairs : pairs + (TILE_WIDTH - 1) * (experts < pairs ? experts : pairs);
        Routing r;
        r.chosen = arena.take<i64>(pairs);
        r.ends = arena.take<i64>(experts + 1);
        r.tiles = arena.take<i64>(experts + 1);
        r.tokens = arena.take<i64>(pairs);
        r.shares = arena.take<float>(pairs);
        r.pair_shares = arena.take<float>(pairs);
        r.logits = arena.take<float>(step.tokens * layer.router.matrix.groups * LANES);
        r.choices = arena.take<float>(step.tokens * room_to_choose(layer.router));
        r.shared_logits = arena.take<float>(step.tokens * layer.shared_router.groups * LANES);
        r.shared_shares = arena.take<float>(step.tokens);
        r.x = arena.activations(pairs, tiled, step.hidden.columns, true);
        r.gate = arena.activations(pairs, tiled, inner, true);
        r.up = arena.take<float>(pairs * inner);
        r.end = arena.at;
        return r;
    }

    static i64 room_to_choose(const Router& router) { return router.matrix.groups * LANES + 2 * router.groups; }

    i64 count(i64 expert) const { return ends[expert + 1] - ends[expert]; }

    // An expert's tokens in activations of all pairs.
    Activations of(const Activations& all, i64 expert) const {
        const i64 place = tiles[expert] * (all.columns / BLOCK);
        return {all.x + ends[expert] * all.columns, all.values + place * BLOCK, all.scales + place, all.starts + place,
                all.halves + place, all.columns};
    }

    void sort(const MlpLayer& layer, i64 step_tokens) const {
        const i64 experts = layer.gate.experts, pairs = step_tokens * layer.router.chosen;
        for (i64 e = 0; e <= experts; e++) ends[e] = 0;
        for (i64 pair = 0; pair < pairs; pair++) ends[chosen[pair] + 1]++;
        tiles[0] = 0;
        for (i64 e = 0; e < experts; e++) {
            tiles[e + 1] = tiles[e] + places(ends[e + 1], 1) * (ends[e + 1] > 0);
            ends[e + 1] += ends[e];
        }
        for (i64 pair = 0; pair < pairs; pair++) {
            const i64 place = ends[chosen[pair]]++;
            tokens[place] = pair / layer.router.chosen;
            pair_shares[place] = shares[pair];
        }
        for (i64 e = experts; e > 0; e--) ends[e] = ends[e - 1];  // each was moved to its end, the next one's beginning
        ends[0] = 0;
    }

    u8* end;
};

// The gated MLP's inner channels of 32-row pairs first:last for some tokens of an expert, with its quantised form for the down projection.
inline void gate_up_span(const MlpLayer& layer, i64 expert, const Activations& x, i64 tokens, const float* shares,
                         const Activations& gate, float* up, i64 first, i64 last, i64 in_flight, u8* scratch) {
    if (last <= first) return;
    column_span(layer.gate, expert, x, tokens, 2 * first, 2 * last, gate.x, gate.columns, in_flight,
                scratch);
    column_span(layer.up, expert, x, tokens, 2 * first, 2 * last, up, gate.columns, in_flight, scratch);
    const bool quantised = has_blocks(layer.down.type);
    for (i64 t = 0; t < tokens; t++) {
        float *g = gate.x + t * gate.columns, *u = up + t * gate.columns;
        const bool inside = shares != nullptr && layer.weighs_inputs != 0, outside = shares != nullptr && !inside;
        if (inside) {  // products of what is multiplied are multiplied
            multiply(g, shares[t], BLOCK * first, BLOCK * last);
            multiply(u, shares[t], BLOCK * first, BLOCK * last);
        }
        if (layer.gate_bias != nullptr) {
            const i64 rows = expert * layer.gate.groups * LANES;
            add_to(g, layer.gate_bias + rows, BLOCK * first, BLOCK * last);
            add_to(u, layer.up_bias + rows, BLOCK * first, BLOCK * last);
        }
        activate(layer, g, u, BLOCK * first, BLOCK * last);
        if (outside) multiply(g, shares[t], BLOCK * first, BLOCK * last);
        if (quantised) quantise_blocks(g + BLOCK * first, last - first, gate, tokens, t, first);
    }
}

// Copy the activations of a range of pairs beside those of their expert's other tokens.
inline void gather(const MlpLayer& layer, const Step& step, const Routing& r, i64 first, i64 last) {
    const bool quantised = has_blocks(layer.gate.type) || has_blocks(layer.up.type);
    const i64 columns = step.hidden.columns, blocks = columns / BLOCK;
    for (i64 e = 0; e < layer.gate.experts; e++) {
        const Activations to = r.of(r.x, e);
        for (i64 i = 0; i < r.count(e); i++) {
            const i64 pair = r.ends[e] + i, token = r.tokens[pair];
            if (pair < first || pair >= last) continue;
            std::memcpy(to.x + i * columns, step.hidden.x + token * columns, columns * sizeof(float));
            for (i64 b = 0; b < blocks && quantised; b++) {
                const i64 here = block_place(r.count(e), blocks, i, b);
                const i64 there = block_place(step.tokens, blocks, token, b);
                std::memcpy(to.values + BLOCK * here, step.hidden.values + BLOCK * there, BLOCK);
                to.scales[here] = step.hidden.scales[there];
                to.starts[here] = step.hidden.starts[there];
                to.halves[here] = step.hidden.halves[there];
            }
        }
    }
}

inline void route(const Member& member, const MlpLayer& layer, const Step& step, const Routing& r) {
    const Router& router = layer.router;
    const auto logits = [&](const Matrix& m, float* out) {
        column_span(m, 0, step.hidden, step.tokens, member.first(m.groups), member.last(m.groups), out, m.groups * LANES,
                    step.in_flight, member.scratch);
    };
    logits(router.matrix, r.logits);
    if (layer.shared_router.groups > 0) logits(layer.shared_router, r.shared_logits);
    member.did(Part::ROUTER);
    member.barrier();
    for (i64 t = member.first(step.tokens); t < member.last(step.tokens); t++) {
        choose_experts(router, layer.gate.experts, r.logits + t * router.matrix.groups * LANES,
                       r.choices + t * Routing::room_to_choose(router), r.chosen + t * router.chosen,
                       r.shares + t * router.chosen);
        if (layer.shared_router.groups > 0)
            r.shared_shares[t] = sigmoid(r.shared_logits[t * layer.shared_router.groups * LANES]);
    }
    member.did(Part::ROUTER);
    member.barrier();
}

// The shared expert as an MLP of its own.
inline MlpLayer shared_part(const MlpLayer& layer) {
    MlpLayer shared = layer;
    shared.gate = layer.shared_gate, shared.up = layer.shared_up, shared.down = layer.shared_down;
    shared.gate_bias = shared.up_bias = shared.down_bias = nullptr;
    return shared;
}

inline void shared_gate_up(const Member& member, const MlpLayer& layer, const Step& step, const Routing& r) {
    const i64 pairs = layer.shared_gate.groups / 2;
    gate_up_span(shared_part(layer), 0, step.hidden, step.tokens,
                 layer.shared_router.groups > 0 ? r.shared_shares : nullptr, step.gate, step.up, member.first(pairs),
                 member.last(pairs), step.in_flight, member.scratch);
}

// Add the biases of the chosen experts' down projections, times their shares, to groups first:last of a token's sum.
inline void add_down_biases(const MlpLayer& layer, const Routing& r, i64 token, i64 first, i64 last, double* sum,
                            double shift) {
    if (layer.down_bias == nullptr) return;
    const i64 rows = layer.down.groups * LANES;
    for (i64 j = token * layer.router.chosen; j < (token + 1) * layer.router.chosen; j++) {
        const float* bias = layer.down_bias + r.chosen[j] * rows;
        for (i64 i = LANES * first; i < LANES * last; i += W)
            store(sum + i, add(load(sum + i), round_to_grid(mul(load(bias + i), splat(r.shares[j])), shift)));
    }
}

// A single token: the threads share what all its experts have to do.
inline void mixture_of_one(const Member& member, const MlpLayer& layer, const Step& step, const Routing& r) {
    const i64 pairs = layer.gate.groups / 2, panels = layer.down.panels, groups = layer.down.groups, rows = groups * LANES;
    const i64 inner = r.gate.columns, count = layer.router.chosen;
    const auto expert_gate = [&](i64 j) {
        return Activations{r.gate.x + j * inner, r.gate.values + j * inner, r.gate.scales + j * pairs,
                           r.gate.starts + j * pairs, r.gate.halves + j * pairs, inner};
    };
    const i64 begin = member.first(count * pairs), end = member.last(count * pairs);
    for (i64 j = 0; j < count; j++) {
        const i64 first = begin > j * pairs ? begin - j * pairs : 0;
        const i64 last = end - j * pairs < pairs ? end - j * pairs : pairs;
        gate_up_span(layer, r.chosen[j], step.hidden, 1, r.shares + j, expert_gate(j), r.up + j * inner, first, last,
                     step.in_flight, member.scratch);
    }
    shared_gate_up(member, layer, step, r);
    member.did(Part::GATE_UP);
    member.barrier();
    const double shift = step.shifts == nullptr ? GRID_SHIFT : step.shifts[0];
    double* sums = reinterpret_cast<double*>(r.end) + member.thread * rows;
    for (i64 i = 0; i < rows; i++) sums[i] = 0.0;
    const i64 begin_panel = member.first(count * panels), end_panel = member.last(count * panels);
    for (i64 j = 0; j < count; j++) {
        const i64 first = begin_panel > j * panels ? begin_panel - j * panels : 0;
        const i64 last = end_panel - j * panels < panels ? end_panel - j * panels : panels;
        if (last > first)
            add_panels(layer.down, r.chosen[j], expert_gate(j), first, last, 0, groups, sums, step.in_flight, shift);
    }
    const i64 first_panel = member.first(layer.shared_down.panels), last_panel = member.last(layer.shared_down.panels);
    if (last_panel > first_panel)
        add_panels(layer.shared_down, 0, step.gate, first_panel, last_panel, 0, groups, sums, step.in_flight, shift);
    member.did(Part::DOWN);
    member.barrier();
    const double* all = reinterpret_cast<const double*>(r.end);
    for (i64 i = LANES * member.first(groups); i < LANES * member.last(groups); i++) {
        double total = 0.0;  // multiples of the grid: any order gives the same sum
        for (i64 thread = 0; thread < member.threads; thread++) total += all[thread * rows + i];
        step.partial[i] = total;
    }
    add_down_biases(layer, r, 0, member.first(groups), member.last(groups), step.partial, shift);
}

// step.partial = each token's chosen experts' SwiGLU of step.hidden, times their shares, and the shared expert's:
// float64 [tokens, hidden].
inline void mixture(const Member& member, const MlpLayer& layer, const Step& step) {
    const Routing r = Routing::in(Arena{member.shared}, layer, step);
    route(member, layer, step, r);
    if (step.tokens == 1) return mixture_of_one(member, layer, step, r);
    if (member.thread == 0) r.sort(layer, step.tokens);
    member.did(Part::ROUTER);
    member.barrier();
    const i64 all = step.tokens * layer.router.chosen;
    gather(layer, step, r, member.first(all), member.last(all));
    member.did(Part::ROUTER);
    member.barrier();
    const i64 pairs = layer.gate.groups / 2, rows = layer.down.groups * LANES;
    for (i64 e = 0; e < layer.gate.experts; e++)
        if (r.count(e) > 0)
            gate_up_span(layer, e, r.of(r.x, e), r.count(e), r.pair_shares + r.ends[e], r.of(r.gate, e),
                         r.up + r.ends[e] * r.gate.columns, member.first(pairs), member.last(pairs), step.in_flight,
                         member.scratch);
    shared_gate_up(member, layer, step, r);
    member.did(Part::GATE_UP);
    member.barrier();
    const i64 first = member.first(layer.down.groups), last = member.last(layer.down.groups);
    for (i64 t = 0; t < step.tokens; t++)
        std::memset(step.partial + t * rows + LANES * first, 0, (last - first) * LANES * sizeof(double));
    for (i64 e = 0; e < layer.gate.experts; e++)
        if (r.count(e) > 0)
            add_rows(layer.down, e, r.of(r.gate, e), r.count(e), first, last,
                     Output{step.partial, rows, r.tokens + r.ends[e], step.shifts}, member.scratch);
    if (layer.shared_down.panels > 0)
        add_rows(layer.shared_down, 0, step.gate, step.tokens, first, last, Output{step.partial, rows, nullptr, step.shifts},
                 member.scratch);
    for (i64 t = 0; t < step.tokens; t++)
        add_down_biases(layer, r, t, first, last, step.partial + t * rows,
                        step.shifts == nullptr ? GRID_SHIFT : step.shifts[t]);
    member.did(Part::DOWN);
}

inline i64 mixture_shared_bytes(const MlpLayer& layer, const Step& step, i64 threads) {
    u8* const base = reinterpret_cast<u8*>(64);
    const Routing r = Routing::in(Arena{base}, layer, step);
    return r.end - base + threads * layer.down.groups * LANES * static_cast<i64>(sizeof(double));
}

}  // namespace mpillama
