"""How a rank waits for others: it polls for a moment, then sleeps, so that it takes no core from ranks that work."""

import os
import time

SPINS = 4000
"""Polls of shared memory before the core is given away: some 100 microseconds."""
POLLING_SECONDS = 0.02
"""How long a rank polls that has its cores to itself: longer than most gaps between steps."""
YIELDING_SECONDS = 0.001
"""How long it gives the core away again and again where a host has more threads than cores."""
SHARE = 1 / 32
"""A nap lasts this share of the wait so far: whoever has waited long is not late by much more."""
LONGEST_NAP = 0.005
"""What a nap may add to the first token after a pause."""


class Backoff:
    """One wait; call `pause` between two polls. `yields`: this host has more threads than cores."""

    def __init__(self, yields: bool = False):
        self.yields = yields
        self._start = time.perf_counter()

    @property
    def spins(self) -> int:
        """How often shared memory is polled before the core is given away."""
        return 0 if self.yields else SPINS

    def pause(self) -> None:
        """Poll on at once, give the core away or sleep, as the wait gets longer."""
        waited = time.perf_counter() - self._start
        if waited >= (YIELDING_SECONDS if self.yields else POLLING_SECONDS):
            time.sleep(min(waited * SHARE, LONGEST_NAP))
        elif self.yields:
            os.sched_yield()
