// The first half of a decoder layer with multi-head latent attention (https://arxiv.org/abs/2405.04434), in one form for
// prompts and single tokens: k_b is multiplied into the queries and v_b with what attention gives, so that keys and values
// are never expanded and the bits do not depend on how a prompt is cut.
//
// step.k holds the compressed queries, step.v the compressed keys and values, step.latent first the normalised queries and
// then, head by head, the absorbed ones and what attention makes of them; step.context first the heads' channels without
// rotation and then the input of o_proj; step.gates what the indexer reads.
#pragma once
#include "indexer.h"
#include "latent_attention.h"
#include "layers.h"

namespace mpillama {

// What a token leaves in the cache, and its compressed queries after their norm.
inline void compress_token(const LatentLayer& layer, const Step& step, const LatentSizes& sizes, i64 t, float* scratch) {
    if (layer.q_a.groups > 0) {
        const Activations to = as_columns(step.latent, LatentSizes::padded(layer.q_rank));
        float* row = to.x + t * to.columns;
        rms_norm_row(step.k + t * layer.q_a.groups * LANES, layer.q_norm, to.columns, layer.q_rank, layer.latent_eps, row);
        if (has_blocks(layer.q.type) || has_blocks(layer.indexer.q.type))
            quantise_blocks(row, to.columns / BLOCK, to, step.tokens, t, 0);
    }
    const float* kv = step.v + t * layer.kv_a.groups * LANES;
    const i64 half = step.rotary_half;
    for (i64 i = 0; i < sizes.width(); i++) scratch[i] = i < layer.kv_rank ? kv[i] : 0.0f;
    rms_norm_row(scratch, layer.kv_norm, sizes.latent, layer.kv_rank, layer.latent_eps, scratch);
    rotate_to(kv + layer.kv_rank, step.cosines + t * half, step.sines + t * half, half, layer.pairs != 0,
              scratch + sizes.latent);
    if (step.slots[t] >= 0) store_latent(layer.cache, scratch, sizes.width(), step.slots[t]);
    if (has_indexer(layer.indexer)) store_index_key(layer, step, t, scratch);
}

// A head's query: its rotary channels turned in place, the others apart for k_b.
inline void split_query(const LatentLayer& layer, const Step& step, const LatentSizes& sizes, i64 t, i64 head,
                        float* scratch) {
    float* q = step.q + (t * layer.heads + head) * sizes.head;
    const i64 half = step.rotary_half, blocks = sizes.nope / BLOCK;
    const Activations to = as_columns(step.context, layer.heads * sizes.nope);
    float* nope = to.x + t * to.columns + head * sizes.nope;
    for (i64 i = 0; i < sizes.nope; i++) nope[i] = i < layer.nope ? q[i] : 0.0f;
    if (has_blocks(layer.k_b.type)) quantise_blocks(nope, blocks, to, step.tokens, t, head * blocks);
    rotate_to(q + layer.nope, step.cosines + t * half, step.sines + t * half, half, layer.pairs != 0, scratch);
    std::memcpy(q + layer.nope, scratch, layer.rope * sizeof(float));
}

// out[t, h] = head h's rows of a matrix times its columns of x: float32 [tokens, rows of all heads].
inline void head_products(const Member& member, const Matrix& m, i64 heads, const Activations& x, i64 tokens, float* out,
                          i64 in_flight) {
    const i64 first = member.first(m.groups), last = member.last(m.groups), groups = heads > 0 ? m.groups / heads : 1;
    with_type(m.type, [&](auto type) {
        using T = decltype(type);
        for (i64 head = first / groups; head * groups < last; head++)
            column_span<T>(slice<T>(m, 0, 0), Input{x, tokens, head * m.columns}, larger(first, head * groups),
                           smaller(last, (head + 1) * groups), out, m.groups * LANES, in_flight, member.scratch);
    });
}

inline i64 latent_half_scratch_bytes(const LatentLayer& layer) {
    i64 bytes = larger(product_scratch_bytes(layer.o), latent_attention_scratch_bytes(layer));
    bytes = larger(bytes, index_scratch_bytes(layer.indexer));
    const Matrix* const products[] = {&layer.q_a, &layer.q, &layer.kv_a, &layer.k_b, &layer.v_b,
                                      &layer.indexer.q, &layer.indexer.k, &layer.indexer.weights};
    for (const Matrix* m : products)
        if (m->groups > 0) bytes = larger(bytes, product_scratch_bytes(*m));
    return bytes;
}

// Norm, compressed queries and latents, cache, queries of heads; where there is an indexer, the positions of each token.
inline void project_latents(const Member& member, const LatentLayer& layer, const Step& step) {
    const LatentSizes sizes(layer);
    const bool compressed = layer.q_a.groups > 0;
    const Matrix& first = compressed ? layer.q_a : layer.q;
    const i64 tokens = step.tokens, pieces = tokens * layer.heads;
    const Indexer& indexer = layer.indexer;
    const bool chooses = scores_of_token(indexer, step) > 0;
    float* scratch = reinterpret_cast<float*>(member.scratch);
    choose_grids(member, step, layer.hidden_size);
    normalise(member, step.x, tokens, layer.norm, layer.hidden_size, layer.eps,
              has_blocks(first.type) || has_blocks(layer.kv_a.type) || has_blocks(indexer.k.type), step.hidden);
    member.did(Part::NORM);
    member.barrier();
    column_part(member, first, step.hidden, tokens, compressed ? step.k : step.q, step.in_flight);
    column_part(member, layer.kv_a, step.hidden, tokens, step.v, step.in_flight);
    if (has_indexer(indexer)) {
        const IndexRows rows(indexer, step);
        column_part(member, indexer.k, step.hidden, tokens, rows.keys, step.in_flight);
        if (chooses) column_part(member, indexer.weights, step.hidden, tokens, rows.weights, step.in_flight);
    }
    member.did(Part::QKV);
    member.barrier();
    for (i64 t = member.first(tokens); t < member.last(tokens); t++) compress_token(layer, step, sizes, t, scratch);
    member.did(Part::ROPE);
    member.barrier();
    if (compressed) {
        const Activations queries = as_columns(step.latent, LatentSizes::padded(layer.q_rank));
        column_part(member, layer.q, queries, tokens, step.q, step.in_flight);
        if (chooses) column_part(member, indexer.q, queries, tokens, IndexRows(indexer, step).queries, step.in_flight);
        member.did(Part::QKV);
        member.barrier();
    }
    for (i64 i = member.first(pieces); i < member.last(pieces); i++)
        split_query(layer, step, sizes, i / layer.heads, i % layer.heads, scratch);
    member.did(Part::ROPE);
    if (chooses) choose_positions(member, layer, step);
    member.did(Part::ATTENTION);
    member.barrier();
    const Activations latents = as_columns(step.latent, layer.heads * sizes.latent);
    head_products(member, layer.k_b, layer.heads, as_columns(step.context, layer.heads * sizes.nope), tokens, latents.x,
                  step.in_flight);
    member.did(Part::QKV);
    member.barrier();
}

// What attention gives of the latents times v_b, o_proj: step.partial is this rank's part of the sum.
inline void project_attended_latents(const Member& member, const LatentLayer& layer, const Step& step) {
    const i64 tokens = step.tokens;
    const Activations latents = as_columns(step.latent, layer.heads * LatentSizes(layer).latent);
    const Activations context = as_columns(step.context, layer.v_b.groups * LANES);
    head_products(member, layer.v_b, layer.heads, latents, tokens, context.x, step.in_flight);
    member.did(Part::O_PROJ);
    member.barrier();
    if (has_blocks(layer.o.type)) {
        const i64 blocks = context.columns / BLOCK;
        for (i64 i = member.first(tokens * blocks); i < member.last(tokens * blocks); i++)
            quantise_blocks(context.x + i * BLOCK, 1, context, tokens, i / blocks, i % blocks);
        member.did(Part::O_PROJ);
        member.barrier();
    }
    row_parallel(member, layer.o, context, tokens, step.partial, step.in_flight, Part::O_PROJ, step.shifts);
    member.did(Part::O_PROJ);
}

inline void latent_half(const Member& member, const LatentLayer& layer, const Step& step) {
    const LatentSizes sizes(layer);
    project_latents(member, layer, step);
    attend_latents(member, layer, step, sizes, as_columns(step.latent, layer.heads * sizes.latent));
    member.did(Part::ATTENTION);
    member.barrier();
    project_attended_latents(member, layer, step);
}

}  // namespace mpillama
