"""Causal attention over the KV cache: online softmax in fixed blocks of 64 positions.

Blocks go in ascending order within spans of 1024 positions; spans are combined in ascending order. Both sizes are
constants of the arithmetic: the bits do not depend on threads, chunking or other sequences.
(Online softmax: https://arxiv.org/abs/1805.02867.)
"""

import numpy as np
from numba import njit, prange

from mpillama.kernels.attention_tiles import (
    BLOCK,
    FAR_BELOW,
    combine_span,
    finish_row,
    scores_1,
    scores_4,
    scores_8,
    softmax_block,
    values_1,
    values_4,
    values_8,
)
from mpillama.kernels.vector import quantise_blocks

SPAN_BLOCKS = 16
"""Blocks of a span; spans may be computed apart and are combined in order."""
TILE_ROWS = 16
"""Most query rows (tokens x heads that share a KV head) that pass over the cache together."""


@njit(nogil=True, cache=True)
def _same_count(counts, hidden, first, rows):
    """How many rows from `first` on can go together: 8, 4 or 1 with the same visible positions."""
    for width in (8, 4):
        if first + width <= rows:
            same = True
            for r in range(first + 1, first + width):
                same = same and counts[r] == counts[first] and hidden[r] == hidden[first]
            if same:
                return width
    return 1


@njit(nogil=True, cache=True)
def _attend_block(cache, block, following, kv_head, queries, counts, hidden, rows, scores, scaled, maxima, sums, out):
    """Let `rows` query rows see one cache block; row r sees its first counts[r] positions but the first hidden[r].

    `following` is the cache block that comes next; the first rows that pass ask for it.
    """
    keys, key_scales, values, value_scales = cache
    q, q_values, q_scales, q_starts = queries
    head_dim = q.shape[1]
    blocks = head_dim // 32
    k_at, ks_at = keys[block, kv_head].ctypes.data, key_scales[block, kv_head].ctypes.data
    v_at, vs_at = values[block, kv_head].ctypes.data, value_scales[block, kv_head].ctypes.data
    scaled_at, r = scaled.ctypes.data, 0
    nk_at, nv_at = keys[following, kv_head].ctypes.data, values[following, kv_head].ctypes.data
    while r < rows:
        width, count = _same_count(counts, hidden, r, rows), counts[r]
        q_at, p_at, out_at = q[r].ctypes.data, scores[r].ctypes.data, out[r].ctypes.data
        b = r * blocks
        qv_at, qs_at, qst_at = q_values[b].ctypes.data, q_scales[b:].ctypes.data, q_starts[b:].ctypes.data
        if count > hidden[r]:
            if width == 8:
                scores_8(keys, k_at, nk_at, ks_at, q_at, qv_at, qs_at, qst_at, head_dim, p_at)
            elif width == 4:
                scores_4(keys, k_at, nk_at, ks_at, q_at, qv_at, qs_at, qst_at, head_dim, p_at)
            else:
                scores_1(keys, k_at, nk_at, ks_at, q_at, qv_at, qs_at, qst_at, head_dim, p_at)
            for i in range(r, r + width):
                maximum_at, sums_at = maxima[i:].ctypes.data, sums[i].ctypes.data
                softmax_block(
                    scores[i].ctypes.data, hidden[r], count, maximum_at, sums_at, out[i].ctypes.data, head_dim
                )
            if width == 8:
                values_8(keys, v_at, nv_at, vs_at, p_at, scaled_at, count, head_dim, out_at)
            elif width == 4:
                values_4(keys, v_at, nv_at, vs_at, p_at, scaled_at, count, head_dim, out_at)
            else:
                values_1(keys, v_at, nv_at, vs_at, p_at, scaled_at, count, head_dim, out_at)
            nk_at, nv_at = k_at, v_at
        r += width


@njit(nogil=True, cache=True)
def _attend_span(queries, last_positions, window, rows, cache, kv_head, table, span, scores, maxima, sums, out):
    """Attend `rows` query rows of one KV head over one span; maxima [rows], sums [rows, 16], out [rows, head_dim]."""
    counts, hidden, scaled = np.empty(rows, np.int64), np.empty(rows, np.int64), np.empty((8, BLOCK), np.float32)
    maxima[:rows], sums[:rows], out[:rows] = FAR_BELOW, 0.0, 0.0
    blocks = last_positions[:rows].max() // BLOCK + 1
    first = max(span * SPAN_BLOCKS, (last_positions[:rows].min() + 1 - window) // BLOCK if window > 0 else 0)
    for b in range(first, min((span + 1) * SPAN_BLOCKS, blocks)):
        for r in range(rows):
            counts[r] = min(max(last_positions[r] + 1 - b * BLOCK, 0), BLOCK)
            hidden[r] = min(max(last_positions[r] + 1 - window - b * BLOCK, 0), BLOCK) if window > 0 else 0
        following = table[min(b + 1, blocks - 1)]
        _attend_block(
            cache, table[b], following, kv_head, queries, counts, hidden, rows, scores, scaled, maxima, sums, out
        )


@njit(nogil=True, cache=True)
def _new_queries(rows, head_dim):
    """Room for query rows: float32 [rows, head_dim], and int8 blocks row after row, with scales and starts."""
    count = rows * (head_dim // 32)
    return (
        np.empty((rows, head_dim), np.float32),
        np.empty((count, 32), np.int8),
        np.empty(count, np.float32),
        np.empty(count, np.int32),
    )


@njit(nogil=True, cache=True)
def _gather_rows(q, head_start, kv_head, segment, first, tokens, scale, is_q8, queries, last_positions):
    """Copy the query rows of `tokens` tokens for one KV head, scaled and, for q8, quantised; returns their number."""
    tile, values, scales, starts = queries
    start, blocks = head_start[kv_head], q.shape[2] // 32
    heads = head_start[kv_head + 1] - start
    for t in range(tokens):
        for h in range(heads):
            last_positions[t * heads + h] = segment[2] + first + t
            for d in range(q.shape[2]):
                tile[t * heads + h, d] = q[segment[0] + first + t, start + h, d] * scale
            if is_q8:
                quantise_blocks(tile[t * heads + h], values, scales, starts, 1, 0, (t * heads + h) * blocks, blocks)
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
            finish_row(total_sums[r].ctypes.data, total[r].ctypes.data, out[token, start + h].ctypes.data, head_dim)
            if quantised:
                b, all_blocks = (start + h) * blocks, out.shape[1] * blocks
                quantise_blocks(out[token, start + h], values, scales, starts, out.shape[0], token, b, all_blocks)


@njit(nogil=True, cache=True)
def _combine(rows, last_positions, span, total_maxima, total_sums, total, maxima, sums, part):
    """Add a span to the total of the spans before it, for the rows that see it."""
    for r in range(rows):
        if last_positions[r] >= span * SPAN_BLOCKS * BLOCK:
            combine_span(
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
def attention(q, cache, head_start, segments, tables, scale, window, out, quantised, values, scales, starts, threads):
    """out[t, h] = softmax over the positions up to t's own of (q . k * scale), times v; and its quantised form.

    With a `window` > 0 a token sees that many positions only, its own the last of them.

    q, out float32 [tokens, heads, head_dim]; cache: keys, key scales, values, value scales of this layer, each
    [blocks, kv_heads, …] (kernels/attention_tiles.py says how a block lies); head_start int64 [kv_heads + 1]: the query
    heads of KV head i are head_start[i] : head_start[i + 1]; segments int64 [n, 3]: first token row, number of tokens,
    first position, one for each sequence; tables int64 [n, blocks]: cache blocks of each sequence in order of position.
    Threads share the tiles; where there are fewer tiles than threads could use, they share the tiles' spans.
    """
    items, head_dim = _list_items(head_start, segments), q.shape[2]
    if items.shape[0] >= 2 * threads or items[:, 4].sum() == items.shape[0]:
        for thread in prange(threads):
            _attend_items(
                thread, threads, items, q, cache, head_start, segments, tables, scale, window, out, quantised,
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
            thread, threads, items, ends, q, cache, head_start, segments, tables, scale, window, parts, sums,
            maxima,
        )  # fmt: skip
    for thread in prange(threads):
        _combine_items(
            thread, threads, items, ends, head_start, segments, parts, sums, maxima, out, quantised, values, scales,
            starts,
        )  # fmt: skip


@njit(nogil=True, cache=True)
def _attend_items(
    thread, threads, items, q, cache, head_start, segments, tables, scale, window, out, quantised, values,
    scales, starts,
):  # fmt: skip
    """Every threads-th tile from start to end."""
    head_dim, most = q.shape[2], _most_rows(head_start)
    queries, part = _new_queries(most, head_dim), np.empty((most, head_dim), np.float32)
    is_q8 = cache[0].itemsize == 1
    total, scores = np.empty((most, head_dim), np.float32), np.empty((most, BLOCK), np.float32)
    sums, total_sums = np.empty((most, 16), np.float32), np.empty((most, 16), np.float32)
    maxima, total_maxima = np.empty(most, np.float32), np.empty(most, np.float32)
    last = np.empty(most, np.int64)
    for item in range(thread, items.shape[0], threads):
        s, kv_head, first = items[item, 0], items[item, 1], items[item, 2]
        tokens, spans = items[item, 3], items[item, 4]
        rows = _gather_rows(q, head_start, kv_head, segments[s], first, tokens, scale, is_q8, queries, last)
        total[:], total_sums[:], total_maxima[:] = 0.0, 0.0, FAR_BELOW
        for span in range(spans if rows > 0 else 0):
            _attend_span(queries, last, window, rows, cache, kv_head, tables[s], span, scores, maxima, sums, part)
            _combine(rows, last, span, total_maxima, total_sums, total, maxima, sums, part)
        _scatter_rows(
            total, total_sums, head_start, kv_head, segments[s], first, tokens, out, quantised, values, scales, starts
        )


@njit(nogil=True, cache=True)
def _attend_item_spans(
    thread, threads, items, ends, q, cache, head_start, segments, tables, scale, window, parts, sums, maxima
):
    """Every threads-th span of all tiles."""
    most = _most_rows(head_start)
    queries, scores = _new_queries(most, q.shape[2]), np.empty((most, BLOCK), np.float32)
    is_q8 = cache[0].itemsize == 1
    last = np.empty(most, np.int64)
    for unit in range(thread, ends[-1], threads):
        item = np.searchsorted(ends, unit, side="right")
        s, kv_head, first = items[item, 0], items[item, 1], items[item, 2]
        tokens, spans = items[item, 3], items[item, 4]
        span = unit - (ends[item] - spans)
        rows = _gather_rows(q, head_start, kv_head, segments[s], first, tokens, scale, is_q8, queries, last)
        if rows > 0:
            _attend_span(
                queries, last, window, rows, cache, kv_head, tables[s], span, scores, maxima[unit], sums[unit],
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
