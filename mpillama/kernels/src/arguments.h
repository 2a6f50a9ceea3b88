// What Python passes to the kernels: structs that are made once for a layer and once for a step.
//
// mpillama/kernels/arguments.py describes the same structs; a test compares sizes and offsets (MPILLAMA_STRUCTS).
#pragma once
#include "lanes.h"

namespace mpillama {

// A rank's slice of a weight matrix in row lanes. Column-parallel: panels is 1. With experts there is one such slice for
// each, one after the other. `supers` are numbers that a row has for every `super_columns` k-values, which divide a panel.
struct Matrix {
    const u8* values;
    const u8* scales;
    const u8* supers;
    i64 type;
    i64 experts;
    i64 panels;
    i64 groups;
    i64 columns;  // of a panel
    i64 super_columns;
};

// float32 [tokens, columns] and the same in int8 blocks, as activations.h says.
struct Activations {
    float* x;
    i8* values;
    float* scales;
    i32* starts;
    i32* halves;
    i64 columns;
};

// One layer's KV cache: [blocks, kv_heads, …], as attention.h says.
struct Cache {
    u8* keys;
    u16* key_scales;
    u8* values;
    u16* value_scales;
    i64 type;
};

// How queries and keys are normalised, if q_norm and k_norm are not null: each head before RoPE or after it, or all heads
// of a projection together.
enum HeadNorm : i64 { BEFORE_ROPE, AFTER_ROPE, WHOLE_PROJECTION };

// Heads lie head_dim (a multiple of 32) apart, of which `channels` are no padding; `head_start` [kv_heads + 1]: the query
// heads of KV head i are head_start[i] : head_start[i + 1]. Norm, biases and norms of heads may be null. A token sees the
// last `window` positions, or those of its own `chunk`; 0 is all. Scores are bent to +-soft_cap, unless it is 0. With
// WHOLE_PROJECTION the projections have q_width and k_width channels on all ranks together, and the KV heads before
// first_counted belong to the rank before, too. `sinks` [heads], or null: a score of each head that takes part in the
// softmax and has no value. With `gate` (else it has no groups) heads are multiplied by the sigmoids of its rows.
struct AttentionLayer {
    Matrix q, k, v, o, gate;
    Cache cache;
    const float *norm, *q_bias, *k_bias, *v_bias, *q_norm, *k_norm, *sinks;
    const i64* head_start;
    double eps, scale, soft_cap;
    i64 hidden_size, heads, kv_heads, head_dim, channels, window, chunk;
    i64 head_norm, q_width, k_width, first_counted;
};

// One layer's index keys, float32 or float16 as `type` says: [blocks, channels, 64].
struct IndexKeys {
    u8* values;
    i64 type;
};

// Attention to the `chosen` blocks of `block` positions that an index chooses, as block_sparse.h says; the last `local`
// ones always. Each KV head has an index query of index_dim channels (a multiple of 32), of which index_channels are no
// padding.
struct BlockSparseLayer {
    AttentionLayer attention;
    Matrix index_q, index_k;
    IndexKeys index_keys;
    const float *index_q_norm, *index_k_norm;
    i64 index_dim, index_channels, block, chosen, local;
};

// One layer's cache of latents: [blocks, 64, width] numbers, as latent_cache.h says.
struct LatentCache {
    u8* values;
    u16* scales;
    i64 type;
};

// Which positions a token sees, as indexer.h says: `heads` queries of `channels`, one key of a position, weights of heads.
// A layer without matrices (no groups) takes what the layer before it chose. `chosen` is 0 if a token sees all positions.
struct Indexer {
    Matrix q, k, weights;
    LatentCache cache;
    const float *k_norm, *k_bias;
    double eps;
    i64 heads, channels, chosen, pairs;
};

// Multi-head latent attention: queries and, with `pairs`, how their rotary channels stand. Matrices of heads have the
// heads' rows one after the other; the channels of a head are padded to multiples of 32. Without `q_a` (no groups), `q`
// reads the layer's input.
struct LatentLayer {
    Matrix q_a, q, kv_a, k_b, v_b, o;
    LatentCache cache;
    Indexer indexer;
    const float *norm, *q_norm, *kv_norm;
    double eps, latent_eps, scale;
    i64 hidden_size, heads, q_rank, kv_rank, nope, rope, pairs;
};

// One layer's states of sequences, in slots, as delta_layer.h says.
struct States {
    float *tails, *sums;
};

// A gated delta net: heads of queries and keys lie key_dim apart, of values value_dim, multiples of 32, of which
// `key_channels` and `value_channels` are no padding; head_start is as in AttentionLayer. `a` and `b` have the rows of
// all ranks' value heads, of which this one's begin at `first_head`. Taps are [4, this rank's channels]; `decays`
// [value_heads] are -e^A_log, `biases` what is added to a.
struct DeltaLayer {
    Matrix q, k, v, z, a, b, o;
    States states;
    const float *norm, *q_taps, *k_taps, *v_taps, *decays, *biases, *head_norm;
    const i64* head_start;
    double eps;
    i64 hidden_size, key_heads, value_heads, first_head, key_dim, value_dim, key_channels, value_channels;
};

// How tokens choose among experts, as router.h says; without experts `matrix` has no groups. `bias` is added to the
// logits, `correction` to the scores by which experts are chosen; both may be null.
struct Router {
    Matrix matrix;
    const float *bias, *correction;
    double epsilon, scaling;
    i64 scores, chosen, renormalise, groups, chosen_groups;
};

// The last is that of elementwise.h's clamped_silu, which alone reads alpha and limit.
enum Activation : i64 { SILU, GELU_TANH, CLAMPED_SILU };

// A gated MLP, or experts of it chosen by a router, and one that all tokens share: `shared_gate` and so on have no groups
// without it, `shared_router` none if nothing weighs it. With `weighs_inputs` a token's share is a factor of what its
// expert sees, not of its result. The norm may be null, and biases may; of experts biases are
// [experts, rows], and down_bias is there for one rank only.
struct MlpLayer {
    Matrix gate, up, down;
    Router router;
    Matrix shared_gate, shared_up, shared_down, shared_router;
    const float *norm, *gate_bias, *up_bias, *down_bias;
    double eps, alpha, limit;
    i64 hidden_size, activation, weighs_inputs;
};

// The tokens that go through the model together; `segments` [segment_count, 3]: first token, tokens, first position of
// each sequence; `tables` [segment_count, table_width]: its cache blocks; `slots`: where each token's key and value go.
// RoPE turns the first 2 * rotary_half channels of a head, queries are multiplied by `query_factors` [tokens] (or null).
// `squares` [tokens, 4]: sums of squares of queries and keys, as norm.h says. `shifts` [tokens], or null: the grid of what
// half a layer adds to each token, if it is coarser (numbers.h). `chosen`: the positions that a token sees, as indexer.h
// says; layers that follow may see the same.
// Of layers whose past is a state: `states` [segment_count, 2] are the slots that a sequence's state is read from (-1: it
// begins with zeros) and written to, `snapshots` [snapshot_count, 2] a token and a slot that also gets the state behind
// it, by ascending tokens. No slot is written twice, or read by one sequence and written by another.
struct Step {
    i64 tokens;
    float* x;
    Activations hidden, context, gate, latent;
    float *q, *k, *v, *up;
    float* gates;
    double *partial, *squares, *shifts;
    i32* chosen;
    const float *cosines, *sines, *query_factors;
    const i64 *slots, *segments, *tables, *states, *snapshots;
    i64 rotary_half, segment_count, table_width, snapshot_count;
    i64 in_flight;  // row groups that a single token goes through together: 1 or 2, whichever is faster
};

// Where ranks hold parts of the positions, for all heads (context_parallel.h): tokens first : last of a step, of whose
// spans `counts` [ranks, tokens + 1] are on each rank for the tokens before one. `owners` [segment_count, owner_width]:
// the rank of every 16 blocks of a sequence. `head_start` [ranks + 1]: each rank's query heads. Queries [tokens, heads,
// channels], and keys and values [tokens, kv_heads, channels] if they are not known otherwise, are those of all ranks.
// `sent` are records for each rank, one after the other; `received` begins with those of rank 0: of a rank those behind
// received_before[rank] times this rank's heads.
struct Pieces {
    i64 ranks, rank, tokens, first, last, owner_width;
    const i64 *owners, *head_start, *counts, *received_before;
    float *queries, *keys, *values, *sent, *received;
};

}  // namespace mpillama
