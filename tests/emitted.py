"""The vocabulary of the kernels (`Emit`) one operation at a time, so that a test can call it; imports Numba."""

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from mpillama.kernels.emit import V16F32, V16I16, Emit
from mpillama.kernels.rope import sine_cosine


@intrinsic
def _exp(ctx, x_at, out_at):
    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        e.store(e.exp(e.load(V16F32, args[0])), args[1])
        return cg.get_dummy_value()

    return types.void(types.uintp, types.uintp), codegen


@intrinsic
def _half_to_float(ctx, bits_at, out_at):
    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        e.store(e.half_to_float(e.load(V16I16, args[0])), args[1])
        return cg.get_dummy_value()

    return types.void(types.uintp, types.uintp), codegen


@intrinsic
def _float_to_half(ctx, x_at, out_at):
    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        e.store(e.float_to_half(e.load(V16F32, args[0])), args[1])
        return cg.get_dummy_value()

    return types.void(types.uintp, types.uintp), codegen


@intrinsic
def _bfloat_to_float(ctx, bits_at, out_at):
    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        e.store(e.bfloat_to_float(e.load(V16I16, args[0])), args[1])
        return cg.get_dummy_value()

    return types.void(types.uintp, types.uintp), codegen


@intrinsic
def _round_to_grid(ctx, x_at, out_at):
    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        e.store(e.round_to_grid(e.load(V16F32, args[0])), args[1])
        return cg.get_dummy_value()

    return types.void(types.uintp, types.uintp), codegen


@njit(cache=True)
def _exp_all(x, out):
    for i in range(0, x.shape[0], 16):
        _exp(x[i:].ctypes.data, out[i:].ctypes.data)


@njit(cache=True)
def _half_to_float_all(bits, out):
    for i in range(0, bits.shape[0], 16):
        _half_to_float(bits[i:].ctypes.data, out[i:].ctypes.data)


@njit(cache=True)
def _float_to_half_all(x, out):
    for i in range(0, x.shape[0], 16):
        _float_to_half(x[i:].ctypes.data, out[i:].ctypes.data)


@njit(cache=True)
def _bfloat_to_float_all(bits, out):
    for i in range(0, bits.shape[0], 16):
        _bfloat_to_float(bits[i:].ctypes.data, out[i:].ctypes.data)


@njit(cache=True)
def _round_to_grid_all(x, out):
    for i in range(0, x.shape[0], 16):
        _round_to_grid(x[i:].ctypes.data, out[i:].ctypes.data)


@njit(cache=True)
def _sine_cosine_all(angles, sines, cosines):
    for i in range(angles.shape[0]):
        sines[i], cosines[i] = sine_cosine(angles[i])


def _in_lanes(function, x: np.ndarray, dtype: type) -> np.ndarray:
    """Apply `function` to 16 lanes at a time; the last lanes are filled up with zeros."""
    padded = np.concatenate([x, np.zeros(-len(x) % 16, x.dtype)])
    out = np.empty(len(padded), dtype)
    function(padded, out)
    return out[: len(x)]


def exp(x: np.ndarray) -> np.ndarray:
    """e^x of float32 [n]."""
    return _in_lanes(_exp_all, x, np.float32)


def half_to_float(bits: np.ndarray) -> np.ndarray:
    """uint16 patterns [n] as float32."""
    return _in_lanes(_half_to_float_all, bits, np.float32)


def float_to_half(x: np.ndarray) -> np.ndarray:
    """float32 [n] as uint16 patterns."""
    return _in_lanes(_float_to_half_all, x, np.uint16)


def bfloat_to_float(bits: np.ndarray) -> np.ndarray:
    """uint16 patterns [n] as float32."""
    return _in_lanes(_bfloat_to_float_all, bits, np.float32)


def round_to_grid(x: np.ndarray) -> np.ndarray:
    """float32 [n] as float64 on the grid."""
    return _in_lanes(_round_to_grid_all, x, np.float64)


def sine_cosine_of(angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sin and cos of float64 [n]."""
    sines, cosines = np.empty_like(angles), np.empty_like(angles)
    _sine_cosine_all(angles, sines, cosines)
    return sines, cosines
