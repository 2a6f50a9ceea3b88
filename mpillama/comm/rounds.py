"""Rounds of news: a few numbers of every rank, exchanged while all are busy, so that nobody waits for anybody."""

import numpy as np
from mpi4py import MPI

from mpillama.comm.communicator import Communicator


class Rounds:
    """One all-gather after the other, each begun and completed on the way; the main thread alone may use it.

    All ranks see the same rounds: whatever they decide by a round's numbers, they decide alike. Rounds have a
    communicator of their own, which all ranks make together, so that one that never comes disturbs no other collective.
    """

    def __init__(self, comm: Communicator):
        with comm.watch.blocking("the start of loading"):
            self.mpi = comm.mpi.Dup()
        self.under_way: MPI.Request | None = None
        self.told = self.heard = np.empty(0, np.int64)

    def exchange(self, news: np.ndarray) -> np.ndarray | None:
        """Tell int64 [count] in the next round that begins; returns [ranks, count] when a round is complete."""
        if self.under_way is None:
            self.told = news.astype(np.int64)
            self.heard = np.empty((self.mpi.size, len(news)), np.int64)
            self.under_way = self.mpi.Iallgather(self.told, self.heard)
        if not self.under_way.Test():
            return None
        self.under_way = None
        return self.heard
