"""Weights made in memory, for measuring a shape without a file: every byte is written, values are small and varied."""

from collections.abc import Sequence

import numpy as np

from mpillama.models.tensors import TensorSpec
from mpillama.quant.weight_type import LANES, Arrays, WeightType

TILE_VALUES = 1 << 18


class SyntheticWeights:
    """Fills slices like a reader would; the same for every unit, whatever the number of ranks."""

    def __init__(self, seed: int = 0):
        self.bytes_read = 0
        self.stopped = False
        self.values = (np.random.default_rng(seed).standard_normal((LANES, TILE_VALUES // LANES)) * 0.02).astype("f4")
        self.tiles: dict[WeightType, Arrays] = {}

    def read(self, spec: TensorSpec, units: range, arrays: Sequence[np.ndarray]) -> None:
        """Fill the arrays of a tensor."""
        if self.stopped:
            return
        self._fill(spec, arrays)
        self.bytes_read += sum(array.nbytes for array in arrays)

    def stop(self) -> None:
        """Make nothing more: another rank has failed."""
        self.stopped = True

    def _fill(self, spec: TensorSpec, arrays: Sequence[np.ndarray]) -> None:
        if spec.vector:
            arrays[0][:] = 0.0 if spec.name.endswith(".bias") else 1.0
            return
        if spec.weight_type not in self.tiles:
            self.tiles[spec.weight_type] = spec.weight_type.pack(self.values)
        for array, tile in zip(arrays, self.tiles[spec.weight_type], strict=True):
            self._repeat(array.reshape(-1), tile.reshape(-1))

    def _repeat(self, target: np.ndarray, tile: np.ndarray) -> None:
        for start in range(0, len(target), len(tile)):
            part = target[start : start + len(tile)]
            part[:] = tile[: len(part)]
