"""What half a layer computes, added up over ranks and to the residual stream."""

import ctypes
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np

from mpillama.comm.communicator import Communicator
from mpillama.comm.shared_memory import TOGETHER, Backoff, SharedReduction
from mpillama.kernels import arguments
from mpillama.kernels.library import Team
from mpillama.kernels.shared_sum import PROGRESS_STRIDE, SharedWindow
from mpillama.models.config import ModelConfig
from mpillama.models.workspace import StepArrays

Array = np.ndarray
Half = Callable[[arguments.Sum | None], bool]
"""Runs half a layer; gets how to add up, None to leave that; returns whether the sum was there."""


@dataclass(frozen=True)
class Ending:
    """What happens to half a layer's sum on its way to the residual stream: bias, norm, factor."""

    bias: Array | None
    norm: Array | None
    factor: float


Add = Callable[[StepArrays, Half, Ending], None]
"""Runs half a layer and adds its sum to the residual stream, sooner or later."""


@dataclass
class Begun:
    """A sum whose addends this rank has handed over, or all of it if it is `done`."""

    arrays: StepArrays
    ending: Ending
    total: arguments.Sum
    shared: SharedReduction | None
    done: bool


class ResidualSum:
    """Adds the sum over ranks of what half a layer computes to the residual stream.

    Where the ranks share memory, threads add up in the half's own region, each its columns as soon as they are ready.
    """

    def __init__(self, comm: Communicator, team: Team, config: ModelConfig):
        self.comm = comm
        self.team = team
        self.size, self.eps = config.hidden_size, config.rms_norm_eps
        self._progress = np.zeros((TOGETHER, team.threads, PROGRESS_STRIDE), np.int64)
        self._sums = [arguments.Sum(progress=arguments.address(progress)) for progress in self._progress]
        self._begun: deque[Begun] = deque()

    def __call__(self, a: StepArrays, half: Half, ending: Ending) -> None:
        """Run half a layer and add its sum to a.x, as `ending` says."""
        shared = self.comm.shared_for(a.partial.size)
        if self.comm.size > 1 and shared is None:
            half(None)
            total = self.comm.all_reduce(a.partial)
            if ending.norm is None:
                self.team.add_rounded(a.x, total, ending.bias, ending.factor)
            else:
                a.addend[:] = 0
                self.team.add_rounded(a.addend, total, ending.bias, 1.0)
                self._add_normalised(a, ending)
            return
        backoff = Backoff(self.comm.yields)
        self._finish(self._begin(a, half, ending, shared, (0, 0) if shared is None else shared.waits(backoff)))

    def begin(self, a: StepArrays, half: Half, ending: Ending) -> None:
        """Run half a layer; its sum travels from now on, and is added by one of the next calls.

        There must be room for it, and the ranks must share memory and have other hosts.
        """
        shared = cast(SharedReduction, self.comm.shared_for(a.partial.size))
        self._begun.append(self._begin(a, half, ending, shared, (0, 0)))
        shared.hand_over()

    def make_room(self) -> None:
        """Add sums to the residual stream, the oldest first, until another one may be begun."""
        while len(self._begun) >= TOGETHER:
            self._finish(self._begun.popleft())

    def finish_all(self) -> None:
        """Add all that was begun."""
        while self._begun:
            self._finish(self._begun.popleft())

    def _begin(
        self, a: StepArrays, half: Half, ending: Ending, shared: SharedReduction | None, waits: tuple[int, int]
    ) -> Begun:
        total = self._sums[0]
        self._sums.reverse()
        target, factor = (a.x, ending.factor) if ending.norm is None else (a.addend, 1.0)
        total.bias, total.factor, total.waited = arguments.address(ending.bias), factor, 0
        total.addend = None if target is a.x else arguments.address(target)
        if shared is not None:
            window = cast(SharedWindow, shared.shared)
            total.window = ctypes.addressof(window.argument)
            total.sequence = shared.next_sequence(window.exchanges(*a.partial.shape))
            total.spins, total.yields = waits
        else:
            total.window = None
        return Begun(a, ending, total, shared, half(total))

    def _finish(self, begun: Begun) -> None:
        a, total, shared = begun.arrays, begun.total, begun.shared
        if shared is not None:
            total.spins, total.yields = shared.waits(Backoff(self.comm.yields))
            go_on = lambda: self.team.finish_sum(a.argument, total)  # noqa: E731
            self.comm.finish_all_reduce(shared, begun.done, total.waited * 1e-9, go_on)
        if begun.ending.norm is not None:
            self._add_normalised(a, begun.ending)

    def _add_normalised(self, a: StepArrays, ending: Ending) -> None:
        assert ending.norm is not None
        self.team.add_normalised(a.x, a.addend, ending.norm, self.size, self.eps, ending.factor)
