"""Products of row-lane weight matrices with activations, over threads.

Column-parallel weights are [groups, blocks, …] and give float32 rows; row-parallel weights are
[panels, groups, blocks, …] and give float64 partial sums on the grid, ready to be added over ranks in any order.
Threads share the row groups; a row's result does not depend on which thread computes it.
"""

import numpy as np
from numba import njit, prange

from mpillama.kernels.tiles import add_on_grid, block_tile, float_tile, store_result

PREFETCH = 4096

_store_2x1 = block_tile(2, 1, store_result, PREFETCH)
_store_1x1 = block_tile(1, 1, store_result, PREFETCH)
_store_1x2 = block_tile(1, 2, store_result)
_store_1x4 = block_tile(1, 4, store_result)
_store_1x8 = block_tile(1, 8, store_result)
_grid_2x1 = block_tile(2, 1, add_on_grid, PREFETCH)
_grid_1x1 = block_tile(1, 1, add_on_grid, PREFETCH)
_grid_1x2 = block_tile(1, 2, add_on_grid)
_grid_1x4 = block_tile(1, 4, add_on_grid)
_grid_1x8 = block_tile(1, 8, add_on_grid)

_store_float_4x1 = float_tile(4, 1, store_result)
_store_float_1x1 = float_tile(1, 1, store_result)
_store_float_1x8 = float_tile(1, 8, store_result)
_grid_float_4x1 = float_tile(4, 1, add_on_grid)
_grid_float_1x1 = float_tile(1, 1, add_on_grid)
_grid_float_1x8 = float_tile(1, 8, add_on_grid)


@njit(nogil=True, cache=True)
def _column_blocks(w, scales, x, x_scales, starts, out, first, last):
    """Row groups first:last of column_blocks."""
    tokens, blocks = x_scales.shape
    stride = out.shape[1]
    for g in range(first, last):
        w_at, s_at = w[g].ctypes.data, scales[g].ctypes.data
        t = 0
        while t < tokens:
            x_at, xs_at, st_at = x[t].ctypes.data, x_scales[t].ctypes.data, starts[t].ctypes.data
            out_at = out.ctypes.data + 4 * (t * stride + 16 * g)
            left = tokens - t
            if left >= 8:
                _store_1x8(w, w_at, s_at, x_at, xs_at, st_at, blocks, blocks, out_at, stride)
                t += 8
            elif left >= 4:
                _store_1x4(w, w_at, s_at, x_at, xs_at, st_at, blocks, blocks, out_at, stride)
                t += 4
            elif left >= 2:
                _store_1x2(w, w_at, s_at, x_at, xs_at, st_at, blocks, blocks, out_at, stride)
                t += 2
            else:
                _store_1x1(w, w_at, s_at, x_at, xs_at, st_at, blocks, blocks, out_at, stride)
                t += 1


@njit(nogil=True, cache=True)
def _column_blocks_one(w, scales, x, x_scales, starts, out, first, last):
    """Row groups first:last of column_blocks for a single token: two groups in flight reach the memory bandwidth."""
    blocks, stride = x_scales.shape[1], out.shape[1]
    x_at, xs_at, st_at = x.ctypes.data, x_scales.ctypes.data, starts.ctypes.data
    g = first
    while g < last:
        w_at, s_at, out_at = w[g].ctypes.data, scales[g].ctypes.data, out.ctypes.data + 64 * g
        if last - g >= 2:
            _store_2x1(w, w_at, s_at, x_at, xs_at, st_at, blocks, blocks, out_at, stride)
            g += 2
        else:
            _store_1x1(w, w_at, s_at, x_at, xs_at, st_at, blocks, blocks, out_at, stride)
            g += 1


@njit(nogil=True, parallel=True, cache=True)
def column_blocks(w, scales, x, x_scales, starts, out, threads):
    """out[t, r] = sum over k of w[r, k] * x[t, k] for q8_0 and q4_0.

    w [groups, blocks, 256 or 512], scales uint16 [groups, blocks, 16], x int8 [tokens, blocks, 32],
    x_scales float32 [tokens, blocks], starts int32 [tokens, blocks], out float32 [tokens, 16 * groups].
    """
    groups = w.shape[0]
    for thread in prange(threads):
        first, last = groups * thread // threads, groups * (thread + 1) // threads
        if x_scales.shape[0] == 1:
            _column_blocks_one(w, scales, x, x_scales, starts, out, first, last)
        else:
            _column_blocks(w, scales, x, x_scales, starts, out, first, last)


@njit(nogil=True, cache=True)
def _row_blocks(w, scales, x, x_scales, starts, out, first, last):
    """Row groups first:last of row_blocks."""
    tokens, x_blocks = x_scales.shape
    panels, blocks, stride = w.shape[0], w.shape[2], out.shape[1]
    for g in range(first, last):
        t = 0
        while t < tokens:
            left = tokens - t
            out_at = out.ctypes.data + 8 * (t * stride + 16 * g)
            for p in range(panels):
                w_at, s_at = w[p, g].ctypes.data, scales[p, g].ctypes.data
                b = p * blocks
                x_at, xs_at, st_at = x[t, b].ctypes.data, x_scales[t, b:].ctypes.data, starts[t, b:].ctypes.data
                if left >= 8:
                    _grid_1x8(w, w_at, s_at, x_at, xs_at, st_at, blocks, x_blocks, out_at, stride)
                elif left >= 4:
                    _grid_1x4(w, w_at, s_at, x_at, xs_at, st_at, blocks, x_blocks, out_at, stride)
                elif left >= 2:
                    _grid_1x2(w, w_at, s_at, x_at, xs_at, st_at, blocks, x_blocks, out_at, stride)
                else:
                    _grid_1x1(w, w_at, s_at, x_at, xs_at, st_at, blocks, x_blocks, out_at, stride)
            t += 8 if left >= 8 else (4 if left >= 4 else (2 if left >= 2 else 1))


@njit(nogil=True, cache=True)
def _row_blocks_one(w, scales, x, x_scales, starts, out, first, last):
    """Row groups first:last of row_blocks for a single token, panel by panel as they lie in memory."""
    panels, blocks, stride, x_blocks = w.shape[0], w.shape[2], out.shape[1], x_scales.shape[1]
    for p in range(panels):
        b = p * blocks
        x_at, xs_at, st_at = x[0, b].ctypes.data, x_scales[0, b:].ctypes.data, starts[0, b:].ctypes.data
        g = first
        while g < last:
            w_at, s_at, out_at = w[p, g].ctypes.data, scales[p, g].ctypes.data, out.ctypes.data + 128 * g
            if last - g >= 2:
                _grid_2x1(w, w_at, s_at, x_at, xs_at, st_at, blocks, x_blocks, out_at, stride)
                g += 2
            else:
                _grid_1x1(w, w_at, s_at, x_at, xs_at, st_at, blocks, x_blocks, out_at, stride)
                g += 1


@njit(nogil=True, parallel=True, cache=True)
def row_blocks(w, scales, x, x_scales, starts, out, threads):
    """out[t, r] = sum over this rank's panels of their partial products, each rounded to the grid; q8_0 and q4_0.

    w [panels, groups, blocks of a panel, 256 or 512], scales uint16 [panels, groups, blocks, 16],
    x, x_scales, starts as for column_blocks over all panels, out float64 [tokens, 16 * groups].
    """
    groups = w.shape[1]
    for thread in prange(threads):
        first, last = groups * thread // threads, groups * (thread + 1) // threads
        out[:, 16 * first : 16 * last] = 0.0
        if x_scales.shape[0] == 1:
            _row_blocks_one(w, scales, x, x_scales, starts, out, first, last)
        else:
            _row_blocks(w, scales, x, x_scales, starts, out, first, last)


@njit(nogil=True, cache=True)
def _column_floats(w, x, out, first, last):
    """Row groups first:last of column_floats."""
    tokens, k = x.shape
    stride = out.shape[1]
    g = first
    while g < last:
        w_at, t = w[g].ctypes.data, 0
        if tokens == 1 and last - g >= 4:
            _store_float_4x1(w, w_at, x.ctypes.data, k, k, out.ctypes.data + 64 * g, stride)
            g += 4
            continue
        while t < tokens:
            out_at = out.ctypes.data + 4 * (t * stride + 16 * g)
            if tokens - t >= 8:
                _store_float_1x8(w, w_at, x[t].ctypes.data, k, k, out_at, stride)
                t += 8
            else:
                _store_float_1x1(w, w_at, x[t].ctypes.data, k, k, out_at, stride)
                t += 1
        g += 1


@njit(nogil=True, parallel=True, cache=True)
def column_floats(w, x, out, threads):
    """out[t, r] = sum over k of w[r, k] * x[t, k] for f32, f16 and bf16.

    w [groups, k, 16], x float32 [tokens, k], out float32 [tokens, 16 * groups].
    """
    groups = w.shape[0]
    for thread in prange(threads):
        _column_floats(w, x, out, groups * thread // threads, groups * (thread + 1) // threads)


@njit(nogil=True, cache=True)
def _row_floats(w, x, out, first, last):
    """Row groups first:last of row_floats."""
    tokens, x_stride = x.shape
    panels, k, stride = w.shape[0], w.shape[2], out.shape[1]
    for p in range(panels):
        g = first
        while g < last:
            w_at, t = w[p, g].ctypes.data, 0
            if tokens == 1 and last - g >= 4:
                _grid_float_4x1(w, w_at, x[0, p * k :].ctypes.data, k, x_stride, out.ctypes.data + 128 * g, stride)
                g += 4
                continue
            while t < tokens:
                x_at, out_at = x[t, p * k :].ctypes.data, out.ctypes.data + 8 * (t * stride + 16 * g)
                if tokens - t >= 8:
                    _grid_float_1x8(w, w_at, x_at, k, x_stride, out_at, stride)
                    t += 8
                else:
                    _grid_float_1x1(w, w_at, x_at, k, x_stride, out_at, stride)
                    t += 1
            g += 1


@njit(nogil=True, parallel=True, cache=True)
def row_floats(w, x, out, threads):
    """As row_blocks for f32, f16 and bf16: w [panels, groups, k of a panel, 16], x float32 [tokens, panels * k]."""
    groups = w.shape[1]
    for thread in prange(threads):
        first, last = groups * thread // threads, groups * (thread + 1) // threads
        out[:, 16 * first : 16 * last] = 0.0
        _row_floats(w, x, out, first, last)


def empty_partial(tokens: int, rows: int) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """A float64 buffer [tokens, rows] for row_blocks or row_floats."""
    return np.empty((tokens, rows), np.float64)
