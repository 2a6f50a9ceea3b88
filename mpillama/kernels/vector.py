"""Kernels that work on the activations themselves: quantisation, RMSNorm, SwiGLU.

All widths are multiples of 32 (padded with zeros).
"""

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from mpillama.kernels.activations import block_place
from mpillama.kernels.emit import F32, F64, I8, I32, V16F32, V16F64, V16I32, Emit, float_bits, vector

TINIEST = 1e-30
"""Blocks whose largest magnitude is below this are all zeros: 127 / magnitude stays finite."""


@intrinsic
def _quantise_block(ctx, x_at, values_at, scale_at, start_at):
    """32 float32 -> 32 int8 with the scale max|x| / 127 (as Q8_0), and -8 times their sum.

    A block with an infinity or NaN gets the scale NaN, so that it is seen in every result.
    """

    def codegen(cg, builder, sig, args):
        e, b = Emit(builder), builder
        x_at, values_at, scale_at, start_at = args
        x = [e.load(V16F32, x_at, 64 * half) for half in range(2)]
        magnitudes = [b.and_(b.bitcast(v, V16I32), e.fill(I32, 0x7FFFFFFF)) for v in x]
        larger = b.select(b.icmp_unsigned(">", magnitudes[0], magnitudes[1]), magnitudes[0], magnitudes[1])
        top = e.reduce("umax", larger)  # as integers the order is the same, with infinity and NaN on top
        finite = b.icmp_unsigned("<", top, ir.Constant(I32, 0x7F800000))
        small = b.icmp_unsigned("<", top, ir.Constant(I32, float_bits(TINIEST)))
        largest = b.bitcast(top, F32)
        usable = b.and_(finite, b.not_(small))
        scale = b.fdiv(largest, ir.Constant(F32, 127.0))
        inverse = b.select(usable, b.fdiv(ir.Constant(F32, 127.0), largest), ir.Constant(F32, 0.0))
        scale = b.select(usable, scale, b.select(finite, ir.Constant(F32, 0.0), ir.Constant(F32, float("nan"))))
        clean = b.select(finite, ir.Constant(I32, -1), ir.Constant(I32, 0))
        total = e.fill(I32, 0)
        for half, v in enumerate(x):
            safe = b.bitcast(b.and_(b.bitcast(v, V16I32), e.splat(clean)), V16F32)
            whole = e.round_to_int(b.fmul(safe, e.splat(inverse)))
            e.store(b.trunc(whole, vector(I8)), values_at, 16 * half)
            total = b.add(total, whole)
        e.store(scale, scale_at)
        e.store(b.mul(e.reduce("add", total), ir.Constant(I32, -8)), start_at)
        return cg.get_dummy_value()

    return types.void(*[types.uintp] * 4), codegen


@njit(nogil=True, cache=True)
def quantise_blocks(x, values, scales, starts, tokens, token, first, blocks):
    """Quantise part of one of a step's tokens (GGML's Q8_0 with an unrounded scale): blocks first, first + 1, … of it.

    x float32 [k]; `blocks` is the number of blocks of a whole token; kernels/activations.py says how they lie.
    """
    for i in range(x.shape[0] // 32):
        place = block_place(tokens, blocks, token, first + i)
        _quantise_block(
            x[32 * i :].ctypes.data, values[place].ctypes.data, scales[place:].ctypes.data, starts[place:].ctypes.data
        )


@intrinsic
def _rms_norm_row(ctx, x_at, weight_at, out_at, width, size, eps):
    """One row: the squares are summed in float64 in 16 lanes, the rest is float32 as in the reference."""

    def codegen(cg, builder, sig, args):
        e, b = Emit(builder), builder
        x_at, weight_at, out_at, width, size, eps = args

        def add_squares(i, sums):
            x = b.fpext(e.load(V16F32, x_at, e.times(i, 4)), V16F64)
            return [e.fma(x, x, sums[0])]

        (squares,) = e.loop(width, 16, [e.fill(F64, 0.0)], add_squares)
        mean = b.fdiv(e.ordered_sum(squares), b.sitofp(size, F64))
        root = e.call("llvm.sqrt.f64", F64, [b.fadd(mean, eps)])
        inverse = e.splat(b.fptrunc(b.fdiv(ir.Constant(F64, 1.0), root), F32))

        def scale(i, _):
            x = e.load(V16F32, x_at, e.times(i, 4))
            weight = e.load(V16F32, weight_at, e.times(i, 4))
            e.store(b.fmul(b.fmul(x, inverse), weight), out_at, e.times(i, 4))
            return []

        e.loop(width, 16, [], scale)
        return cg.get_dummy_value()

    return types.void(*[types.uintp] * 3, types.intp, types.intp, types.float64), codegen


@njit(nogil=True, cache=True)
def rms_norm_row(x, weight, size, eps, out):
    """out = x / sqrt(mean of squares + eps) * weight (https://arxiv.org/abs/1910.07467).

    x, weight, out float32 [width]; `size` is the width without the padding.
    """
    _rms_norm_row(x.ctypes.data, weight.ctypes.data, out.ctypes.data, x.shape[0], size, eps)


@intrinsic
def _silu_multiply_row(ctx, gate_at, up_at, out_at, width):
    """gate / (1 + e^-gate) * up over one row."""

    def codegen(cg, builder, sig, args):
        e, b = Emit(builder), builder
        gate_at, up_at, out_at, width = args

        def body(i, _):
            offset = e.times(i, 4)
            gate, up = e.load(V16F32, gate_at, offset), e.load(V16F32, up_at, offset)
            one = e.fill(F32, 1.0)
            silu = b.fdiv(gate, b.fadd(one, e.exp(b.fneg(gate))))
            e.store(b.fmul(silu, up), out_at, offset)
            return []

        e.loop(width, 16, [], body)
        return cg.get_dummy_value()

    return types.void(*[types.uintp] * 3, types.intp), codegen


@njit(nogil=True, cache=True)
def silu_multiply(gate, up, out, first, last):
    """out[first:last] = silu(gate) * up (SwiGLU, https://arxiv.org/abs/2002.05202) of one token; all float32."""
    _silu_multiply_row(gate[first:].ctypes.data, up[first:].ctypes.data, out[first:].ctypes.data, last - first)


@njit(nogil=True, cache=True)
def add_bias(x, bias, first, last):
    """x[first:last] += bias[first:last] of one token; both float32."""
    for i in range(first, last):
        x[i] += bias[i]


@njit(nogil=True, cache=True)
def multiply(x, factor, first, last):
    """x[first:last] *= factor of one token; float32."""
    for i in range(first, last):
        x[i] *= factor


@njit(nogil=True, cache=True)
def add_to_all(x, bias):
    """x[t] += bias; float32 [tokens, width] and [width]."""
    for t in range(x.shape[0]):
        add_bias(x[t], bias, 0, x.shape[1])


@njit(nogil=True, parallel=True, cache=True)
def add_rounded(x, total, threads):
    """x += total rounded to float32; x float32, total float64 [tokens, width]."""
    tokens, width = x.shape
    if tokens < 8:
        for t in range(tokens):
            for i in range(width):
                x[t, i] += np.float32(total[t, i])
    else:
        for thread in prange(threads):
            for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
                for i in range(width):
                    x[t, i] += np.float32(total[t, i])


@njit(nogil=True, parallel=True, cache=True)
def round_to_float(total, out, threads):
    """out = total rounded to float32; float64 and float32 [tokens, width]."""
    tokens = out.shape[0]
    for thread in prange(threads):
        for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
            for i in range(out.shape[1]):
                out[t, i] = np.float32(total[t, i])
