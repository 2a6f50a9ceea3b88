"""Tiles of a matrix product: a few groups of 16 weight rows times a few tokens, entirely in registers.

A tile keeps one accumulator of 16 lanes (rows) for each pair of group and token, so a row's sum never meets another's
and is the same in a tile of any shape. The weight type is told from the dtype of the weight array:
uint8 q4_0, int8 q8_0, float32 f32, int16 f16, uint16 bf16 (bit patterns).
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mpillama.kernels.emit import F32, F64, I8, I16, I32, V16F32, V16F64, V16I16, V16I32, V64I8, Emit, vector

STEPS = 8
"""A block of 32 k-values is 8 steps; a step is 64 bytes: 16 rows x 4 k-values."""
UNROLL = 4
"""k-values a float tile handles in one turn; every k is a multiple of 32."""

Store = Callable[[Emit, ir.Value, ir.Value, ir.Value], None]
Weights = list[ir.Value]


def block_bytes(weights: types.Array) -> int:
    """Bytes of one block of 16 rows x 32 k-values."""
    return 256 if weights.dtype == types.uint8 else 512


# -- exact integer dot products of one block ---------------------------------------------------------------------------


def unpack_block(e: Emit, is_q4: bool, address: ir.Value) -> list[ir.Value]:
    """Load a block as 8 steps of 64 bytes: q4_0 as unsigned nibbles, q8_0 as the ISA's dot product wants it."""
    if is_q4:
        packed = [e.load(V64I8, address, 64 * j) for j in range(STEPS // 2)]
        low = [e.b.and_(p, e.fill(I8, 15, 64)) for p in packed]
        return low + [e.b.lshr(p, e.fill(I8, 4, 64)) for p in packed]
    steps = [e.load(V64I8, address, 64 * j) for j in range(STEPS)]
    return [e.b.xor(s, e.fill(I8, -128, 64)) for s in steps] if e.has_vnni else steps


def block_dot(e: Emit, is_q4: bool, weights: list[ir.Value], x: ir.Value, start: ir.Value) -> ir.Value:
    """The exact int32 dot products of 16 rows with the 32 int8 activations at address `x`.

    `start` is -8 times the sum of the activations: it takes back the 8 that q4_0 adds to every value.
    """
    steps = [e.load(I32, x, 4 * j) for j in range(STEPS)]
    if e.has_vnni:
        return _dot_vnni(e, weights, steps, start if is_q4 else e.b.shl(start, ir.Constant(I32, 4)))
    if e.has_avx2:
        return _dot_avx2_q4(e, weights, steps, start) if is_q4 else _dot_avx2_q8(e, weights, steps)
    return _dot_portable(e, weights, steps, start if is_q4 else ir.Constant(I32, 0))


def _dot_vnni(e: Emit, weights: list[ir.Value], steps: list[ir.Value], start: ir.Value) -> ir.Value:
    total = e.splat(start)
    for w, x in zip(weights, steps, strict=True):
        total = e.dot(total, w, e.b.bitcast(e.splat(x), V64I8))
    return total


def _halves(e: Emit, value: ir.Value) -> list[ir.Value]:
    indices = (range(32), range(32, 64))
    return [e.b.shuffle_vector(value, value, ir.Constant(vector(I32, 32), list(i))) for i in indices]


def _join(e: Emit, low: ir.Value, high: ir.Value) -> ir.Value:
    return e.b.shuffle_vector(low, high, ir.Constant(vector(I32, 16), list(range(16))))


def _byte_pairs(e: Emit, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    return e.call("llvm.x86.avx2.pmadd.ub.sw", vector(I16), [unsigned, signed])


def _word_pairs(e: Emit, words: ir.Value) -> ir.Value:
    return e.call("llvm.x86.avx2.pmadd.wd", vector(I32, 8), [words, e.fill(I16, 1)])


def _dot_avx2_q4(e: Emit, weights: list[ir.Value], steps: list[ir.Value], start: ir.Value) -> ir.Value:
    # Two nibbles times two bytes stay below 2*15*127 = 3810: eight steps fit 16 bits, nothing saturates.
    sums = [e.fill(I16, 0), e.fill(I16, 0)]
    for w, x in zip(weights, steps, strict=True):
        signed = e.b.bitcast(e.splat(x, 8), vector(I8, 32))
        sums = [e.b.add(s, _byte_pairs(e, half, signed)) for s, half in zip(sums, _halves(e, w), strict=True)]
    return e.b.add(_join(e, *[_word_pairs(e, s) for s in sums]), e.splat(start))


def _dot_avx2_q8(e: Emit, weights: list[ir.Value], steps: list[ir.Value]) -> ir.Value:
    # |w| <= 128 and |x| <= 127: a pair stays below 2*128*127 = 32512, so moving w's sign to x cannot saturate.
    sums = [e.fill(I32, 0, 8), e.fill(I32, 0, 8)]
    for w, x in zip(weights, steps, strict=True):
        signed = e.b.bitcast(e.splat(x, 8), vector(I8, 32))
        for i, half in enumerate(_halves(e, w)):
            magnitude = e.call("llvm.abs.v32i8", half.type, [half, ir.Constant(ir.IntType(1), 0)])
            moved = e.call("llvm.x86.avx2.psign.b", half.type, [signed, half])
            sums[i] = e.b.add(sums[i], _word_pairs(e, _byte_pairs(e, magnitude, moved)))
    return _join(e, *sums)


def _dot_portable(e: Emit, weights: list[ir.Value], steps: list[ir.Value], start: ir.Value) -> ir.Value:
    total = e.splat(start)
    for w, x in zip(weights, steps, strict=True):
        words = e.b.bitcast(w, V16I32)
        for byte in range(4):
            left = 24 - 8 * byte
            lane = e.b.ashr(e.b.shl(words, e.fill(I32, left)), e.fill(I32, 24))
            value = e.b.ashr(e.b.shl(x, ir.Constant(I32, left)), ir.Constant(I32, 24))
            total = e.b.add(total, e.b.mul(lane, e.splat(value)))
    return total


# -- what becomes of an accumulator ----------------------------------------------------------------------------------


def store_result(e: Emit, accumulator: ir.Value, out: ir.Value, index: ir.Value) -> None:
    """out[index : index + 16] = accumulator (float32)."""
    e.store(accumulator, out, e.times(index, 4))


def add_on_grid(e: Emit, accumulator: ir.Value, out: ir.Value, index: ir.Value) -> None:
    """out[index : index + 16] += accumulator, rounded to the grid (float64)."""
    address = e.plus(out, e.times(index, 8))
    e.store(e.b.fadd(e.load(V16F64, address), e.round_to_grid(accumulator)), address)


# -- the tiles ---------------------------------------------------------------------------------------------------------


@intrinsic
def copy_and_prefetch(ctx, target_at, source_at, count):
    """Copy `count` bytes, a multiple of 32, and ask for as many after them: the same panel's next row group."""

    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        target_at, source_at, count = args
        run = vector(I8, 32)

        def body(i, _):
            e.store(e.load(run, source_at, i), target_at, i)
            e.prefetch(source_at, i, count)
            return []

        e.loop(count, 32, [], body)
        return cg.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.intp), codegen


class _Tokens:
    """The quantised tokens of a tile; block i of token t lies at place i * width + t."""

    def __init__(self, tokens: int, values: ir.Value, scales: ir.Value, starts: ir.Value, width: ir.Value):
        self.tokens = tokens
        self.values, self.scales, self.starts, self.width = values, scales, starts, width

    def add_block(self, e: Emit, is_q4: bool, weights: Weights, scale: ir.Value, i: ir.Value, sums: Weights) -> Weights:
        """sums[t] + float(integer dot of block i) * (weight scale * activation scale), one FMA."""
        new = []
        place = e.b.mul(i, self.width)
        values = e.plus(self.values, e.times(place, 32))
        scales, starts = (e.plus(base, e.times(place, 4)) for base in (self.scales, self.starts))
        for t, total in enumerate(sums):
            dot = block_dot(e, is_q4, weights, e.plus(values, 32 * t), e.load(I32, starts, 4 * t))
            product = e.b.fmul(scale, e.splat(e.load(F32, scales, 4 * t)))
            new.append(e.fma(e.b.sitofp(dot, V16F32), product, total))
        return new


def block_tile(in_flight: int, tokens: int, store: Store, prefetch: int = 0) -> Any:
    """Make tile(w, w_at, scales_at, groups, blocks, values_at, x_scales_at, starts_at, width, out_at, out_stride).

    Multiplies `groups` adjacent row groups (a multiple of `in_flight`) of `blocks` blocks by `tokens` quantised tokens
    of a tile of `width` tokens. Blocks go in ascending k.
    """

    @intrinsic
    def tile(ctx, w, w_at, scales_at, groups, blocks, values_at, x_scales_at, starts_at, width, out_at, out_stride):
        is_q4, size = w.dtype == types.uint8, block_bytes(w)

        def codegen(cg, builder, sig, args):
            e = Emit(builder)
            _, w_at, scales_at, groups, blocks, values_at, x_scales_at, starts_at, width, out_at, out_stride = args
            x = _Tokens(tokens, values_at, x_scales_at, starts_at, width)

            def one_turn(group, _):
                at = [e.plus(w_at, e.b.mul(e.plus(group, g), e.times(blocks, size))) for g in range(in_flight)]
                s_at = [e.plus(scales_at, e.b.mul(e.plus(group, g), e.times(blocks, 32))) for g in range(in_flight)]

                def body(i, sums):
                    new = []
                    for g in range(in_flight):
                        here = e.plus(at[g], e.times(i, size))
                        for line in range(0, size if prefetch else 0, 64):
                            e.prefetch(here, line + prefetch, level=2)
                        weights = unpack_block(e, is_q4, here)
                        scale = e.half_to_float(e.load(V16I16, s_at[g], e.times(i, 32)))
                        new += x.add_block(e, is_q4, weights, scale, i, sums[g * tokens : (g + 1) * tokens])
                    return new

                sums = e.loop(blocks, 1, [e.fill(F32, 0.0)] * (in_flight * tokens), body)
                for i, value in enumerate(sums):
                    g, t = divmod(i, tokens)
                    store(e, value, out_at, e.plus(e.times(out_stride, t), e.times(e.plus(group, g), 16)))
                return []

            e.loop(groups, in_flight, [], one_turn)
            return cg.get_dummy_value()

        addresses = [types.uintp] * 3
        return types.void(
            w, types.uintp, types.uintp, types.intp, types.intp, *addresses, types.intp, types.uintp, types.intp
        ), codegen

    return tile


def panel_tile(tokens: int) -> Any:
    """Make tile(w, w_at, scales_at, panels, blocks, values_at, x_scales_at, starts_at, width, out_at, out_stride).

    Multiplies one row group by `tokens` quantised tokens over `panels` panels of `blocks` blocks, which lie one after
    the other; each panel's sum is rounded to the grid, and their float64 sum is stored.
    """

    @intrinsic
    def tile(ctx, w, w_at, scales_at, panels, blocks, values_at, x_scales_at, starts_at, width, out_at, out_stride):
        is_q4, size = w.dtype == types.uint8, block_bytes(w)

        def codegen(cg, builder, sig, args):
            e = Emit(builder)
            _, w_at, scales_at, panels, blocks, values_at, x_scales_at, starts_at, width, out_at, out_stride = args
            x = _Tokens(tokens, values_at, x_scales_at, starts_at, width)

            def one_panel(p, totals):
                first = e.b.mul(p, blocks)

                def body(i, sums):
                    block = e.plus(first, i)
                    weights = unpack_block(e, is_q4, e.plus(w_at, e.times(block, size)))
                    scale = e.half_to_float(e.load(V16I16, scales_at, e.times(block, 32)))
                    return x.add_block(e, is_q4, weights, scale, block, sums)

                sums = e.loop(blocks, 1, [e.fill(F32, 0.0)] * tokens, body)
                return [e.b.fadd(total, e.round_to_grid(s)) for total, s in zip(totals, sums, strict=True)]

            totals = e.loop(panels, 1, [e.fill(F64, 0.0)] * tokens, one_panel)
            for t, value in enumerate(totals):
                e.store(value, out_at, e.times(out_stride, 8 * t))
            return cg.get_dummy_value()

        addresses = [types.uintp] * 3
        return types.void(
            w, types.uintp, types.uintp, types.intp, types.intp, *addresses, types.intp, types.uintp, types.intp
        ), codegen

    return tile


def load_row_lanes(e: Emit, dtype: types.Type, address: ir.Value) -> ir.Value:
    """16 weights of a float type as float32."""
    if dtype == types.float32:
        return e.load(V16F32, address)
    bits = e.load(V16I16, address)
    return e.half_to_float(bits) if dtype == types.int16 else e.bfloat_to_float(bits)


def float_tile(in_flight: int, tokens: int, store: Store) -> Any:
    """Make tile(w, w_at, groups, k, x_at, x_stride, out_at, out_stride): as block_tile, for f32, f16 and bf16 weights.

    One FMA for each k in ascending order: sum += weight * activation.
    """

    @intrinsic
    def tile(ctx, w, w_at, groups, k, x_at, x_stride, out_at, out_stride):
        size = 16 * w.dtype.bitwidth // 8

        def codegen(cg, builder, sig, args):
            e = Emit(builder)
            _, w_at, groups, k, x_at, x_stride, out_at, out_stride = args
            x_token = [e.plus(x_at, e.times(x_stride, 4 * t)) for t in range(tokens)]

            def one_turn(group, _):
                at = [e.plus(w_at, e.b.mul(e.plus(group, g), e.times(k, size))) for g in range(in_flight)]

                def body(i, sums):
                    for u in range(UNROLL):
                        weights = [load_row_lanes(e, w.dtype, e.plus(a, e.times(i, size), size * u)) for a in at]
                        x = [e.splat(e.load(F32, a, e.times(i, 4), 4 * u)) for a in x_token]
                        pairs = [(g, t) for g in range(in_flight) for t in range(tokens)]
                        sums = [e.fma(weights[g], x[t], total) for (g, t), total in zip(pairs, sums, strict=True)]
                    return sums

                sums = e.loop(k, UNROLL, [e.fill(F32, 0.0)] * (in_flight * tokens), body)
                for i, value in enumerate(sums):
                    g, t = divmod(i, tokens)
                    store(e, value, out_at, e.plus(e.times(out_stride, t), e.times(e.plus(group, g), 16)))
                return []

            e.loop(groups, in_flight, [], one_turn)
            return cg.get_dummy_value()

        return types.void(
            w, types.uintp, types.intp, types.intp, types.uintp, types.intp, types.uintp, types.intp
        ), codegen

    return tile
