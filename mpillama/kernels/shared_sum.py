"""The sum over ranks of one host through memory that they share.

Every rank writes its addends into a slot of its own, raises its flag to the number of the exchange, waits until all
flags have reached it, and adds the slots up in order of rank. Slots alternate between two halves: a rank can only be
writing into a half when all ranks have finished reading it, because they have raised their flags for the exchange
between; so no second wait is needed.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from mpillama.kernels.emit import I32, I64, VOID, Emit

FLAG_STRIDE = 8
"""Flags lie a cache line apart: int64 [ranks, 8]."""


@intrinsic
def _load_acquire(ctx, address):
    """Read an int64 that another process writes."""

    def codegen(cg, builder, sig, args):
        return builder.load_atomic(Emit(builder).pointer(args[0], I64), "acquire", 8, typ=I64)

    return types.int64(types.uintp), codegen


@intrinsic
def _store_release(ctx, address, value):
    """Write an int64 after everything written before it."""

    def codegen(cg, builder, sig, args):
        builder.store_atomic(args[1], Emit(builder).pointer(args[0], I64), "release", 8)
        return cg.get_dummy_value()

    return types.void(types.uintp, types.int64), codegen


@intrinsic
def _pause(ctx):
    """Tell the processor that this is a polling loop."""

    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        if e.is_x86:
            e.call("llvm.x86.sse2.pause", VOID, [])
        return cg.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _yield_core(ctx):
    """Give the core to another process (sched_yield of the C library)."""

    def codegen(cg, builder, sig, args):
        functions = builder.module.globals
        name = "sched_yield"
        function = functions.get(name) or ir.Function(builder.module, ir.FunctionType(I32, []), name)
        builder.call(function, [])
        return cg.get_dummy_value()

    return types.void(), codegen


@njit(nogil=True, cache=True)
def _all_arrived(flags, sequence):
    arrived = True
    for other in range(flags.shape[0]):
        arrived = arrived and _load_acquire(flags[other].ctypes.data) >= sequence
    return arrived


@njit(nogil=True, cache=True)
def sum_shared(partial, slots, flags, rank, sequence, posted, spins, yields):
    """Replace partial float64 [n] by its sum over ranks; returns whether all ranks arrived while it waited.

    slots float64 [2, ranks, capacity >= n], flags int64 [ranks, 8]. Polls `spins` times, then gives the core away up to
    `yields` times. If it returns False, call again with `posted`: the addends are in place already.
    """
    half, count = slots[sequence % 2], partial.shape[0]
    if not posted:
        half[rank, :count] = partial
        _store_release(flags[rank].ctypes.data, sequence)
    tries = 0
    while not _all_arrived(flags, sequence):
        tries += 1
        if tries > spins + yields:
            return False
        if tries > spins:
            _yield_core()
        else:
            _pause()
    for i in range(count):
        partial[i] = half[0, i]
    for other in range(1, flags.shape[0]):
        for i in range(count):
            partial[i] += half[other, i]
    return True


def views(memory: np.ndarray, ranks: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """The flags and slots in shared memory (uint8, 64 * ranks + 16 * ranks * capacity bytes)."""
    return flags_of(memory, ranks), slots_of(memory, ranks, capacity)


def flag_bytes(ranks: int) -> int:
    """Bytes of the flags of this many ranks."""
    return ranks * FLAG_STRIDE * 8


def flags_of(memory: np.ndarray, ranks: int) -> np.ndarray:
    """The flags at the beginning of shared memory (uint8)."""
    return memory[: flag_bytes(ranks)].view(np.int64).reshape(ranks, FLAG_STRIDE)


def slots_of(memory: np.ndarray, ranks: int, capacity: int) -> np.ndarray:
    """The slots behind the flags: float64 [2, ranks, capacity]."""
    start = flag_bytes(ranks)
    return memory[start : start + 16 * ranks * capacity].view(np.float64).reshape(2, ranks, capacity)
