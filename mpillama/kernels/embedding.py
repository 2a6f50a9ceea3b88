"""Embedding lookup from a row-lane matrix: a token's row is one lane of its group."""

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from mpillama.kernels.emit import V16I16, Emit
from mpillama.kernels.tiles import load_row_lanes


@intrinsic
def _lanes_as_float(ctx, w, at, out_at):
    """Write 16 weights of a float type as float32."""

    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        e.store(load_row_lanes(e, w.dtype, args[1]), args[2])
        return cg.get_dummy_value()

    return types.void(w, types.uintp, types.uintp), codegen


@intrinsic
def _scales_as_float(ctx, at, out_at):
    """Write 16 float16 scales as float32."""

    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        e.store(e.half_to_float(e.load(V16I16, args[0])), args[1])
        return cg.get_dummy_value()

    return types.void(types.uintp, types.uintp), codegen


@njit(nogil=True, cache=True)
def embed_blocks(w, scales, rows, out):
    """out[t] = row rows[t] of a q8_0 or q4_0 matrix, zeros where rows[t] is negative (another rank's row).

    w [groups, blocks, 256 or 512], scales uint16 [groups, blocks, 16], rows int64 [tokens], out float64 [tokens, k].
    """
    lanes = np.empty(16, np.float32)
    is_q4 = w.shape[2] == 256
    out[:] = 0.0
    for t in range(rows.shape[0]):
        if rows[t] < 0:
            continue
        g, lane = rows[t] // 16, rows[t] % 16
        for block in range(w.shape[1]):
            _scales_as_float(scales[g, block].ctypes.data, lanes.ctypes.data)
            for i in range(32):
                step, place = i // 4, lane * 4 + i % 4
                if is_q4:
                    packed = np.int32(w[g, block, step % 4 * 64 + place])
                    value = (packed >> 4 if step >= 4 else packed & 15) - 8
                else:
                    value = np.int32(w[g, block, step * 64 + place])
                out[t, block * 32 + i] += np.float64(np.float32(value) * lanes[lane])


@njit(nogil=True, cache=True)
def embed_floats(w, rows, out):
    """As embed_blocks for f32, f16 and bf16: w [groups, k, 16]."""
    lanes = np.empty(16, np.float32)
    out[:] = 0.0
    for t in range(rows.shape[0]):
        if rows[t] < 0:
            continue
        g, lane = rows[t] // 16, rows[t] % 16
        for k in range(w.shape[1]):
            _lanes_as_float(w, w[g, k].ctypes.data, lanes.ctypes.data)
            out[t, k] += np.float64(lanes[lane])
