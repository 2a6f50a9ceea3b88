"""Products of row-lane weight matrices with activations, for one thread's range of row groups.

`scales` is None for float types: Numba then compiles the float branch only. Activations are `x` (float32 [tokens, k])
and, for quantised types, values, x_scales and starts (kernels/activations.py says how they lie).
A row's result does not depend on the thread, the tile or the other tokens.
"""

import numpy as np
from numba import njit

from mpillama.kernels import amx
from mpillama.kernels.activations import block_place, tile_width
from mpillama.kernels.tiles import add_on_grid, block_tile, copy_and_prefetch, float_tile, panel_tile, store_result

PREFETCH = 4096

_store_2x1 = block_tile(2, 1, store_result, PREFETCH)
_store_1x1 = block_tile(1, 1, store_result, PREFETCH)
_store_1x2 = block_tile(1, 2, store_result)
_store_1x4 = block_tile(1, 4, store_result)
_store_1x8 = block_tile(1, 8, store_result, PREFETCH)
_grid_2x1 = block_tile(2, 1, add_on_grid, PREFETCH)
_grid_1x1 = block_tile(1, 1, add_on_grid, PREFETCH)
_panels_1 = panel_tile(1)
_panels_2 = panel_tile(2)
_panels_4 = panel_tile(4)
_panels_8 = panel_tile(8)

_store_float_4x1 = float_tile(4, 1, store_result)
_store_float_1x1 = float_tile(1, 1, store_result)
_store_float_1x8 = float_tile(1, 8, store_result)
_grid_float_4x1 = float_tile(4, 1, add_on_grid)
_grid_float_1x1 = float_tile(1, 1, add_on_grid)
_grid_float_1x8 = float_tile(1, 8, add_on_grid)


@njit(nogil=True, cache=True)
def column_span(w, scales, x, values, x_scales, starts, out, first, last, in_flight, tiles):
    """out[t, 16 first : 16 last] = the rows of groups first:last times x[t].

    w [groups, blocks, 256 or 512] or [groups, k, 16], scales uint16 [groups, blocks, 16], out float32 [tokens, rows].
    `in_flight` is the number of row groups that a single token goes through together: 1 or 2, whichever is faster;
    `tiles` is AMX's configuration, or zeros if it is not used.
    """
    if last <= first:
        return
    if scales is None:
        _column_floats(w, x, out, first, last)
    elif x.shape[0] == 1:
        _column_blocks_one(w, scales, values, x_scales, starts, out, first, last, in_flight)
    else:
        _column_blocks(w, scales, x.shape[0], values, x_scales, starts, out, first, last, tiles)


@njit(nogil=True, cache=True)
def row_span(w, scales, x, values, x_scales, starts, out, first, last, tiles):
    """out[t, 16 first : 16 last] = the sum over all panels of their partial products, each rounded to the grid.

    w [panels, groups, blocks of a panel, 256 or 512] or [panels, groups, k of a panel, 16], scales uint16
    [panels, groups, blocks, 16], out float64 [tokens, rows].
    """
    if last <= first:
        return
    if scales is None or w.shape[0] == 0:
        out[:, 16 * first : 16 * last] = 0.0
        _row_floats(w, x, out, first, last, 0, w.shape[0])
    else:
        _row_blocks(w, scales, x.shape[0], values, x_scales, starts, out, first, last, tiles)


@njit(nogil=True, cache=True)
def row_panels_one(w, scales, x, values, x_scales, starts, out, first, last, first_panel, last_panel, in_flight):
    """As row_span for a single token and some of the panels; out float64 [rows]."""
    out[16 * first : 16 * last] = 0.0
    if last <= first:
        return
    if scales is None:
        _row_floats(w, x, out.reshape(1, -1), first, last, first_panel, last_panel)
    else:
        _row_blocks_one(w, scales, values, x_scales, starts, out, first, last, first_panel, last_panel, in_flight)


@njit(nogil=True, cache=True)
def add_panels_one(w, scales, x, values, x_scales, starts, out, first_panel, last_panel, in_flight):
    """Add all rows of some panels times a single token to out, float64 [rows]."""
    if scales is None:
        _row_floats(w, x, out.reshape(1, -1), 0, w.shape[1], first_panel, last_panel)
    else:
        _row_blocks_one(w, scales, values, x_scales, starts, out, 0, w.shape[1], first_panel, last_panel, in_flight)


@njit(nogil=True, cache=True)
def _column_blocks_one(w, scales, values, x_scales, starts, out, first, last, in_flight):
    """A single token: nothing but streaming the weights."""
    blocks, stride = w.shape[1], out.shape[1]
    v_at, xs_at, st_at = values.ctypes.data, x_scales.ctypes.data, starts.ctypes.data
    g = first
    if in_flight == 2:
        even = (last - first) // 2 * 2
        w_at, s_at, out_at = w[g].ctypes.data, scales[g].ctypes.data, out.ctypes.data + 64 * g
        _store_2x1(w, w_at, s_at, even, blocks, v_at, xs_at, st_at, 1, out_at, stride)
        g += even
    if g < last:
        w_at, s_at, out_at = w[g].ctypes.data, scales[g].ctypes.data, out.ctypes.data + 64 * g
        _store_1x1(w, w_at, s_at, last - g, blocks, v_at, xs_at, st_at, 1, out_at, stride)


@njit(nogil=True, cache=True, inline="always")
def _together(tokens, t, width):
    """How many tokens from t on go through a tile kernel together: 8, 4, 2 or 1 of the same tile."""
    left = min(tokens - t, width - t % width)
    return 8 if left >= 8 else (4 if left >= 4 else (2 if left >= 2 else 1))


@njit(nogil=True, cache=True)
def _column_blocks(w, scales, tokens, values, x_scales, starts, out, first, last, tiles):
    """Many tokens: each group's weights stay in the cache while the tokens pass."""
    blocks, stride, width, begin = w.shape[1], out.shape[1], tile_width(tokens), 0
    if tiles[0] and tokens >= amx.TOKENS:
        amx.amx_column_blocks(w, scales, tokens, values, x_scales, out, first, last, tiles)
        begin = tokens // amx.TOKENS * amx.TOKENS
    for g in range(first, last):
        w_at, s_at = w[g].ctypes.data, scales[g].ctypes.data
        t = begin
        while t < tokens:
            place, together = block_place(tokens, blocks, t, 0), _together(tokens, t, width)
            v_at, xs_at, st_at = values[place].ctypes.data, x_scales[place:].ctypes.data, starts[place:].ctypes.data
            out_at = out.ctypes.data + 4 * (t * stride + 16 * g)
            if together == 8:
                _store_1x8(w, w_at, s_at, 1, blocks, v_at, xs_at, st_at, width, out_at, stride)
            elif together == 4:
                _store_1x4(w, w_at, s_at, 1, blocks, v_at, xs_at, st_at, width, out_at, stride)
            elif together == 2:
                _store_1x2(w, w_at, s_at, 1, blocks, v_at, xs_at, st_at, width, out_at, stride)
            else:
                _store_1x1(w, w_at, s_at, 1, blocks, v_at, xs_at, st_at, width, out_at, stride)
            t += together


@njit(nogil=True, cache=True)
def _row_blocks_one(w, scales, values, x_scales, starts, out, first, last, first_panel, last_panel, in_flight):
    """A single token, panel by panel as they lie in memory; out holds zeros."""
    blocks = w.shape[2]
    for p in range(first_panel, last_panel):
        b, g = p * blocks, first
        v_at, xs_at, st_at = values[b].ctypes.data, x_scales[b:].ctypes.data, starts[b:].ctypes.data
        if in_flight == 2:
            even = (last - first) // 2 * 2
            w_at, s_at, out_at = w[p, g].ctypes.data, scales[p, g].ctypes.data, out.ctypes.data + 128 * g
            _grid_2x1(w, w_at, s_at, even, blocks, v_at, xs_at, st_at, 1, out_at, 0)
            g += even
        if g < last:
            w_at, s_at, out_at = w[p, g].ctypes.data, scales[p, g].ctypes.data, out.ctypes.data + 128 * g
            _grid_1x1(w, w_at, s_at, last - g, blocks, v_at, xs_at, st_at, 1, out_at, 0)


@njit(nogil=True, cache=True)
def _row_blocks(w, scales, tokens, values, x_scales, starts, out, first, last, tiles):
    """Many tokens: a group's panels are brought together once, so that they stay in the cache while the tokens pass."""
    panels, blocks, stride, width, begin = w.shape[0], w.shape[2], out.shape[1], tile_width(tokens), 0
    if tiles[0] and tokens >= amx.TOKENS:
        amx.amx_row_blocks(w, scales, tokens, values, x_scales, out, first, last, tiles)
        begin = tokens // amx.TOKENS * amx.TOKENS
    group, group_scales = np.empty((panels, blocks, w.shape[3]), w.dtype), np.empty((panels, blocks, 16), scales.dtype)
    w_at, s_at = group.ctypes.data, group_scales.ctypes.data
    for g in range(first, last if begin < tokens else first):
        for p in range(panels):
            copy_and_prefetch(group[p].ctypes.data, w[p, g].ctypes.data, group[p].nbytes)
            copy_and_prefetch(group_scales[p].ctypes.data, scales[p, g].ctypes.data, group_scales[p].nbytes)
        t = begin
        while t < tokens:
            place, together = block_place(tokens, panels * blocks, t, 0), _together(tokens, t, width)
            v_at, xs_at, st_at = values[place].ctypes.data, x_scales[place:].ctypes.data, starts[place:].ctypes.data
            out_at = out.ctypes.data + 8 * (t * stride + 16 * g)
            if together == 8:
                _panels_8(w, w_at, s_at, panels, blocks, v_at, xs_at, st_at, width, out_at, stride)
            elif together == 4:
                _panels_4(w, w_at, s_at, panels, blocks, v_at, xs_at, st_at, width, out_at, stride)
            elif together == 2:
                _panels_2(w, w_at, s_at, panels, blocks, v_at, xs_at, st_at, width, out_at, stride)
            else:
                _panels_1(w, w_at, s_at, panels, blocks, v_at, xs_at, st_at, width, out_at, stride)
            t += together


@njit(nogil=True, cache=True)
def _column_floats(w, x, out, first, last):
    tokens, k = x.shape
    stride, fours = out.shape[1], first
    if tokens == 1:
        fours = first + (last - first) // 4 * 4
        out_at = out.ctypes.data + 64 * first
        _store_float_4x1(w, w[first].ctypes.data, fours - first, k, x.ctypes.data, k, out_at, stride)
    for g in range(fours, last):
        w_at, t = w[g].ctypes.data, 0
        while t < tokens:
            out_at = out.ctypes.data + 4 * (t * stride + 16 * g)
            if tokens - t >= 8:
                _store_float_1x8(w, w_at, 1, k, x[t].ctypes.data, k, out_at, stride)
                t += 8
            else:
                _store_float_1x1(w, w_at, 1, k, x[t].ctypes.data, k, out_at, stride)
                t += 1


@njit(nogil=True, cache=True)
def _row_floats(w, x, out, first, last, first_panel, last_panel):
    tokens, x_stride = x.shape
    k, stride, fours = w.shape[2], out.shape[1], first
    for p in range(first_panel, last_panel):
        if tokens == 1:
            fours = first + (last - first) // 4 * 4
            x_at, out_at = x[0, p * k :].ctypes.data, out.ctypes.data + 128 * first
            _grid_float_4x1(w, w[p, first].ctypes.data, fours - first, k, x_at, x_stride, out_at, stride)
        for g in range(fours, last):
            w_at, t = w[p, g].ctypes.data, 0
            while t < tokens:
                x_at, out_at = x[t, p * k :].ctypes.data, out.ctypes.data + 8 * (t * stride + 16 * g)
                if tokens - t >= 8:
                    _grid_float_1x8(w, w_at, 1, k, x_at, x_stride, out_at, stride)
                    t += 8
                else:
                    _grid_float_1x1(w, w_at, 1, k, x_at, x_stride, out_at, stride)
                    t += 1
