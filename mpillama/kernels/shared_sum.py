"""The sum over ranks of one host through memory that they share; kernels/src/shared_sum.h says how."""

from ctypes import byref

import numpy as np

from mpillama.kernels import arguments
from mpillama.kernels.library import Team

FLAG_STRIDE = 8
"""Flags lie a cache line apart, int64 [ranks, 8]: how often a rank's threads have arrived, and how many they are."""
PROGRESS_STRIDE = 8


def window_bytes(ranks: int, capacity: int) -> int:
    """Bytes of flags and slots."""
    return (8 * FLAG_STRIDE + 16 * capacity) * ranks


class SharedWindow:
    """Flags and two slots of `capacity` float64 for each rank, in `memory` (uint8) that all of them see."""

    def __init__(self, team: Team, memory: np.ndarray, ranks: int, rank: int, capacity: int):
        border = 8 * FLAG_STRIDE * ranks
        self.library = team.library
        self.threads = team.threads
        self.rank = rank
        self.capacity = capacity
        self.flags = memory[:border].view(np.int64).reshape(ranks, FLAG_STRIDE)
        self.slots = memory[border : window_bytes(ranks, capacity)].view(np.float64).reshape(2, ranks, capacity)
        self.argument = arguments.Window(self.slots.ctypes.data, self.flags.ctypes.data, ranks, rank, capacity)

    def clear(self) -> None:
        """Begin: once for this rank, before any rank adds up."""
        self.flags[self.rank] = 0
        self.flags[self.rank, 1] = self.threads

    def exchanges(self, tokens: int, width: int) -> int:
        """How many exchanges it takes to add up float64 [tokens, width] in the kernels; a token must fit a slot."""
        return -(-tokens // (self.capacity // width))

    def sum(self, partial: np.ndarray, sequence: int, posted: bool, spins: int, yields: int) -> bool:
        """Replace partial float64 [n] by its sum over ranks; returns whether all ranks arrived while it waited.

        Polls `spins` times, then gives the core away up to `yields` times. If it returns False, call again with
        `posted`: the addends are in place already.
        """
        done = self.library.calls.sum_shared(
            byref(self.argument), partial.ctypes.data, len(partial), sequence, int(posted), spins, yields
        )
        return bool(done)
