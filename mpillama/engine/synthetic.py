"""Weights made in memory, for measuring a shape without a file: every byte is written, values are small and varied."""

from collections.abc import Sequence

import numpy as np

from mpillama.model.tensors import TensorSpec

TILE_BYTES = 1 << 20
SCALE = 2.0**-9


class SyntheticWeights:
    """Fills slices like a reader would; the same for every unit, whatever the number of ranks."""

    def __init__(self, seed: int = 0):
        self.random = np.random.default_rng(seed)
        self.tile = self.random.integers(0, 256, TILE_BYTES, np.uint8)
        self.bytes_read = 0
        self.stopped = False
        self.floats = (self.random.standard_normal(TILE_BYTES // 4) * 0.02).astype(np.float32)

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
        self._fill_values(spec, arrays[0])
        for scales in arrays[1:]:
            scales[:] = SCALE

    def _fill_values(self, spec: TensorSpec, array: np.ndarray) -> None:
        flat = array.reshape(-1)
        if spec.weight_type.quantised:
            self._repeat(flat.view(np.uint8), self.tile)
        elif spec.weight_type.name == "bf16":
            self._repeat(flat, (self.floats.view(np.uint32) >> 16).astype(np.uint16))
        else:
            self._repeat(flat, self.floats.astype(array.dtype))

    def _repeat(self, target: np.ndarray, tile: np.ndarray) -> None:
        for start in range(0, len(target), len(tile)):
            part = target[start : start + len(tile)]
            part[:] = tile[: len(part)]
