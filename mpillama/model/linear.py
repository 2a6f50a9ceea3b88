"""Weight matrices in row lanes, and the activations they multiply."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpillama.kernels import embedding, matmul, vector
from mpillama.layout.weight_types import BLOCK, LANES, WeightType


class Activations:
    """Float32 [tokens, k]; quantised once, when the first quantised matrix asks for it."""

    def __init__(self, x: np.ndarray, threads: int):
        self.x = x
        self.threads = threads

    @cached_property
    def blocks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int8 values [tokens, k/32, 32], float32 scales and int32 start values [tokens, k/32]."""
        tokens, k = self.x.shape
        values = np.empty((tokens, k // BLOCK, BLOCK), np.int8)
        scales = np.empty((tokens, k // BLOCK), np.float32)
        starts = np.empty((tokens, k // BLOCK), np.int32)
        vector.quantise(self.x, values, scales, starts, self.threads)
        return values, scales, starts


@dataclass(frozen=True)
class Matrix:
    """This rank's slice of a weight matrix, in the dtypes that kernels know the types by."""

    weight_type: WeightType
    values: np.ndarray
    scales: np.ndarray | None
    threads: int

    def column_parallel(self, x: Activations) -> np.ndarray:
        """This rank's output rows: float32 [tokens, local rows]."""
        out = np.empty((len(x.x), len(self.values) * LANES), np.float32)
        if self.scales is None:
            matmul.column_floats(self.values, x.x, out, self.threads)
        else:
            matmul.column_blocks(self.values, self.scales, *x.blocks, out, self.threads)
        return out

    def row_parallel(self, x: Activations) -> np.ndarray:
        """This rank's part of every output row, ready to be summed over ranks: float64 [tokens, rows] on the grid."""
        out = np.empty((len(x.x), self.values.shape[1] * LANES), np.float64)
        if self.scales is None:
            matmul.row_floats(self.values, x.x, out, self.threads)
        else:
            matmul.row_blocks(self.values, self.scales, *x.blocks, out, self.threads)
        return out

    def embed(self, rows: np.ndarray, width: int) -> np.ndarray:
        """Rows of the matrix as float64 [tokens, width], zeros where `rows` (int64, local) is negative."""
        out = np.empty((len(rows), width), np.float64)
        if self.scales is None:
            embedding.embed_floats(self.values, rows, out)
        else:
            embedding.embed_blocks(self.values, self.scales, rows, out)
        return out
