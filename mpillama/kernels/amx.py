"""Tiles of 16 rows x 16 tokens on AMX: the same exact integer dot products as kernels/tiles.py, the same bits.

A block's weights are the B tile (8 steps of 64 bytes are 8 rows of 4 k-values x 16 rows), its 16 tokens the A tile;
the 16 x 16 int32 products pass through memory to become float32 and are scaled as everywhere. Two blocks are in flight.
The system must grant AMX to the process (`isa.grant_amx`), and each thread configures its tiles.
Where the target has no AMX, the intrinsics here compile to nothing and must not be called.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import config
from numba.extending import intrinsic

from mpillama.kernels.activations import block_place
from mpillama.kernels.emit import F32, F64, I8, V16F32, V16I16, V16I32, V64I8, VOID, Emit
from mpillama.kernels.tiles import block_bytes

TOKENS = 16
IN_FLIGHT = 2
SCRATCH_BYTES = IN_FLIGHT * 1024


def available() -> bool:
    """Whether this process's kernels are compiled for AMX."""
    return "+amx-int8" in (config.CPU_FEATURES or "").split(",")


def no_tiles() -> np.ndarray:
    """In place of a configuration: AMX is not used."""
    return np.zeros(64, np.uint8)


def tile_configuration() -> np.ndarray:
    """The 64 bytes for ldtilecfg: tiles 0, 1 products (16 x 64 B), 2, 3 tokens (16 x 32 B), 4, 5 weights (8 x 64 B)."""
    configuration = np.zeros(64, np.uint8)
    configuration[0] = 1
    configuration[16:28].view(np.uint16)[:] = (64, 64, 32, 32, 64, 64)
    configuration[48:54] = (16, 16, 16, 16, 8, 8)
    return configuration


@intrinsic
def amx_begin(ctx, configuration_at):
    """Configure this thread's tiles."""

    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        if e.has_amx:
            e.call("llvm.x86.ldtilecfg", VOID, [e.pointer(args[0], I8)])
        return cg.get_dummy_value()

    return types.void(types.uintp), codegen


@intrinsic
def amx_end(ctx):
    """Give the tiles back, so that the system need not save them."""

    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        if e.has_amx:
            e.call("llvm.x86.tilerelease", VOID, [])
        return cg.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _signed_blocks(ctx, w, w_at, blocks, out_at):
    """Unpack blocks to signed bytes, 512 B each: nibbles - 8, or q8_0 as it is."""
    is_q4, size = w.dtype == types.uint8, block_bytes(w)

    def codegen(cg, builder, sig, args):
        e, b = Emit(builder), builder
        _, w_at, blocks, out_at = args

        def body(i, _):
            here, out = e.plus(w_at, e.times(i, size)), e.plus(out_at, e.times(i, 512))
            for j in range(4 if is_q4 else 8):
                packed = e.load(V64I8, here, 64 * j)
                if not is_q4:
                    e.store(packed, out, 64 * j)
                    continue
                for step, nibbles in (
                    (j, b.and_(packed, e.fill(I8, 15, 64))),
                    (j + 4, b.lshr(packed, e.fill(I8, 4, 64))),
                ):
                    e.store(b.sub(nibbles, e.fill(I8, 8, 64)), out, 64 * step)
            return []

        e.loop(blocks, 1, [], body)
        return cg.get_dummy_value()

    return types.void(w, types.uintp, types.intp, types.uintp), codegen


def _multiply_block(e: Emit, u: int, w_at: ir.Value, x_at: ir.Value, scratch: ir.Value) -> None:
    """The int32 products of one block, through tiles u, 2 + u, 4 + u, to scratch."""

    def tile(number: int) -> ir.Constant:
        return ir.Constant(I8, number)

    for number, address, stride in ((2 + u, x_at, 32), (4 + u, w_at, 64)):
        e.call("llvm.x86.tileloadd64", VOID, [tile(number), e.pointer(address, I8), e.i64(stride)])
    e.call("llvm.x86.tilezero", VOID, [tile(u)])
    e.call("llvm.x86.tdpbssd", VOID, [tile(u), tile(2 + u), tile(4 + u)])
    e.call("llvm.x86.tilestored64", VOID, [tile(u), e.pointer(e.plus(scratch, 1024 * u), I8), e.i64(64)])


def _add_products(
    e: Emit, u: int, scales_at: ir.Value, x_scales_at: ir.Value, scratch: ir.Value, sums: list[ir.Value]
) -> list[ir.Value]:
    """sums[t] + float(product) * (weight scale * activation scale), one FMA, for the 16 tokens of a block."""
    scale = e.half_to_float(e.load(V16I16, scales_at))
    new = []
    for t, total in enumerate(sums):
        dot = e.b.sitofp(e.load(V16I32, scratch, 1024 * u + 64 * t), V16F32)
        new.append(e.fma(dot, e.b.fmul(scale, e.splat(e.load(F32, x_scales_at, 4 * t))), total))
    return new


def _block_loop(
    e: Emit, count: ir.Value, first: ir.Value, w: ir.Value, s: ir.Value, x: ir.Value, xs: ir.Value, scratch: ir.Value
) -> list[ir.Value]:
    """The float32 sums of 16 tokens over blocks first : first + count, in ascending order."""

    def turn(i: ir.Value, sums: list[ir.Value], width: int) -> list[ir.Value]:
        blocks = [e.plus(first, i, u) for u in range(width)]
        for u, block in enumerate(blocks):
            _multiply_block(e, u, e.plus(w, e.times(block, 512)), e.plus(x, e.times(block, 32 * TOKENS)), scratch)
        for u, block in enumerate(blocks):
            sums = _add_products(
                e, u, e.plus(s, e.times(block, 32)), e.plus(xs, e.times(block, 4 * TOKENS)), scratch, sums
            )
        return sums

    even = e.b.and_(count, e.i64(-IN_FLIGHT))
    sums = e.loop(even, IN_FLIGHT, [e.fill(F32, 0.0)] * TOKENS, lambda i, sums: turn(i, sums, IN_FLIGHT))
    return e.loop(e.b.sub(count, even), 1, sums, lambda i, sums: turn(e.plus(even, i), sums, 1))


@intrinsic
def _column_tile(ctx, w_at, scales_at, blocks, x_at, x_scales_at, scratch_at, out_at, out_stride):
    """out[t, 0:16] = 16 rows times 16 tokens; w_at signed blocks, out float32."""

    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        w_at, scales_at, blocks, x_at, x_scales_at, scratch_at, out_at, out_stride = args
        if e.has_amx:
            sums = _block_loop(e, blocks, e.i64(0), w_at, scales_at, x_at, x_scales_at, scratch_at)
            for t, value in enumerate(sums):
                e.store(value, out_at, e.times(out_stride, 4 * t))
        return cg.get_dummy_value()

    u, i = types.uintp, types.intp
    return types.void(u, u, i, u, u, u, u, i), codegen


@intrinsic
def _panels_tile(ctx, w_at, scales_at, panels, blocks, x_at, x_scales_at, scratch_at, out_at, out_stride):
    """As _column_tile over panels of `blocks` blocks, each rounded to the grid; out float64."""

    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        w_at, scales_at, panels, blocks, x_at, x_scales_at, scratch_at, out_at, out_stride = args
        if e.has_amx:
            rows = [e.plus(out_at, e.times(out_stride, 8 * t)) for t in range(TOKENS)]
            zero = e.fill(F64, 0.0)
            for row in rows:
                e.store(zero, row)

            def one_panel(p: ir.Value, _: Any) -> list[ir.Value]:
                first = e.b.mul(p, blocks)
                sums = _block_loop(e, blocks, first, w_at, scales_at, x_at, x_scales_at, scratch_at)
                for row, value in zip(rows, sums, strict=True):
                    e.store(e.b.fadd(e.load(zero.type, row), e.round_to_grid(value)), row)
                return []

            e.loop(panels, 1, [], one_panel)
        return cg.get_dummy_value()

    u, i = types.uintp, types.intp
    return types.void(u, u, i, i, u, u, u, u, i), codegen


@njit(nogil=True, cache=True)
def amx_column_blocks(w, scales, tokens, values, x_scales, out, first, last, configuration):
    """Groups first:last for the whole tiles of 16 tokens; the other tokens are left to the caller."""
    blocks, stride = w.shape[1], out.shape[1]
    signed, scratch = np.empty(blocks * 512 + 64, np.uint8), np.empty(SCRATCH_BYTES + 64, np.uint8)
    signed_at, scratch_at = (signed.ctypes.data + 63) // 64 * 64, (scratch.ctypes.data + 63) // 64 * 64
    amx_begin(configuration.ctypes.data)
    for g in range(first, last):
        _signed_blocks(w, w[g].ctypes.data, blocks, signed_at)
        for t in range(0, tokens // TOKENS * TOKENS, TOKENS):
            place = block_place(tokens, blocks, t, 0)
            out_at = out.ctypes.data + 4 * (t * stride + 16 * g)
            x_at, xs_at = values[place].ctypes.data, x_scales[place:].ctypes.data
            _column_tile(signed_at, scales[g].ctypes.data, blocks, x_at, xs_at, scratch_at, out_at, stride)
    amx_end()


@njit(nogil=True, cache=True)
def amx_row_blocks(w, scales, tokens, values, x_scales, out, first, last, configuration):
    """As amx_column_blocks over panels; out float64."""
    panels, blocks, stride = w.shape[0], w.shape[2], out.shape[1]
    signed, scratch = np.empty(panels * blocks * 512 + 64, np.uint8), np.empty(SCRATCH_BYTES + 64, np.uint8)
    signed_at, scratch_at = (signed.ctypes.data + 63) // 64 * 64, (scratch.ctypes.data + 63) // 64 * 64
    group_scales = np.empty((panels, blocks, 16), scales.dtype)
    s_at = group_scales.ctypes.data
    amx_begin(configuration.ctypes.data)
    for g in range(first, last):
        for p in range(panels):
            group_scales[p] = scales[p, g]
            _signed_blocks(w, w[p, g].ctypes.data, blocks, signed_at + p * blocks * 512)
        for t in range(0, tokens // TOKENS * TOKENS, TOKENS):
            place = block_place(tokens, panels * blocks, t, 0)
            out_at = out.ctypes.data + 8 * (t * stride + 16 * g)
            x_at, xs_at = values[place].ctypes.data, x_scales[place:].ctypes.data
            _panels_tile(signed_at, s_at, panels, blocks, x_at, xs_at, scratch_at, out_at, stride)
    amx_end()
