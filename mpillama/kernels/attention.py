"""Causal attention over the KV cache: online softmax in fixed blocks of 64 positions.

Positions are the lanes of a score, channels are the lanes of an output, so there is no sum across lanes whose order
could vary. Blocks go in ascending order within spans of 1024 positions; spans are combined in ascending order. Both
sizes are constants of the arithmetic: the bits do not depend on threads, chunking or other sequences.
(Online softmax: https://arxiv.org/abs/1805.02867.)
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from mpillama.kernels.emit import F32, I32, V16F32, V16I16, V16I32, Emit

BLOCK = 64
"""Positions of a cache block."""
SPAN_BLOCKS = 16
"""Blocks of a span; spans may be computed apart and are combined in order."""
TILE_ROWS = 16
"""Most query rows (tokens x heads that share a KV head) that pass over the cache together."""
FAR_BELOW = -1e30
"""The running maximum before any position was seen; finite, so that differences are never NaN."""


def _load_cached(e: Emit, dtype: types.Type, address: ir.Value, index: ir.Value) -> ir.Value:
    """16 cached values as float32."""
    if dtype == types.int16:
        return e.half_to_float(e.load(V16I16, address, e.times(index, 2)))
    return e.load(V16F32, address, e.times(index, 4))


def _make_scores(rows: int) -> Any:
    """Make scores(cache, keys_at, q_at, head_dim, out_at): out[r, p] = sum over d of q[r, d] * keys[d, p]."""

    @intrinsic
    def scores(ctx, cache, keys_at, q_at, head_dim, out_at):
        def codegen(cg, builder, sig, args):
            e = Emit(builder)
            _, keys_at, q_at, head_dim, out_at = args
            for part in range(BLOCK // 16):

                def body(d, sums, part=part):
                    keys = _load_cached(e, cache.dtype, keys_at, e.plus(e.times(d, BLOCK), 16 * part))
                    q = [e.load(F32, q_at, e.times(e.plus(d, e.times(head_dim, r)), 4)) for r in range(rows)]
                    return [e.fma(keys, e.splat(q[r]), sums[r]) for r in range(rows)]

                sums = e.loop(head_dim, 1, [e.fill(F32, 0.0)] * rows, body)
                for r, value in enumerate(sums):
                    e.store(value, out_at, 4 * (BLOCK * r + 16 * part))
            return cg.get_dummy_value()

        return types.void(cache, types.uintp, types.uintp, types.intp, types.uintp), codegen

    return scores


def _make_values(rows: int) -> Any:
    """Make values(cache, values_at, p_at, count, head_dim, out_at): out[r, d] += sum of p[r, i] * values[i, d]."""

    @intrinsic
    def values(ctx, cache, values_at, p_at, count, head_dim, out_at):
        def codegen(cg, builder, sig, args):
            e = Emit(builder)
            _, values_at, p_at, count, head_dim, out_at = args

            def channels(d, _):
                out = [e.plus(out_at, e.times(e.plus(d, e.times(head_dim, r)), 4)) for r in range(rows)]

                def body(i, sums):
                    v = _load_cached(e, cache.dtype, values_at, e.plus(d, e.b.mul(i, head_dim)))
                    p = [e.load(F32, p_at, e.times(i, 4), 4 * BLOCK * r) for r in range(rows)]
                    return [e.fma(v, e.splat(p[r]), sums[r]) for r in range(rows)]

                sums = e.loop(count, 1, [e.load(V16F32, a) for a in out], body)
                for value, address in zip(sums, out, strict=True):
                    e.store(value, address)
                return []

            e.loop(head_dim, 16, [], channels)
            return cg.get_dummy_value()

        return types.void(cache, types.uintp, types.uintp, types.intp, types.intp, types.uintp), codegen

    return values


_scores_1, _scores_4 = _make_scores(1), _make_scores(4)
_values_1, _values_4 = _make_values(1), _make_values(4)


@intrinsic
def _softmax_block(ctx, scores_at, count, maximum_at, sums_at, out_at, head_dim):
    """Turn 64 scores into weights e^(score - maximum) and rescale what was summed under the old maximum.

    Scores from `count` on are masked. maximum float32 [1], sums float32 [16], out float32 [head_dim] are updated.
    """

    def codegen(cg, builder, sig, args):
        e, b = Emit(builder), builder
        scores_at, count, maximum_at, sums_at, out_at, head_dim = args
        limit = e.splat(b.trunc(count, I32))
        masked, top = [], e.fill(F32, FAR_BELOW)
        for part in range(BLOCK // 16):
            place = ir.Constant(V16I32, [ir.Constant(I32, 16 * part + i) for i in range(16)])
            score = e.load(V16F32, scores_at, 64 * part)
            masked.append(b.select(b.icmp_signed("<", place, limit), score, e.fill(F32, float("-inf"))))
            # "Not smaller" lets a NaN through to the maximum, and from there into every weight.
            top = b.select(b.fcmp_unordered(">=", masked[-1], top), masked[-1], top)
        old = e.load(F32, maximum_at)
        new = e.maximum(old, e.max_lane(top))
        correction = e.exp(e.splat(b.fsub(old, new)))
        sums = b.fmul(e.load(V16F32, sums_at), correction)
        for part, score in enumerate(masked):
            weight = e.exp(b.fsub(score, e.splat(new)))
            e.store(weight, scores_at, 64 * part)
            sums = b.fadd(sums, weight)
        e.store(sums, sums_at)
        e.store(new, maximum_at)

        def rescale(d, _):
            e.store(b.fmul(e.load(V16F32, out_at, e.times(d, 4)), correction), out_at, e.times(d, 4))
            return []

        e.loop(head_dim, 16, [], rescale)
        return cg.get_dummy_value()

    return types.void(types.uintp, types.intp, types.uintp, types.uintp, types.uintp, types.intp), codegen


@intrinsic
def _combine_span(ctx, total_maximum, total_sums, total_out, maximum, sums, out, head_dim):
    """Add a span's (maximum, sums, out) to the total of the spans before it."""

    def codegen(cg, builder, sig, args):
        e, b = Emit(builder), builder
        total_maximum, total_sums, total_out, maximum, sums, out, head_dim = args
        old, span = e.load(F32, total_maximum), e.load(F32, maximum)
        new = e.maximum(old, span)
        keep, take = e.exp(e.splat(b.fsub(old, new))), e.exp(e.splat(b.fsub(span, new)))

        def mix(total, part):
            kept = b.fmul(e.load(V16F32, total), keep)
            e.store(e.fma(e.load(V16F32, part), take, kept), total)

        def channels(d, _):
            mix(e.plus(total_out, e.times(d, 4)), e.plus(out, e.times(d, 4)))
            return []

        mix(total_sums, sums)
        e.loop(head_dim, 16, [], channels)
        e.store(new, total_maximum)
        return cg.get_dummy_value()

    return types.void(*[types.uintp] * 6, types.intp), codegen


@intrinsic
def _finish_row(ctx, sums_at, total_at, out_at, head_dim):
    """out = total / (sum of the 16 lanes of sums)."""

    def codegen(cg, builder, sig, args):
        e, b = Emit(builder), builder
        sums_at, total_at, out_at, head_dim = args
        divisor = e.splat(e.ordered_sum(e.load(V16F32, sums_at)))

        def body(d, _):
            e.store(b.fdiv(e.load(V16F32, total_at, e.times(d, 4)), divisor), out_at, e.times(d, 4))
            return []

        e.loop(head_dim, 16, [], body)
        return cg.get_dummy_value()

    return types.void(*[types.uintp] * 3, types.intp), codegen


@njit(nogil=True, cache=True)
def _attend_block(keys, values, q, counts, rows, scores, maxima, sums, out):
    """Let `rows` query rows see one block [head_dim, 64] / [64, head_dim]; row r sees its first counts[r] positions."""
    head_dim = q.shape[1]
    r = 0
    while r < rows:
        four = rows - r >= 4 and counts[r] == counts[r + 1] == counts[r + 2] == counts[r + 3]
        width = 4 if four else 1
        if counts[r] > 0:
            if four:
                _scores_4(keys, keys.ctypes.data, q[r].ctypes.data, head_dim, scores[r].ctypes.data)
            else:
                _scores_1(keys, keys.ctypes.data, q[r].ctypes.data, head_dim, scores[r].ctypes.data)
            for i in range(r, r + width):
                _softmax_block(
                    scores[i].ctypes.data,
                    counts[r],
                    maxima[i:].ctypes.data,
                    sums[i].ctypes.data,
                    out[i].ctypes.data,
                    head_dim,
                )
            p_at, out_at = scores[r].ctypes.data, out[r].ctypes.data
            if four:
                _values_4(values, values.ctypes.data, p_at, counts[r], head_dim, out_at)
            else:
                _values_1(values, values.ctypes.data, p_at, counts[r], head_dim, out_at)
        r += width


@njit(nogil=True, cache=True)
def _attend_tile(q, last_positions, rows, key_cache, value_cache, kv_head, table, out):
    """Attend `rows` query rows of one KV head over all their positions; out [rows, head_dim] is written."""
    head_dim = q.shape[1]
    scores = np.empty((rows, BLOCK), np.float32)
    counts = np.empty(rows, np.int64)
    total, part = np.zeros((rows, head_dim), np.float32), np.empty((rows, head_dim), np.float32)
    total_sums, part_sums = np.zeros((rows, 16), np.float32), np.empty((rows, 16), np.float32)
    total_maxima, part_maxima = np.full(rows, FAR_BELOW, np.float32), np.empty(rows, np.float32)
    blocks = last_positions[:rows].max() // BLOCK + 1
    for span in range(0, blocks, SPAN_BLOCKS):
        part[:], part_sums[:], part_maxima[:] = 0.0, 0.0, FAR_BELOW
        for b in range(span, min(span + SPAN_BLOCKS, blocks)):
            for r in range(rows):
                counts[r] = min(max(last_positions[r] + 1 - b * BLOCK, 0), BLOCK)
            block = table[b]
            _attend_block(
                key_cache[block, kv_head],
                value_cache[block, kv_head],
                q,
                counts,
                rows,
                scores,
                part_maxima,
                part_sums,
                part,
            )
        for r in range(rows):
            if last_positions[r] >= span * BLOCK:
                _combine_span(
                    total_maxima[r:].ctypes.data, total_sums[r].ctypes.data, total[r].ctypes.data,
                    part_maxima[r:].ctypes.data, part_sums[r].ctypes.data, part[r].ctypes.data, head_dim,
                )  # fmt: skip
    for r in range(rows):
        _finish_row(total_sums[r].ctypes.data, total[r].ctypes.data, out[r].ctypes.data, head_dim)


@njit(nogil=True, cache=True)
def _attend_item(q, key_cache, value_cache, head_start, segment, table, kv_head, first, tokens, scale, out):
    """Gather the query rows of `tokens` tokens for one KV head, attend, scatter the results."""
    heads, head_dim = head_start[kv_head + 1] - head_start[kv_head], q.shape[2]
    rows = tokens * heads
    tile, result = np.empty((rows, head_dim), np.float32), np.empty((rows, head_dim), np.float32)
    last_positions = np.empty(rows, np.int64)
    for t in range(tokens):
        for h in range(heads):
            r = t * heads + h
            last_positions[r] = segment[2] + first + t
            for d in range(head_dim):
                tile[r, d] = q[segment[0] + first + t, head_start[kv_head] + h, d] * scale
    _attend_tile(tile, last_positions, rows, key_cache, value_cache, kv_head, table, result)
    for t in range(tokens):
        for h in range(heads):
            out[segment[0] + first + t, head_start[kv_head] + h, :] = result[t * heads + h, :]


@njit(nogil=True, parallel=True, cache=True)
def attention(q, key_cache, value_cache, head_start, segments, tables, scale, out, threads):
    """out[t, h] = softmax over the positions up to t's own of (q . k * scale), times v.

    q, out float32 [tokens, heads, head_dim]; key_cache [blocks, kv_heads, head_dim, 64] and value_cache
    [blocks, kv_heads, 64, head_dim], float32 or float16 bits (int16); head_start int64 [kv_heads + 1]: the query heads
    of KV head i are head_start[i] : head_start[i + 1]; segments int64 [n, 3]: first token row, number of tokens, first
    position, one for each sequence; tables int64 [n, blocks]: cache blocks of each sequence in order of position.
    """
    kv_heads = key_cache.shape[1]
    for thread in prange(threads):
        item = 0
        for s in range(segments.shape[0]):
            for kv_head in range(kv_heads):
                heads = head_start[kv_head + 1] - head_start[kv_head]
                tile = max(1, TILE_ROWS // max(1, heads))
                for first in range(0, segments[s, 1], tile):
                    if item % threads == thread and heads > 0:
                        tokens = min(tile, segments[s, 1] - first)
                        _attend_item(
                            q,
                            key_cache,
                            value_cache,
                            head_start,
                            segments[s],
                            tables[s],
                            kv_head,
                            first,
                            tokens,
                            scale,
                            out,
                        )
                    item += 1
