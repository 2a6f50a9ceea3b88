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
from mpillama.kernels.vector import quantise_blocks

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


def _make_scores(rows: int, parts: int) -> Any:
    """Make scores(cache, keys_at, q_at, head_dim, out_at): out[r, p] = sum over d of q[r, d] * keys[d, p].

    `parts` runs of 16 positions are in flight together, which hides the latency of the FMAs when there are few rows.
    """

    @intrinsic
    def scores(ctx, cache, keys_at, q_at, head_dim, out_at):
        def codegen(cg, builder, sig, args):
            e = Emit(builder)
            _, keys_at, q_at, head_dim, out_at = args
            for part in range(0, BLOCK // 16, parts):

                def body(d, sums, part=part):
                    places = [e.plus(e.times(d, BLOCK), 16 * (part + i)) for i in range(parts)]
                    keys = [_load_cached(e, cache.dtype, keys_at, place) for place in places]
                    q = [e.load(F32, q_at, e.times(e.plus(d, e.times(head_dim, r)), 4)) for r in range(rows)]
                    splats = [e.splat(value) for value in q]
                    return [e.fma(keys[i], splats[r], sums[r * parts + i]) for r in range(rows) for i in range(parts)]

                sums = e.loop(head_dim, 1, [e.fill(F32, 0.0)] * (rows * parts), body)
                for index, value in enumerate(sums):
                    r, i = divmod(index, parts)
                    e.store(value, out_at, 4 * (BLOCK * r + 16 * (part + i)))
            return cg.get_dummy_value()

        return types.void(cache, types.uintp, types.uintp, types.intp, types.uintp), codegen

    return scores


def _make_values(rows: int, parts: int) -> Any:
    """Make values(cache, values_at, p_at, count, head_dim, out_at): out[r, d] += sum of p[r, i] * values[i, d].

    `parts` runs of 16 channels are in flight together; head_dim is a multiple of 32.
    """

    @intrinsic
    def values(ctx, cache, values_at, p_at, count, head_dim, out_at):
        def codegen(cg, builder, sig, args):
            e = Emit(builder)
            _, values_at, p_at, count, head_dim, out_at = args
            pairs = [(r, i) for r in range(rows) for i in range(parts)]

            def channels(d, _):
                out = [e.plus(out_at, e.times(e.plus(d, e.times(head_dim, r), 16 * i), 4)) for r, i in pairs]

                def body(place, sums):
                    v = [
                        _load_cached(e, cache.dtype, values_at, e.plus(d, e.b.mul(place, head_dim), 16 * i))
                        for i in range(parts)
                    ]
                    p = [e.splat(e.load(F32, p_at, e.times(place, 4), 4 * BLOCK * r)) for r in range(rows)]
                    return [e.fma(v[i], p[r], total) for (r, i), total in zip(pairs, sums, strict=True)]

                sums = e.loop(count, 1, [e.load(V16F32, address) for address in out], body)
                for value, address in zip(sums, out, strict=True):
                    e.store(value, address)
                return []

            e.loop(head_dim, 16 * parts, [], channels)
            return cg.get_dummy_value()

        return types.void(cache, types.uintp, types.uintp, types.intp, types.intp, types.uintp), codegen

    return values


_scores_1, _scores_4, _scores_8 = _make_scores(1, 4), _make_scores(4, 2), _make_scores(8, 1)
_values_1, _values_4, _values_8 = _make_values(1, 2), _make_values(4, 2), _make_values(8, 1)


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
def _same_count(counts, first, rows):
    """How many rows from `first` on can go together: 8, 4 or 1 with the same number of visible positions."""
    for width in (8, 4):
        if first + width <= rows:
            same = True
            for r in range(first + 1, first + width):
                same = same and counts[r] == counts[first]
            if same:
                return width
    return 1


@njit(nogil=True, cache=True)
def _attend_block(keys, values, q, counts, rows, scores, maxima, sums, out):
    """Let `rows` query rows see one block [head_dim, 64] / [64, head_dim]; row r sees its first counts[r] positions."""
    head_dim = q.shape[1]
    k_at, v_at = keys.ctypes.data, values.ctypes.data
    r = 0
    while r < rows:
        width, count = _same_count(counts, r, rows), counts[r]
        q_at, p_at, out_at = q[r].ctypes.data, scores[r].ctypes.data, out[r].ctypes.data
        if count > 0:
            if width == 8:
                _scores_8(keys, k_at, q_at, head_dim, p_at)
            elif width == 4:
                _scores_4(keys, k_at, q_at, head_dim, p_at)
            else:
                _scores_1(keys, k_at, q_at, head_dim, p_at)
            for i in range(r, r + width):
                maximum_at, sums_at = maxima[i:].ctypes.data, sums[i].ctypes.data
                _softmax_block(scores[i].ctypes.data, count, maximum_at, sums_at, out[i].ctypes.data, head_dim)
            if width == 8:
                _values_8(values, v_at, p_at, count, head_dim, out_at)
            elif width == 4:
                _values_4(values, v_at, p_at, count, head_dim, out_at)
            else:
                _values_1(values, v_at, p_at, count, head_dim, out_at)
        r += width


@njit(nogil=True, cache=True)
def _attend_span(q, last_positions, rows, key_cache, value_cache, kv_head, table, span, scores, maxima, sums, out):
    """Attend `rows` query rows of one KV head over one span; maxima [rows], sums [rows, 16], out [rows, head_dim]."""
    counts = np.empty(rows, np.int64)
    maxima[:rows], sums[:rows], out[:rows] = FAR_BELOW, 0.0, 0.0
    blocks = last_positions[:rows].max() // BLOCK + 1
    for b in range(span * SPAN_BLOCKS, min((span + 1) * SPAN_BLOCKS, blocks)):
        for r in range(rows):
            counts[r] = min(max(last_positions[r] + 1 - b * BLOCK, 0), BLOCK)
        keys, values = key_cache[table[b], kv_head], value_cache[table[b], kv_head]
        _attend_block(keys, values, q, counts, rows, scores, maxima, sums, out)


@njit(nogil=True, cache=True)
def _gather_rows(q, head_start, kv_head, segment, first, tokens, scale, tile, last_positions):
    """Copy the query rows of `tokens` tokens for one KV head, scaled; returns their number."""
    start = head_start[kv_head]
    heads = head_start[kv_head + 1] - start
    for t in range(tokens):
        for h in range(heads):
            last_positions[t * heads + h] = segment[2] + first + t
            for d in range(q.shape[2]):
                tile[t * heads + h, d] = q[segment[0] + first + t, start + h, d] * scale
    return tokens * heads


@njit(nogil=True, cache=True)
def _scatter_rows(
    total, total_sums, head_start, kv_head, segment, first, tokens, out, quantised, values, scales, starts
):
    """Divide by the sums and write the rows to their tokens and heads, quantised too if a quantised matrix follows."""
    start, head_dim = head_start[kv_head], out.shape[2]
    heads = head_start[kv_head + 1] - start
    blocks = head_dim // 32
    for t in range(tokens):
        token = segment[0] + first + t
        for h in range(heads):
            r = t * heads + h
            _finish_row(total_sums[r].ctypes.data, total[r].ctypes.data, out[token, start + h].ctypes.data, head_dim)
            if quantised:
                b, all_blocks = (start + h) * blocks, out.shape[1] * blocks
                quantise_blocks(out[token, start + h], values, scales, starts, out.shape[0], token, b, all_blocks)


@njit(nogil=True, cache=True)
def _combine(rows, last_positions, span, total_maxima, total_sums, total, maxima, sums, part):
    """Add a span to the total of the spans before it, for the rows that see it."""
    for r in range(rows):
        if last_positions[r] >= span * SPAN_BLOCKS * BLOCK:
            _combine_span(
                total_maxima[r:].ctypes.data, total_sums[r].ctypes.data, total[r].ctypes.data,
                maxima[r:].ctypes.data, sums[r].ctypes.data, part[r].ctypes.data, part.shape[1],
            )  # fmt: skip


@njit(nogil=True, cache=True)
def _most_rows(head_start):
    """The most query rows of a tile: a single token may have more heads on a KV head than TILE_ROWS."""
    most = TILE_ROWS
    for i in range(head_start.shape[0] - 1):
        most = max(most, head_start[i + 1] - head_start[i])
    return most


@njit(nogil=True, cache=True)
def _list_items(head_start, segments):
    """The tiles of a step, int64 [n, 5]: segment, KV head, first token, tokens, spans."""
    kv_heads, count = head_start.shape[0] - 1, 0
    for s in range(segments.shape[0]):
        for kv_head in range(kv_heads):
            tile = max(1, TILE_ROWS // max(1, head_start[kv_head + 1] - head_start[kv_head]))
            count += (segments[s, 1] + tile - 1) // tile
    items = np.empty((count, 5), np.int64)
    count = 0
    for s in range(segments.shape[0]):
        for kv_head in range(kv_heads):
            tile = max(1, TILE_ROWS // max(1, head_start[kv_head + 1] - head_start[kv_head]))
            for first in range(0, segments[s, 1], tile):
                tokens = min(tile, segments[s, 1] - first)
                spans = (segments[s, 2] + first + tokens - 1) // (SPAN_BLOCKS * BLOCK) + 1
                items[count, 0], items[count, 1], items[count, 2] = s, kv_head, first
                items[count, 3], items[count, 4] = tokens, spans
                count += 1
    return items


@njit(nogil=True, parallel=True, cache=True)
def attention(
    q, key_cache, value_cache, head_start, segments, tables, scale, out, quantised, values, scales, starts, threads
):
    """out[t, h] = softmax over the positions up to t's own of (q . k * scale), times v; and its quantised form.

    q, out float32 [tokens, heads, head_dim]; key_cache [blocks, kv_heads, head_dim, 64] and value_cache
    [blocks, kv_heads, 64, head_dim], float32 or float16 bits (int16); head_start int64 [kv_heads + 1]: the query heads
    of KV head i are head_start[i] : head_start[i + 1]; segments int64 [n, 3]: first token row, number of tokens, first
    position, one for each sequence; tables int64 [n, blocks]: cache blocks of each sequence in order of position.
    Threads share the tiles; where there are fewer tiles than threads could use, they share the tiles' spans.
    """
    items, head_dim = _list_items(head_start, segments), q.shape[2]
    if items.shape[0] >= 2 * threads or items[:, 4].sum() == items.shape[0]:
        for thread in prange(threads):
            _attend_items(
                thread, threads, items, q, key_cache, value_cache, head_start, segments, tables, scale, out, quantised,
                values, scales, starts,
            )  # fmt: skip
        return
    ends = np.cumsum(items[:, 4])
    most = _most_rows(head_start)
    parts = np.empty((ends[-1], most, head_dim), np.float32)
    sums = np.empty((ends[-1], most, 16), np.float32)
    maxima = np.empty((ends[-1], most), np.float32)
    for thread in prange(threads):
        _attend_item_spans(
            thread, threads, items, ends, q, key_cache, value_cache, head_start, segments, tables, scale, parts, sums,
            maxima,
        )  # fmt: skip
    for thread in prange(threads):
        _combine_items(
            thread, threads, items, ends, head_start, segments, parts, sums, maxima, out, quantised, values, scales,
            starts,
        )  # fmt: skip


@njit(nogil=True, cache=True)
def _attend_items(
    thread, threads, items, q, key_cache, value_cache, head_start, segments, tables, scale, out, quantised, values,
    scales, starts,
):  # fmt: skip
    """Every threads-th tile from start to end."""
    head_dim, most = q.shape[2], _most_rows(head_start)
    tile, part = np.empty((most, head_dim), np.float32), np.empty((most, head_dim), np.float32)
    total, scores = np.empty((most, head_dim), np.float32), np.empty((most, BLOCK), np.float32)
    sums, total_sums = np.empty((most, 16), np.float32), np.empty((most, 16), np.float32)
    maxima, total_maxima = np.empty(most, np.float32), np.empty(most, np.float32)
    last = np.empty(most, np.int64)
    for item in range(thread, items.shape[0], threads):
        s, kv_head, first = items[item, 0], items[item, 1], items[item, 2]
        tokens, spans = items[item, 3], items[item, 4]
        rows = _gather_rows(q, head_start, kv_head, segments[s], first, tokens, scale, tile, last)
        total[:], total_sums[:], total_maxima[:] = 0.0, 0.0, FAR_BELOW
        for span in range(spans if rows > 0 else 0):
            _attend_span(tile, last, rows, key_cache, value_cache, kv_head, tables[s], span, scores, maxima, sums, part)
            _combine(rows, last, span, total_maxima, total_sums, total, maxima, sums, part)
        _scatter_rows(
            total, total_sums, head_start, kv_head, segments[s], first, tokens, out, quantised, values, scales, starts
        )


@njit(nogil=True, cache=True)
def _attend_item_spans(
    thread, threads, items, ends, q, key_cache, value_cache, head_start, segments, tables, scale, parts, sums, maxima
):
    """Every threads-th span of all tiles."""
    most = _most_rows(head_start)
    tile, scores = np.empty((most, q.shape[2]), np.float32), np.empty((most, BLOCK), np.float32)
    last = np.empty(most, np.int64)
    for unit in range(thread, ends[-1], threads):
        item = np.searchsorted(ends, unit, side="right")
        s, kv_head, first = items[item, 0], items[item, 1], items[item, 2]
        tokens, spans = items[item, 3], items[item, 4]
        span = unit - (ends[item] - spans)
        rows = _gather_rows(q, head_start, kv_head, segments[s], first, tokens, scale, tile, last)
        if rows > 0:
            _attend_span(
                tile, last, rows, key_cache, value_cache, kv_head, tables[s], span, scores, maxima[unit], sums[unit],
                parts[unit],
            )  # fmt: skip


@njit(nogil=True, cache=True)
def _combine_items(
    thread, threads, items, ends, head_start, segments, parts, sums, maxima, out, quantised, values, scales, starts
):
    """Every threads-th tile: its spans in ascending order."""
    most = _most_rows(head_start)
    total, total_sums = np.empty((most, out.shape[2]), np.float32), np.empty((most, 16), np.float32)
    total_maxima, last = np.empty(most, np.float32), np.empty(most, np.int64)
    for item in range(thread, items.shape[0], threads):
        s, kv_head, first = items[item, 0], items[item, 1], items[item, 2]
        tokens, spans = items[item, 3], items[item, 4]
        heads = head_start[kv_head + 1] - head_start[kv_head]
        for r in range(tokens * heads):
            last[r] = segments[s, 2] + first + r // heads
        total[:], total_sums[:], total_maxima[:] = 0.0, 0.0, FAR_BELOW
        for span in range(spans):
            unit = ends[item] - spans + span
            _combine(tokens * heads, last, span, total_maxima, total_sums, total, maxima[unit], sums[unit], parts[unit])
        _scatter_rows(
            total, total_sums, head_start, kv_head, segments[s], first, tokens, out, quantised, values, scales, starts
        )
