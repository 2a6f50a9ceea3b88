"""Choices between kernels that give the same bits: made by timing, once the weights are in place."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mpillama.kernels import amx, layer
from mpillama.kernels.target import requested_isa
from mpillama.model.linear import Matrix
from mpillama.model.workspace import Activations

SMALLEST_TIMED = 64 << 20
"""Bytes of a matrix below which caches, not memory, would be timed."""
AMX_GROUPS, AMX_TOKENS = 128, 64
"""How much of a matrix is multiplied, by how many tokens, to compare AMX with VNNI."""


@dataclass
class Tuning:
    """How products are computed; every choice gives the same bits.

    `in_flight`: row groups that a single token goes through together (processors prefetch differently);
    `tiles`: AMX's configuration, zeros where AMX is not used.
    """

    threads: int
    in_flight: int = 1
    tiles: np.ndarray = field(default_factory=amx.no_tiles)

    @property
    def arguments(self) -> tuple[int, int, np.ndarray]:
        """In the order of the kernels' arguments."""
        return self.threads, self.in_flight, self.tiles


def tune(threads: int, matrix: Matrix) -> Tuning:
    """Choose by timing products with a large column-parallel matrix of the model."""
    tuning = Tuning(threads)
    if matrix.scales is None:
        return tuning
    if amx.available():
        tuning.tiles = _choose_tiles(matrix, threads)
    if matrix.bytes >= SMALLEST_TIMED:
        product = _Product(matrix, 1)
        tuning.in_flight = min((1, 2), key=lambda n: product.seconds(Tuning(threads, n)))
    return tuning


class _Product:
    """A product of some tokens with a matrix, to be timed."""

    def __init__(self, matrix: Matrix, tokens: int):
        groups, blocks = matrix.values.shape[:2]
        random = np.random.default_rng(0)
        self.matrix = matrix
        self.h = Activations.empty(tokens, 32 * blocks)
        self.h.x[:] = random.standard_normal(self.h.x.shape)
        self.h.values[:] = random.integers(-127, 128, self.h.values.shape)
        self.h.scales[:] = 2.0**-10
        layout = self.h.values.astype(np.int32).sum(axis=1)
        self.h.starts[:] = -8 * layout
        self.out = np.empty((tokens, 16 * groups), np.float32)

    def run(self, tuning: Tuning) -> np.ndarray:
        """Compute it once."""
        layer.column_parallel(*self.matrix.arrays, *self.h.arrays, self.out, *tuning.arguments)
        return self.out

    def seconds(self, tuning: Tuning) -> float:
        """The fastest of a few runs."""
        return fastest(lambda: self.run(tuning))


def _choose_tiles(matrix: Matrix, threads: int) -> np.ndarray:
    """AMX's configuration if it is asked for by name or faster than VNNI here; never if its bits differ."""
    assert matrix.scales is not None
    part = Matrix(matrix.weight_type, matrix.values[:AMX_GROUPS], matrix.scales[:AMX_GROUPS])
    product = _Product(part, AMX_TOKENS)
    with_amx, without = Tuning(threads, tiles=amx.tile_configuration()), Tuning(threads)
    if not np.array_equal(product.run(without).copy(), product.run(with_amx)):
        warnings.warn("AMX and VNNI give different results on this processor; AMX is not used.", stacklevel=2)
        return without.tiles
    wanted = requested_isa() == "amx" or product.seconds(with_amx) < product.seconds(without)
    return (with_amx if wanted else without).tiles


def fastest(run: Callable[[], object], repetitions: int = 3) -> float:
    """Seconds of the fastest of a few runs."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
