"""How fast the threads of a rank read memory: the limit of decoding."""

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic

from mpillama.kernels.emit import I64, Emit, vector

LINE = 64
IN_FLIGHT = 8


@intrinsic
def _xor_lines(ctx, address, size):
    """Read `size` bytes (a multiple of 512) and return the exclusive-or of all 64-bit words."""

    def codegen(cg, builder, sig, args):
        e = Emit(builder)
        address, size = args
        line = vector(I64, LINE // 8)
        zero = e.fill(I64, 0, LINE // 8)

        def body(i, sums):
            here = e.plus(address, i)
            for j in range(IN_FLIGHT):
                e.prefetch(here, LINE * j + 4096)
            return [e.b.xor(total, e.load(line, here, LINE * j)) for j, total in enumerate(sums)]

        sums = e.loop(size, LINE * IN_FLIGHT, [zero] * IN_FLIGHT, body)
        total = sums[0]
        for other in sums[1:]:
            total = e.b.xor(total, other)
        return e.call(f"llvm.vector.reduce.xor.v{LINE // 8}i64", I64, [total])

    return types.int64(types.uintp, types.intp), codegen


@njit(nogil=True, parallel=True, cache=True)
def read_memory(data, results, threads):
    """Read all of data (uint8, a multiple of 512 bytes for each thread) once; results int64 [threads]."""
    share = data.shape[0] // threads // 512 * 512
    for thread in prange(threads):
        results[thread] = _xor_lines(data[thread * share :].ctypes.data, share)


def bytes_read(size: int, threads: int) -> int:
    """The bytes that read_memory reads of `size`."""
    return size // threads // 512 * 512 * threads


def new_results(threads: int) -> np.ndarray:
    """Room for read_memory's results."""
    return np.zeros(threads, np.int64)
