"""The parallel regions of a decoder layer: each is one call from Python and one hand-out of work to the threads.

Threads share row groups, attention tiles or tokens. Work that depends on what all threads did begins a new region.
`threads` is the number of parts; small steps are done by the calling thread. Buffers are named in model/workspace.py.
"""

import numpy as np
from numba import njit, prange

from mpillama.kernels.cache_store import store_key_value
from mpillama.kernels.matmul import column_span, row_panels_one, row_span
from mpillama.kernels.rope import rotate
from mpillama.kernels.vector import add_bias, multiply, quantise_blocks, rms_norm_row, silu_multiply

RUN_BYTES = 256 * 1024
"""Shortest run of weights that a thread should read of a panel before it jumps to the next."""
FEW_TOKENS = 8
"""Below this, per-token work is not worth waking the other threads."""


@njit(nogil=True, cache=True)
def _normalise(x, weight, size, eps, h, quantised, values, scales, starts, first, last):
    """Normalise tokens first:last, and quantise them if a quantised matrix follows."""
    for t in range(first, last):
        rms_norm_row(x[t], weight, size, eps, h[t])
        if quantised:
            quantise_blocks(h[t], values, scales, starts, x.shape[0], t, 0, h.shape[1] // 32)


@njit(nogil=True, parallel=True, cache=True)
def normalise(x, weight, size, eps, h, quantised, values, scales, starts, threads):
    """h = RMSNorm(x) and its quantised form; x, h float32 [tokens, hidden]."""
    tokens = x.shape[0]
    if tokens < FEW_TOKENS:
        _normalise(x, weight, size, eps, h, quantised, values, scales, starts, 0, tokens)
    else:
        for thread in prange(threads):
            first, last = tokens * thread // threads, tokens * (thread + 1) // threads
            _normalise(x, weight, size, eps, h, quantised, values, scales, starts, first, last)


@njit(nogil=True, parallel=True, cache=True)
def column_parallel(w, w_scales, h, values, scales, starts, out, threads, in_flight, tiles):
    """out = this rank's rows of one matrix times h: float32 [tokens, rows]."""
    groups = w.shape[0]
    for thread in prange(threads):
        first, last = groups * thread // threads, groups * (thread + 1) // threads
        column_span(w, w_scales, h, values, scales, starts, out, first, last, in_flight, tiles)


@njit(nogil=True, parallel=True, cache=True)
def query_key_value(wq, sq, wk, sk, wv, sv, h, values, scales, starts, q, k, v, threads, in_flight, tiles):
    """The three projections of attention in one pass over the threads."""
    q_groups, kv_groups = wq.shape[0], wk.shape[0]
    for thread in prange(threads):
        first, last = q_groups * thread // threads, q_groups * (thread + 1) // threads
        column_span(wq, sq, h, values, scales, starts, q, first, last, in_flight, tiles)
        first, last = kv_groups * thread // threads, kv_groups * (thread + 1) // threads
        column_span(wk, sk, h, values, scales, starts, k, first, last, in_flight, tiles)
        column_span(wv, sv, h, values, scales, starts, v, first, last, in_flight, tiles)


@njit(nogil=True, parallel=True, cache=True)
def gate_up(
    wg, sg, wu, su, biases, shares, h, values, scales, starts, gate, up, quantised, out_values, out_scales, out_starts,
    threads, in_flight, tiles,
):  # fmt: skip
    """gate = silu(gate_proj h) * (up_proj h), and its quantised form; each thread finishes its own rows.

    `biases` of both, or None; `shares` float32 [tokens], or None: what each token's result is multiplied by.
    """
    pairs = wg.shape[0] // 2  # a quantised block is two groups
    for thread in prange(threads):
        first, last = pairs * thread // threads, pairs * (thread + 1) // threads
        column_span(wg, sg, h, values, scales, starts, gate, 2 * first, 2 * last, in_flight, tiles)
        column_span(wu, su, h, values, scales, starts, up, 2 * first, 2 * last, in_flight, tiles)
        for t in range(gate.shape[0] if last > first else 0):
            if biases is not None:
                add_bias(gate[t], biases[0], 32 * first, 32 * last)
                add_bias(up[t], biases[1], 32 * first, 32 * last)
            silu_multiply(gate[t], up[t], gate[t], 32 * first, 32 * last)
            if shares is not None:
                multiply(gate[t], shares[t], 32 * first, 32 * last)
            if quantised:
                rows = gate[t, 32 * first : 32 * last]
                quantise_blocks(rows, out_values, out_scales, out_starts, gate.shape[0], t, first, gate.shape[1] // 32)


@njit(nogil=True, cache=True)
def _row_parts(w, threads):
    """Over how many parts of the rows the threads are divided; the rest of the division is over panels.

    A thread then reads runs of at least RUN_BYTES, or whole panels one after the other.
    """
    panel_bytes = w[0].size * w.itemsize
    parts = min(threads, max(1, panel_bytes // RUN_BYTES))
    while threads % parts:
        parts -= 1
    return parts


@njit(nogil=True, parallel=True, cache=True)
def row_parallel(w, w_scales, x, values, scales, starts, out, threads, in_flight, tiles):
    """out = this rank's panels of one matrix times x, on the grid: float64 [tokens, rows]."""
    panels, groups = w.shape[0], w.shape[1]
    if x.shape[0] > 1 or panels == 0:
        for thread in prange(threads):
            first, last = groups * thread // threads, groups * (thread + 1) // threads
            row_span(w, w_scales, x, values, scales, starts, out, first, last, tiles)
        return
    row_parts = _row_parts(w, threads)
    panel_parts = threads // row_parts
    sums = out if panel_parts == 1 else np.empty((panel_parts, out.shape[1]), np.float64)
    for thread in prange(threads):
        row, part = thread % row_parts, thread // row_parts
        first, last = groups * row // row_parts, groups * (row + 1) // row_parts
        first_panel, last_panel = panels * part // panel_parts, panels * (part + 1) // panel_parts
        row_panels_one(
            w, w_scales, x, values, scales, starts, sums[part], first, last, first_panel, last_panel, in_flight
        )
    if panel_parts > 1:  # multiples of the grid: any order gives the same sum
        for i in range(out.shape[1]):
            out[0, i] = sums[0, i]
        for part in range(1, panel_parts):
            for i in range(out.shape[1]):
                out[0, i] += sums[part, i]


@njit(nogil=True, cache=True)
def _add_biases(q, k, v, biases):
    """Add the biases of the projections to one token's heads."""
    for heads, bias in ((q, biases[0]), (k, biases[1]), (v, biases[2])):
        for h in range(heads.shape[0]):
            for d in range(heads.shape[1]):
                heads[h, d] += bias[h * heads.shape[1] + d]


@njit(nogil=True, cache=True)
def _normalise_heads(heads, weight, size, eps):
    """RMSNorm of each head of one token, in place."""
    for h in range(heads.shape[0]):
        rms_norm_row(heads[h], weight, size, eps, heads[h])


@njit(nogil=True, cache=True)
def _rotate_and_store(q, k, v, biases, norms, eps, cosines, sines, cache, slots, first, last):
    """Biases, norms, RoPE and the write into the cache for tokens first:last."""
    for t in range(first, last):
        if biases is not None:
            _add_biases(q[t], k[t], v[t], biases)
        if norms is not None:
            _normalise_heads(q[t], norms[0], 2 * cosines.shape[1], eps)
            _normalise_heads(k[t], norms[1], 2 * cosines.shape[1], eps)
        rotate(q[t], cosines[t], sines[t])
        rotate(k[t], cosines[t], sines[t])
        store_key_value(k[t], v[t], cache, slots[t])


@njit(nogil=True, parallel=True, cache=True)
def rotate_and_store(q, k, v, biases, norms, eps, cosines, sines, cache, slots, threads):
    """RoPE of q and k in place, and the step's keys and values into the cache; [tokens, heads, head_dim].

    `biases` of q, k, v (float32 [heads * head_dim]) or None are added first; `norms` (weights of q's and k's RMSNorm
    over a head) or None.
    """
    tokens = q.shape[0]
    if tokens < FEW_TOKENS:
        _rotate_and_store(q, k, v, biases, norms, eps, cosines, sines, cache, slots, 0, tokens)
    else:
        for thread in prange(threads):
            first, last = tokens * thread // threads, tokens * (thread + 1) // threads
            _rotate_and_store(q, k, v, biases, norms, eps, cosines, sines, cache, slots, first, last)
