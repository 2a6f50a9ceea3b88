"""Choices between ways to compute that give the same bits: made by timing, once the weights are in place."""

import time
from collections.abc import Callable

import numpy as np

from mpillama.kernels.library import Team
from mpillama.models.linear import Matrix
from mpillama.models.workspace import Activations

SMALLEST_TIMED = 64 << 20
"""Bytes of a matrix below which caches, not memory, would be timed."""


def choose_in_flight(team: Team, matrix: Matrix) -> int:
    """How many row groups a single token should go through together, 1 or 2: processors prefetch differently."""
    if not matrix.weight_type.quantised or matrix.bytes < SMALLEST_TIMED:
        return 1
    h = Activations.empty(1, matrix.columns)
    for array in (h.x, h.values, h.scales, h.starts):
        array[:] = 0
    out, w, x = np.empty((1, matrix.rows), np.float32), matrix.column_parallel(), h.argument()
    return min((1, 2), key=lambda n: fastest(lambda: team.column_parallel(w, x, out, n)))


def fastest(run: Callable[[], object], repetitions: int = 3) -> float:
    """Seconds of the fastest of a few runs."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
