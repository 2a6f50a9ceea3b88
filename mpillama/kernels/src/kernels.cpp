// What Python calls (mpillama/kernels/library.py), compiled once for each instruction set.
#include <new>

#include "block_sparse.h"
#include "context_parallel.h"
#include "delta_layer.h"
#include "latent_layer.h"
#include "layers.h"
#include "packed_sums.h"
#include "shared_sum.h"
#include "threads.h"

using namespace mpillama;

#define MPILLAMA_API extern "C" __attribute__((visibility("default")))

namespace {

// Run `body` on all threads of a team.
template <class Body> void run(Team* team, const Body& body) {
    team->run([](const Member& member, const void* body) { (*static_cast<const Body*>(body))(member); }, &body);
}

constexpr i64 FEW_BYTES = 32 * 1024;

// A team's own copy of small work is not worth waking the others: then thread 0 does it alone.
template <class Body> void run_over(Team* team, i64 units, i64 bytes, const Body& body) {
    if (bytes < FEW_BYTES) {
        const Member member = team->member(0);
        member.begin();
        body(0, units);
        member.did(Part::RESIDUAL);
    } else {
        run(team, [&](const Member& member) {
            body(member.first(units), member.last(units));
            member.did(Part::RESIDUAL);
        });
    }
}

constexpr i64 NO_MEMORY = 0, DONE = 1, LATE = 2;

template <class Half> i64 run_half(Team* team, const Step& step, Sum* sum, const Half& half) {
    Step own = step;
    own.partial = addends(sum, own);
    restart(sum, team->threads);
    run(team, [&](const Member& member) {
        half(member, own);
        if (sum != nullptr) add_up(member, *sum, own);
    });
    return sum == nullptr || finished(*sum, own, team->threads) ? DONE : LATE;
}

}  // namespace

MPILLAMA_API Team* mpillama_start_team(i64 threads, i64 spins, const i32* cpus) {
    return start_team(threads, spins, cpus);
}

MPILLAMA_API void mpillama_end_team(Team* team) { end_team(team, team->threads - 1); }

// The halves of a layer: with a sum their result goes to the residual stream, without one it is left in step->partial.
// They return 0 when there is not enough memory for their scratch, 2 when other ranks are late, else 1.
MPILLAMA_API i64 mpillama_attention_half(Team* team, const AttentionLayer* layer, const Step* step, Sum* sum) {
    const i64 each = attention_half_scratch_bytes(*layer);
    const i64 common = larger(attention_shared_bytes(*layer, *step, team->threads),
                              row_shared_bytes(layer->o, step->tokens, team->threads));
    if (!team->reserve(each, common)) return NO_MEMORY;
    return run_half(team, *step, sum, [&](const Member& member, const Step& own) { attention_half(member, *layer, own); });
}

// The first half in two pieces: what is in step->squares after the first is to be summed over ranks before the second.
MPILLAMA_API i64 mpillama_project_and_sum(Team* team, const AttentionLayer* layer, const Step* step) {
    if (!team->reserve(attention_half_scratch_bytes(*layer), 0)) return NO_MEMORY;
    run(team, [&](const Member& member) { project_and_sum(member, *layer, *step); });
    return DONE;
}

MPILLAMA_API i64 mpillama_attend_projected(Team* team, const AttentionLayer* layer, const Step* step, Sum* sum) {
    const i64 common = larger(attention_shared_bytes(*layer, *step, team->threads),
                              row_shared_bytes(layer->o, step->tokens, team->threads));
    if (!team->reserve(attention_half_scratch_bytes(*layer), common)) return NO_MEMORY;
    return run_half(team, *step, sum, [&](const Member& member, const Step& own) { attend_projected(member, *layer, own); });
}

MPILLAMA_API i64 mpillama_block_sparse_half(Team* team, const BlockSparseLayer* layer, const Step* step, Sum* sum) {
    const i64 common = larger(block_sparse_shared_bytes(*layer, *step, team->threads),
                              row_shared_bytes(layer->attention.o, step->tokens, team->threads));
    if (!team->reserve(block_sparse_scratch_bytes(*layer), common)) return NO_MEMORY;
    return run_half(team, *step, sum, [&](const Member& member, const Step& own) {
        block_sparse_half(member, *layer, own);
    });
}

MPILLAMA_API i64 mpillama_latent_half(Team* team, const LatentLayer* layer, const Step* step, Sum* sum) {
    const i64 common = larger(larger(latent_attention_shared_bytes(*layer, *step, team->threads),
                                     index_shared_bytes(layer->indexer, *step)),
                              row_shared_bytes(layer->o, step->tokens, team->threads));
    if (!team->reserve(latent_half_scratch_bytes(*layer), common)) return NO_MEMORY;
    return run_half(team, *step, sum, [&](const Member& member, const Step& own) { latent_half(member, *layer, own); });
}

// A first half in pieces, where ranks hold parts of the positions (context_parallel.h): queries, keys and values of this
// rank's heads; then, with those of all heads, records of this rank's positions; then, with all ranks' records of this
// rank's heads, their context; last what is left of the half. `whole` has the heads of all ranks.
MPILLAMA_API i64 mpillama_project(Team* team, const AttentionLayer* layer, const Step* step) {
    if (!team->reserve(attention_half_scratch_bytes(*layer), 0)) return NO_MEMORY;
    run(team, [&](const Member& member) { project(member, *layer, *step); });
    return DONE;
}

// out float32 [tokens, channels of the queries and of `kv_count` KV heads from `first_kv` on, keys and then values].
MPILLAMA_API i64 mpillama_rotate(Team* team, const AttentionLayer* layer, const Step* step, i64 first_kv, i64 kv_count,
                                 float* out) {
    run(team, [&](const Member& member) {
        rotate_to_message(*layer, *step, member.first(step->tokens), member.last(step->tokens), first_kv, kv_count, out);
        member.did(Part::ROPE);
    });
    return DONE;
}

MPILLAMA_API i64 mpillama_attend_pieces(Team* team, const AttentionLayer* whole, const Step* step, const Pieces* pieces) {
    if (!team->reserve(pieces_scratch_bytes(*whole, *pieces), 0)) return NO_MEMORY;
    run(team, [&](const Member& member) { attend_pieces(member, *whole, *step, *pieces); });
    return DONE;
}

MPILLAMA_API i64 mpillama_combine_pieces(Team* team, const AttentionLayer* layer, const Step* step, const Pieces* pieces) {
    if (!team->reserve(pieces_scratch_bytes(*layer, *pieces), 0)) return NO_MEMORY;
    run(team, [&](const Member& member) { combine_pieces(member, *layer, *step, *pieces); });
    return DONE;
}

MPILLAMA_API i64 mpillama_project_attended(Team* team, const AttentionLayer* layer, const Step* step, Sum* sum) {
    const i64 common = row_shared_bytes(layer->o, step->tokens, team->threads);
    if (!team->reserve(attention_half_scratch_bytes(*layer), common)) return NO_MEMORY;
    return run_half(team, *step, sum, [&](const Member& member, const Step& own) { project_attended(member, *layer, own); });
}

MPILLAMA_API i64 mpillama_project_latents(Team* team, const LatentLayer* layer, const Step* step, float* queries) {
    if (!team->reserve(latent_half_scratch_bytes(*layer), 0)) return NO_MEMORY;
    run(team, [&](const Member& member) {
        project_latents(member, *layer, *step);
        scale_latent_queries(member, *layer, *step, queries);
    });
    return DONE;
}

MPILLAMA_API i64 mpillama_attend_latent_pieces(Team* team, const LatentLayer* whole, const Step* step,
                                               const Pieces* pieces) {
    if (!team->reserve(pieces_scratch_bytes(*whole, *pieces), 0)) return NO_MEMORY;
    run(team, [&](const Member& member) { attend_latent_pieces(member, *whole, *step, *pieces); });
    return DONE;
}

MPILLAMA_API i64 mpillama_combine_latent_pieces(Team* team, const LatentLayer* layer, const Step* step,
                                                const Pieces* pieces) {
    if (!team->reserve(pieces_scratch_bytes(*layer, *pieces), 0)) return NO_MEMORY;
    run(team, [&](const Member& member) { combine_latent_pieces(member, *layer, *step, *pieces); });
    return DONE;
}

MPILLAMA_API i64 mpillama_project_attended_latents(Team* team, const LatentLayer* layer, const Step* step, Sum* sum) {
    const i64 common = row_shared_bytes(layer->o, step->tokens, team->threads);
    if (!team->reserve(latent_half_scratch_bytes(*layer), common)) return NO_MEMORY;
    return run_half(team, *step, sum, [&](const Member& member, const Step& own) {
        project_attended_latents(member, *layer, own);
    });
}

MPILLAMA_API i64 mpillama_delta_half(Team* team, const DeltaLayer* layer, const Step* step, Sum* sum) {
    const i64 common = row_shared_bytes(layer->o, step->tokens, team->threads);
    if (!team->reserve(delta_half_scratch_bytes(*layer), common)) return NO_MEMORY;
    return run_half(team, *step, sum, [&](const Member& member, const Step& own) { delta_half(member, *layer, own); });
}

MPILLAMA_API i64 mpillama_mlp_half(Team* team, const MlpLayer* layer, const Step* step, Sum* sum) {
    const i64 common = layer->router.matrix.groups > 0 ? mixture_shared_bytes(*layer, *step, team->threads)
                                                : row_shared_bytes(layer->down, step->tokens, team->threads);
    if (!team->reserve(mlp_half_scratch_bytes(*layer), common)) return NO_MEMORY;
    return run_half(team, *step, sum, [&](const Member& member, const Step& own) { mlp_half(member, *layer, own); });
}

// Which experts tokens take by their logits, float32 [tokens, width], which are overwritten: i64 and float32
// [tokens, chosen], the best expert first. Returns 0 when there is no memory.
MPILLAMA_API i64 mpillama_choose_experts(Team* team, const Router* router, i64 experts, float* logits, i64 tokens,
                                         i64* chosen, float* shares) {
    const i64 width = router->matrix.groups * LANES, room = Routing::room_to_choose(*router);
    if (!team->reserve(0, room * static_cast<i64>(sizeof(float)))) return NO_MEMORY;
    float* choices = reinterpret_cast<float*>(team->member(0).shared);
    for (i64 t = 0; t < tokens; t++)
        choose_experts(*router, experts, logits + t * width, choices, chosen + t * router->chosen,
                       shares + t * router->chosen);
    return DONE;
}

// Wait on for ranks that were late.
MPILLAMA_API i64 mpillama_finish_sum(Team* team, const Step* step, Sum* sum) {
    Step own = *step;
    own.partial = addends(sum, own);
    run(team, [&](const Member& member) { add_up(member, *sum, own); });
    return finished(*sum, own, team->threads) ? DONE : LATE;
}

// x += factor * (total rounded to float32, then the bias (or null)); [tokens, width].
MPILLAMA_API void mpillama_add_rounded(Team* team, float* x, const double* total, const float* bias, double factor,
                                       i64 tokens, i64 width) {
    run_over(team, tokens, tokens * width * 12, [&](i64 first, i64 last) {
        for (i64 t = first; t < last; t++)
            add_rounded(x + t * width, total + t * width, bias, static_cast<float>(factor), width);
    });
}

// x += factor * RMSNorm(addend), which is overwritten; [tokens, width], of which `size` are no padding.
MPILLAMA_API void mpillama_add_normalised(Team* team, float* x, float* addend, i64 tokens, i64 width, const float* weight,
                                          i64 size, double eps, double factor) {
    run_over(team, tokens, tokens * width * 12, [&](i64 first, i64 last) {
        const Vf by = splat(static_cast<float>(factor));
        for (i64 t = first; t < last; t++) {
            float *to = x + t * width, *row = addend + t * width;
            rms_norm_row(row, weight, width, size, eps, row);
            for (i64 i = 0; i < width; i += W) store(to + i, add(load(to + i), mul(load(row + i), by)));
        }
    });
}

// out = total rounded to float32, times a factor; [tokens, width].
MPILLAMA_API void mpillama_round_to_float(Team* team, const double* total, float* out, double factor, i64 tokens,
                                          i64 width) {
    run_over(team, tokens, tokens * width * 12, [&](i64 first, i64 last) {
        for (i64 i = first * width; i < last * width; i++)
            out[i] = static_cast<float>(total[i]) * static_cast<float>(factor);
    });
}

// logits / divisor, bent to +-cap unless that is 0; `count` is a multiple of 16.
MPILLAMA_API void mpillama_scale_logits(Team* team, float* logits, i64 count, double divisor, double cap) {
    const i64 groups = count / LANES;
    run_over(team, groups, count * 4, [&](i64 first, i64 last) {
        const Vf by = splat(static_cast<float>(divisor));
        for (i64 i = first * LANES; i < last * LANES; i += W) store(logits + i, div(load(logits + i), by));
        if (cap > 0.0) soft_cap(logits + first * LANES, static_cast<float>(cap), (last - first) * LANES);
    });
}

MPILLAMA_API void mpillama_rope_angles(const i32* positions, i64 tokens, const float* inverse_frequencies, i64 half,
                                       double factor, float* cosines, float* sines) {
    rope_angles(positions, tokens, inverse_frequencies, half, factor, cosines, sines);
}

// out[t] = row rows[t] of a matrix, zeros where rows[t] is negative (another rank's row); float64 [tokens, columns].
MPILLAMA_API void mpillama_embed(const Matrix* matrix, const i64* rows, i64 tokens, double* out) {
    with_type(matrix->type, [&](auto type) {
        using T = decltype(type);
        const Slice w = slice<T>(*matrix, 0, 0);
        for (i64 t = 0; t < tokens; t++) {
            double* to = out + t * w.columns;
            for (i64 i = 0; i < w.columns; i++) to[i] = 0.0;
            if (rows[t] < 0) continue;
            const i64 group = rows[t] / LANES;
            const int lane = static_cast<int>(rows[t] % LANES);
            if constexpr (T::BLOCKS) {
                const i64 blocks = w.columns / BLOCK;
                ScalePlace<typename T::Scales> scales(w.scales, group * blocks);
                for (i64 b = 0; b < blocks; b++, scales.advance()) {
                    float row[BLOCK];
                    block_row<T>(w.values + (group * blocks + b) * T::bytes, scales, lane, row);
                    for (int i = 0; i < BLOCK; i++) to[b * BLOCK + i] += static_cast<double>(row[i]);
                }
            } else {
                ScalePlace<typename T::Scales> scales(w.scales, group * (w.columns / BLOCK));
                for (i64 k = 0; k < w.columns; k++) {
                    float lanes[W];
                    Vf rows = T::load(w.values + (group * w.columns + k) * T::bytes, lane / W);
                    if constexpr (SCALED_FLOATS<T>) {
                        rows = mul(rows, scale_of(scales, lane / W));
                        if (k % BLOCK == BLOCK - 1) scales.advance();
                    }
                    store(lanes, rows);
                    to[k] += static_cast<double>(lanes[lane % W]);
                }
            }
        }
    });
}

// h = RMSNorm(x), with its quantised form if `quantised`; x float32 [tokens, h->columns].
MPILLAMA_API void mpillama_normalise(Team* team, const float* x, i64 tokens, const float* weight, i64 size, double eps,
                                     i64 quantised, const Activations* h) {
    run(team, [&](const Member& member) { 
        normalise(member, x, tokens, weight, size, eps, quantised != 0, *h);
        member.did(Part::NORM);
    });
}

// out = a column-parallel matrix times h: float32 [tokens, rows].
MPILLAMA_API i64 mpillama_column_parallel(Team* team, const Matrix* matrix, const Activations* h, i64 tokens, float* out,
                                          i64 in_flight) {
    if (!team->reserve(product_scratch_bytes(*matrix), 0)) return 0;
    run(team, [&](const Member& member) {
        column_part(member, *matrix, *h, tokens, out, in_flight);
        member.did(Part::COLUMN);
    });
    return 1;
}

// out = a row-parallel matrix times h, on the grid: float64 [tokens, rows].
MPILLAMA_API i64 mpillama_row_parallel(Team* team, const Matrix* matrix, const Activations* h, i64 tokens, double* out,
                                       i64 in_flight) {
    if (!team->reserve(product_scratch_bytes(*matrix), row_shared_bytes(*matrix, tokens, team->threads))) return 0;
    run(team, [&](const Member& member) { row_parallel(member, *matrix, *h, tokens, out, in_flight, Part::COLUMN); });
    return 1;
}

// The int8 blocks of h->x, token by token.
MPILLAMA_API void mpillama_quantise(const Activations* h, i64 tokens) {
    for (i64 t = 0; t < tokens; t++) quantise_blocks(h->x + t * h->columns, h->columns / BLOCK, *h, tokens, t, 0);
}

MPILLAMA_API i64 mpillama_sum_shared(const Window* window, double* partial, i64 count, i64 sequence, i64 posted, i64 spins,
                                     i64 yields) {
    return sum_shared(*window, partial, count, sequence, posted != 0, spins, yields);
}

// Of the first rank of a host, as shared_sum.h says.
MPILLAMA_API i64 mpillama_sum_host(const Window* window, i64 count, i64 sequence, i64 spins, i64 yields) {
    return sum_host(*window, count, sequence, spins, yields);
}

MPILLAMA_API void mpillama_publish(const Window* window, i64 sequence) {
    window->published->store(sequence, std::memory_order_release);
}

// float64 [count] in as few bits as they need, as packed_sums.h says; returns the bytes.
MPILLAMA_API i64 mpillama_pack(const double* values, i64 count, u8* out) { return pack(values, count, out); }

// totals += what was packed, or = with `begin`; returns 0 if the bytes are no such message.
MPILLAMA_API i64 mpillama_unpack(const u8* in, i64 bytes, i64 count, double* totals, i64 begin) {
    return unpack(in, bytes, count, totals, begin != 0);
}

// Write to every page of fresh memory, each thread to the part of an array that it has in the products.
MPILLAMA_API void mpillama_touch_pages(Team* team, u8* memory, i64 bytes) {
    constexpr i64 page = 4096;
    const i64 pages = (bytes + page - 1) / page;
    run(team, [&](const Member& member) {
        for (i64 p = member.first(pages); p < member.last(pages); p++) memory[p * page] = 0;
    });
}

// Read memory once, each thread `bytes` / threads of it rounded down to 512; results i64 [threads].
MPILLAMA_API void mpillama_read_memory(Team* team, const u8* memory, i64 bytes, i64* results) {
    run(team, [&](const Member& member) {
        constexpr int lines = 8;
        const i64 share = bytes / member.threads / 512 * 512;
        const u8* from = memory + member.thread * share;
        Vi sums[lines] = {};
        for (i64 i = 0; i < share; i += 64 * lines) {
            for (int line = 0; line < lines; line++) {
                prefetch(from + i + 64 * line + 4096);
                for (int part = 0; part < PARTS; part++)
                    sums[line] = bit_xor(sums[line],
                                         load(reinterpret_cast<const i32*>(from + i + 64 * line) + W * part));
            }
        }
        i32 lanes[W];
        i64 total = 0;
        for (const Vi& sum : sums) {
            store(lanes, sum);
            for (i32 lane : lanes) total ^= lane;
        }
        results[member.thread] = total;
    });
}

// Begin (or end) to count what the threads' time goes to; 0 if there is no memory for it.
MPILLAMA_API i64 mpillama_watch(Team* team, i64 wanted) { return team->watch(wanted != 0); }

// Nanoseconds since then: i64 [threads, parts], in the order of Part.
MPILLAMA_API void mpillama_times(Team* team, i64* nanoseconds) {
    constexpr int count = static_cast<int>(Part::COUNT);
    for (i64 thread = 0; thread < team->threads; thread++)
        for (int part = 0; part < count; part++)
            nanoseconds[thread * count + part] = team->clocks[thread].nanoseconds[part];
}

// A region of `count` barriers, to be timed.
MPILLAMA_API void mpillama_barriers(Team* team, i64 count) {
    run(team, [&](const Member& member) {
        for (i64 i = 0; i < count; i++) member.barrier();
    });
}

// The sizes and offsets of the structs that Python describes too, one after the other; -1 behind the last.
MPILLAMA_API i64 mpillama_offset(i64 index) {
    static const i64 offsets[] = {
        sizeof(Matrix), offsetof(Matrix, values), offsetof(Matrix, scales), offsetof(Matrix, supers), offsetof(Matrix, type),
        offsetof(Matrix, experts), offsetof(Matrix, panels), offsetof(Matrix, groups), offsetof(Matrix, columns),
        offsetof(Matrix, super_columns),
        sizeof(Activations), offsetof(Activations, x), offsetof(Activations, values), offsetof(Activations, scales),
        offsetof(Activations, starts), offsetof(Activations, halves), offsetof(Activations, columns),
        sizeof(Cache), offsetof(Cache, keys), offsetof(Cache, key_scales), offsetof(Cache, values),
        offsetof(Cache, value_scales), offsetof(Cache, type),
        sizeof(AttentionLayer), offsetof(AttentionLayer, q), offsetof(AttentionLayer, k), offsetof(AttentionLayer, v),
        offsetof(AttentionLayer, o), offsetof(AttentionLayer, gate), offsetof(AttentionLayer, cache), offsetof(AttentionLayer, norm),
        offsetof(AttentionLayer, q_bias), offsetof(AttentionLayer, k_bias), offsetof(AttentionLayer, v_bias),
        offsetof(AttentionLayer, q_norm), offsetof(AttentionLayer, k_norm), offsetof(AttentionLayer, sinks),
        offsetof(AttentionLayer, head_start),
        offsetof(AttentionLayer, eps), offsetof(AttentionLayer, scale), offsetof(AttentionLayer, soft_cap),
        offsetof(AttentionLayer, hidden_size), offsetof(AttentionLayer, heads), offsetof(AttentionLayer, kv_heads),
        offsetof(AttentionLayer, head_dim), offsetof(AttentionLayer, channels), offsetof(AttentionLayer, window),
        offsetof(AttentionLayer, chunk), offsetof(AttentionLayer, head_norm), offsetof(AttentionLayer, q_width),
        offsetof(AttentionLayer, k_width), offsetof(AttentionLayer, first_counted),
        sizeof(IndexKeys), offsetof(IndexKeys, values), offsetof(IndexKeys, type),
        sizeof(BlockSparseLayer), offsetof(BlockSparseLayer, attention), offsetof(BlockSparseLayer, index_q),
        offsetof(BlockSparseLayer, index_k), offsetof(BlockSparseLayer, index_keys),
        offsetof(BlockSparseLayer, index_q_norm), offsetof(BlockSparseLayer, index_k_norm),
        offsetof(BlockSparseLayer, index_dim), offsetof(BlockSparseLayer, index_channels),
        offsetof(BlockSparseLayer, block), offsetof(BlockSparseLayer, chosen), offsetof(BlockSparseLayer, local),
        sizeof(LatentCache), offsetof(LatentCache, values), offsetof(LatentCache, scales), offsetof(LatentCache, type),
        sizeof(Indexer), offsetof(Indexer, q), offsetof(Indexer, k), offsetof(Indexer, weights), offsetof(Indexer, cache),
        offsetof(Indexer, k_norm), offsetof(Indexer, k_bias), offsetof(Indexer, eps), offsetof(Indexer, heads),
        offsetof(Indexer, channels), offsetof(Indexer, chosen), offsetof(Indexer, pairs),
        sizeof(LatentLayer), offsetof(LatentLayer, q_a), offsetof(LatentLayer, q), offsetof(LatentLayer, kv_a),
        offsetof(LatentLayer, k_b), offsetof(LatentLayer, v_b), offsetof(LatentLayer, o), offsetof(LatentLayer, cache),
        offsetof(LatentLayer, indexer),
        offsetof(LatentLayer, norm), offsetof(LatentLayer, q_norm), offsetof(LatentLayer, kv_norm),
        offsetof(LatentLayer, eps), offsetof(LatentLayer, latent_eps), offsetof(LatentLayer, scale),
        offsetof(LatentLayer, hidden_size), offsetof(LatentLayer, heads), offsetof(LatentLayer, q_rank),
        offsetof(LatentLayer, kv_rank), offsetof(LatentLayer, nope), offsetof(LatentLayer, rope),
        offsetof(LatentLayer, pairs),
        sizeof(States), offsetof(States, tails), offsetof(States, sums),
        sizeof(DeltaLayer), offsetof(DeltaLayer, q), offsetof(DeltaLayer, k), offsetof(DeltaLayer, v),
        offsetof(DeltaLayer, z), offsetof(DeltaLayer, a), offsetof(DeltaLayer, b), offsetof(DeltaLayer, o),
        offsetof(DeltaLayer, states), offsetof(DeltaLayer, norm), offsetof(DeltaLayer, q_taps),
        offsetof(DeltaLayer, k_taps), offsetof(DeltaLayer, v_taps), offsetof(DeltaLayer, decays),
        offsetof(DeltaLayer, biases), offsetof(DeltaLayer, head_norm), offsetof(DeltaLayer, head_start),
        offsetof(DeltaLayer, eps), offsetof(DeltaLayer, hidden_size), offsetof(DeltaLayer, key_heads),
        offsetof(DeltaLayer, value_heads), offsetof(DeltaLayer, first_head), offsetof(DeltaLayer, key_dim),
        offsetof(DeltaLayer, value_dim), offsetof(DeltaLayer, key_channels), offsetof(DeltaLayer, value_channels),
        sizeof(Router), offsetof(Router, matrix), offsetof(Router, bias), offsetof(Router, correction),
        offsetof(Router, epsilon), offsetof(Router, scaling), offsetof(Router, scores), offsetof(Router, chosen),
        offsetof(Router, renormalise), offsetof(Router, groups), offsetof(Router, chosen_groups),
        sizeof(MlpLayer), offsetof(MlpLayer, gate), offsetof(MlpLayer, up), offsetof(MlpLayer, down),
        offsetof(MlpLayer, router), offsetof(MlpLayer, shared_gate), offsetof(MlpLayer, shared_up),
        offsetof(MlpLayer, shared_down), offsetof(MlpLayer, shared_router), offsetof(MlpLayer, norm),
        offsetof(MlpLayer, gate_bias), offsetof(MlpLayer, up_bias), offsetof(MlpLayer, down_bias),
        offsetof(MlpLayer, eps), offsetof(MlpLayer, alpha), offsetof(MlpLayer, limit), offsetof(MlpLayer, hidden_size),
        offsetof(MlpLayer, activation), offsetof(MlpLayer, weighs_inputs),
        sizeof(Step), offsetof(Step, tokens), offsetof(Step, x), offsetof(Step, hidden), offsetof(Step, context),
        offsetof(Step, gate), offsetof(Step, latent), offsetof(Step, q), offsetof(Step, k), offsetof(Step, v),
        offsetof(Step, up), offsetof(Step, gates), offsetof(Step, partial), offsetof(Step, squares),
        offsetof(Step, shifts), offsetof(Step, chosen), offsetof(Step, cosines), offsetof(Step, sines), offsetof(Step, query_factors),
        offsetof(Step, slots), offsetof(Step, segments), offsetof(Step, tables), offsetof(Step, states),
        offsetof(Step, snapshots), offsetof(Step, rotary_half), offsetof(Step, segment_count),
        offsetof(Step, table_width), offsetof(Step, snapshot_count), offsetof(Step, in_flight),
        sizeof(Sum), offsetof(Sum, window), offsetof(Sum, bias), offsetof(Sum, progress), offsetof(Sum, addend),
        offsetof(Sum, factor), offsetof(Sum, sequence),
        offsetof(Sum, spins), offsetof(Sum, yields), offsetof(Sum, waited),
        sizeof(Pieces), offsetof(Pieces, ranks), offsetof(Pieces, rank), offsetof(Pieces, tokens),
        offsetof(Pieces, first), offsetof(Pieces, last), offsetof(Pieces, owner_width), offsetof(Pieces, owners),
        offsetof(Pieces, head_start), offsetof(Pieces, counts), offsetof(Pieces, received_before),
        offsetof(Pieces, queries), offsetof(Pieces, keys), offsetof(Pieces, values), offsetof(Pieces, sent),
        offsetof(Pieces, received),
        sizeof(Window), offsetof(Window, slots), offsetof(Window, flags), offsetof(Window, ranks),
        offsetof(Window, rank), offsetof(Window, capacity), offsetof(Window, totals), offsetof(Window, published),
    };
    const i64 count = sizeof offsets / sizeof offsets[0];
    return index < count ? offsets[index] : -1;
}
