"""The mixture of experts: which experts each token takes, and their products.

Each rank has a slice of every expert; only chosen experts are read. A token's sum over its experts is on the grid, so
it does not depend on the order of experts, threads or ranks.
"""

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic, overload

from mpillama.kernels.activations import block_place, places_of
from mpillama.kernels.emit import V16F32, Emit
from mpillama.kernels.layer import gate_up, row_parallel
from mpillama.kernels.matmul import add_panels_one, column_span
from mpillama.kernels.vector import multiply, quantise_blocks, silu_multiply


@intrinsic
def _exponentials(ctx, x_at, maximum, width):
    """x = e^(x - maximum) over one row, in place."""

    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        x_at, maximum, width = args

        def body(i, _):
            at = e.times(i, 4)
            e.store(e.exp(builder.fsub(e.load(V16F32, x_at, at), e.splat(maximum))), x_at, at)
            return []

        e.loop(width, 16, [], body)
        return cg.get_dummy_value()

    return types.void(types.uintp, types.float32, types.intp), codegen


@njit(nogil=True, cache=True)
def _largest(row, experts):
    """The first of the largest of row[:experts]; a NaN counts as largest, so that it is seen in the result."""
    best = 0
    for i in range(1, experts):
        if not row[i] <= row[best]:
            best = i
    return best


@njit(nogil=True, cache=True)
def choose_experts(logits, experts, renormalise, chosen, shares):
    """Each token's most probable experts and their shares of the result.

    logits float32 [tokens, experts and padding] (overwritten); chosen int64, shares float32 [tokens, k]. The softmax is
    over all experts; with `renormalise` the chosen shares add up to 1.
    """
    for t in range(logits.shape[0]):
        row, total = logits[t], 0.0
        _exponentials(row.ctypes.data, row[_largest(row, experts)], row.shape[0])
        for i in range(experts):
            total += np.float64(row[i])
        taken = 0.0
        for j in range(chosen.shape[1]):
            best = _largest(row, experts)
            chosen[t, j], shares[t, j] = best, np.float32(row[best] / total)
            taken += np.float64(shares[t, j])
            row[best] = -1.0
        if renormalise:
            for j in range(chosen.shape[1]):
                shares[t, j] = np.float32(np.float64(shares[t, j]) / taken)


@njit(nogil=True, cache=True)
def mixture(
    wg, sg, wu, su, wd, sd, chosen, shares, quantised, x, values, scales, starts, down_quantised, out, threads,
    in_flight, tiles,
):  # fmt: skip
    """out = each token's chosen experts' SwiGLU, times their shares: float64 [tokens, hidden], on the grid.

    Weights [experts, …] with scales or None; x float32 [tokens, hidden] and its quantised form.
    """
    if x.shape[0] == 1:
        _mixture_one(
            wg, sg, wu, su, wd, sd, chosen[0], shares[0], x, values, scales, starts, down_quantised, out, threads,
            in_flight, tiles,
        )  # fmt: skip
        return
    out[:] = 0.0
    order, ends = _tokens_of_experts(chosen, wg.shape[0])
    for expert in range(wg.shape[0]):
        first, last = ends[expert], ends[expert + 1]
        if last > first:
            _one_expert(
                wg[expert], _of(sg, expert), wu[expert], _of(su, expert), wd[expert], _of(sd, expert),
                order[first:last], shares, chosen.shape[1], quantised, x, values, scales, starts, down_quantised, out,
                threads, in_flight, tiles,
            )  # fmt: skip


def _of(scales, expert):
    """An expert's scales, None if there are none."""
    return None if scales is None else scales[expert]


@overload(_of)
def _compiled_of(scales, expert):
    # Chosen by type: an ordinary kernel would return an optional array, whose memory Numba 0.68 gives back too early.
    if isinstance(scales, types.NoneType):
        return lambda scales, expert: None
    return lambda scales, expert: scales[expert]


@njit(nogil=True, cache=True)
def _tokens_of_experts(chosen, experts):
    """The (token, place) pairs sorted by expert, as token * k + place, and where each expert's begin and end."""
    ends = np.zeros(experts + 1, np.int64)
    for expert in chosen.flat:
        ends[expert + 1] += 1
    ends = np.cumsum(ends)
    filled, order = ends.copy(), np.empty(chosen.size, np.int64)
    for t in range(chosen.shape[0]):
        for j in range(chosen.shape[1]):
            expert = chosen[t, j]
            order[filled[expert]] = t * chosen.shape[1] + j
            filled[expert] += 1
    return order, ends


@njit(nogil=True, cache=True)
def _new_activations(tokens, k):
    """Room for float32 [tokens, k] and its quantised form."""
    count = places_of(tokens, k // 32)
    return (
        np.empty((tokens, k), np.float32),
        np.empty((count, 32), np.int8),
        np.empty(count, np.float32),
        np.empty(count, np.int32),
    )


@njit(nogil=True, cache=True)
def _gather(x, values, scales, starts, quantised, pairs, per_token):
    """The activations of some tokens, side by side."""
    hx, hv, hs, hst = _new_activations(len(pairs), x.shape[1])
    blocks = x.shape[1] // 32
    for i in range(len(pairs)):
        token = pairs[i] // per_token
        hx[i] = x[token]
        for b in range(blocks if quantised else 0):
            here, there = block_place(len(pairs), blocks, i, b), block_place(x.shape[0], blocks, token, b)
            hv[here], hs[here], hst[here] = values[there], scales[there], starts[there]
    return hx, hv, hs, hst


@njit(nogil=True, cache=True)
def _one_expert(
    wg, sg, wu, su, wd, sd, pairs, shares, per_token, quantised, x, values, scales, starts, down_quantised, out,
    threads, in_flight, tiles,
):  # fmt: skip
    """Add one expert's result to the tokens that chose it."""
    hx, hv, hs, hst = _gather(x, values, scales, starts, quantised, pairs, per_token)
    gate, gv, gs, gst = _new_activations(len(pairs), 16 * wg.shape[0])
    up, own_shares = np.empty(gate.shape, np.float32), np.empty(len(pairs), np.float32)
    for i in range(len(pairs)):
        own_shares[i] = shares[pairs[i] // per_token, pairs[i] % per_token]
    gate_up(
        wg, sg, wu, su, None, own_shares, hx, hv, hs, hst, gate, up, down_quantised, gv, gs, gst, threads, in_flight,
        tiles,
    )  # fmt: skip
    partial = np.empty((len(pairs), out.shape[1]), np.float64)
    row_parallel(wd, sd, gate, gv, gs, gst, partial, threads, in_flight, tiles)
    for i in range(len(pairs)):
        token = pairs[i] // per_token
        for d in range(out.shape[1]):
            out[token, d] += partial[i, d]


@njit(nogil=True, parallel=True, cache=True)
def _mixture_one(
    wg, sg, wu, su, wd, sd, chosen, shares, x, values, scales, starts, quantised, out, threads, in_flight, tiles
):
    """As mixture for a single token: the threads share what all its experts have to do."""
    count, pairs, panels = len(chosen), wg.shape[1] // 2, wd.shape[1]
    inner = 32 * pairs
    gate, up = np.empty((count, inner), np.float32), np.empty((count, inner), np.float32)
    gv, gs = np.empty((count * pairs, 32), np.int8), np.empty(count * pairs, np.float32)
    gst, sums = np.empty(count * pairs, np.int32), np.empty((threads, out.shape[1]), np.float64)
    for thread in prange(threads):
        begin, end = count * pairs * thread // threads, count * pairs * (thread + 1) // threads
        for j in range(count):
            first, last = max(begin - j * pairs, 0), min(end - j * pairs, pairs)
            if last > first:
                expert = chosen[j]
                column_span(
                    wg[expert], _of(sg, expert), x, values, scales, starts, gate[j : j + 1], 2 * first, 2 * last,
                    in_flight, tiles,
                )  # fmt: skip
                column_span(
                    wu[expert], _of(su, expert), x, values, scales, starts, up[j : j + 1], 2 * first, 2 * last,
                    in_flight, tiles,
                )  # fmt: skip
                silu_multiply(gate[j], up[j], gate[j], 32 * first, 32 * last)
                multiply(gate[j], shares[j], 32 * first, 32 * last)
                if quantised:
                    quantise_blocks(
                        gate[j, 32 * first : 32 * last], gv, gs, gst, 1, 0, j * pairs + first, count * pairs
                    )
    for thread in prange(threads):
        sums[thread] = 0.0
        begin, end = count * panels * thread // threads, count * panels * (thread + 1) // threads
        for j in range(count):
            first, last = max(begin - j * panels, 0), min(end - j * panels, panels)
            if last > first:
                expert, b = chosen[j], j * pairs
                add_panels_one(
                    wd[expert], _of(sd, expert), gate[j : j + 1], gv[b:], gs[b:], gst[b:], sums[thread], first, last,
                    in_flight,
                )  # fmt: skip
    for d in range(out.shape[1]):  # multiples of the grid: any order gives the same sum
        total = 0.0
        for thread in range(threads):
            total += sums[thread, d]
        out[0, d] = total
