"""Writing keys and values into the KV cache; kernels/attention_tiles.py says how a cache block lies."""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from mpillama.kernels.emit import I32, V16F32, Emit
from mpillama.kernels.vector import quantise_blocks


@intrinsic
def _store_lanes(ctx, cache, x_at, out_at):
    """Write 16 float32 in the cache's type (float32, or float16 bits when its dtype is int16)."""
    is_half = cache.dtype == types.int16

    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        x = e.load(V16F32, args[1])
        e.store(e.float_to_half(x) if is_half else x, args[2])
        return cg.get_dummy_value()

    return types.void(cache, types.uintp, types.uintp), codegen


@intrinsic
def _store_half(ctx, value, out_at):
    """Write one float32 as float16 bits."""

    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        halves = e.float_to_half(e.splat(args[0]))
        e.store(builder.extract_element(halves, ir.Constant(I32, 0)), args[1])
        return cg.get_dummy_value()

    return types.void(types.float32, types.uintp), codegen


@njit(nogil=True, cache=True)
def _store_float(key, value, keys, values, block, head, place, lanes):
    """One head in float32 or float16."""
    for d in range(0, key.shape[0], 16):
        _store_lanes(values, value[d:].ctypes.data, values[block, head, place, d:].ctypes.data)
        _store_lanes(keys, key[d:].ctypes.data, lanes.ctypes.data)
        for i in range(16):
            keys[block, head, d + i, place] = lanes[i]


@njit(nogil=True, cache=True)
def _store_q8(key, value, cache, block, head, place, blocks, room):
    """One head in blocks of 32 channels with a float16 scale."""
    keys, key_scales, values, value_scales = cache
    q, scales, starts = room
    key_bytes = keys[block, head].reshape(-1)
    quantise_blocks(key, q, scales, starts, 1, 0, 0, blocks)
    for i in range(blocks):
        _store_half(scales[i], key_scales[block, head, i, place:].ctypes.data)
        first = (place // 16 * blocks + i) * 512 + place % 16 * 4
        for d in range(32):
            key_bytes[first + d // 4 * 64 + d % 4] = q[i, d]
    quantise_blocks(value, q, scales, starts, 1, 0, 0, blocks)
    for i in range(blocks):
        _store_half(scales[i], value_scales[block, head, i, place:].ctypes.data)
        values[block, head, place, 32 * i : 32 * i + 32] = q[i]


@njit(nogil=True, cache=True)
def store_key_value(key, value, cache, slot):
    """Write one token's keys and values, float32 [kv_heads, head_dim]; slot: block * 64 + place."""
    block, place, blocks = slot // 64, slot % 64, key.shape[1] // 32
    lanes = np.empty(16, cache[0].dtype)
    room = np.empty((blocks, 32), np.int8), np.empty(blocks, np.float32), np.empty(blocks, np.int32)
    for h in range(key.shape[0]):
        if cache[0].itemsize == 1:
            _store_q8(key[h], value[h], cache, block, h, place, blocks, room)
        else:
            _store_float(key[h], value[h], cache[0], cache[2], block, h, place, lanes)
