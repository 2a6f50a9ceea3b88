"""The sum over ranks of one host through memory that they share; kernels/src/shared_sum.h says how."""

from ctypes import byref

import numpy as np

from mpillama.kernels import arguments
from mpillama.kernels.library import Library

FLAG_STRIDE = 8
"""Flags lie a cache line apart: int64 [ranks, 8]."""


def window_bytes(ranks: int, capacity: int) -> int:
    """Bytes of flags and slots."""
    return (8 * FLAG_STRIDE + 16 * capacity) * ranks


class SharedWindow:
    """Flags and two slots of `capacity` float64 for each rank, in `memory` (uint8) that all of them see."""

    def __init__(self, library: Library, memory: np.ndarray, ranks: int, rank: int, capacity: int):
        border = 8 * FLAG_STRIDE * ranks
        self.library = library
        self.capacity = capacity
        self.flags = memory[:border].view(np.int64).reshape(ranks, FLAG_STRIDE)
        self.slots = memory[border : window_bytes(ranks, capacity)].view(np.float64).reshape(2, ranks, capacity)
        self._window = arguments.Window(self.slots.ctypes.data, self.flags.ctypes.data, ranks, rank, capacity)

    def sum(self, partial: np.ndarray, sequence: int, posted: bool, spins: int, yields: int) -> bool:
        """Replace partial float64 [n] by its sum over ranks; returns whether all ranks arrived while it waited.

        Polls `spins` times, then gives the core away up to `yields` times. If it returns False, call again with
        `posted`: the addends are in place already.
        """
        done = self.library.calls.sum_shared(
            byref(self._window), partial.ctypes.data, len(partial), sequence, int(posted), spins, yields
        )
        return bool(done)
