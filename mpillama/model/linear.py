"""Weight matrices in row lanes."""

from dataclasses import dataclass

import numpy as np

from mpillama.kernels import embedding
from mpillama.layout.weight_types import LANES, WeightType


@dataclass(frozen=True)
class Matrix:
    """This rank's slice of a weight matrix, in the dtypes that kernels know the types by.

    Column-parallel: values [groups, …]; row-parallel: [panels, groups, …]; `scales` (uint16, float16's bits) is None
    for float types.
    """

    weight_type: WeightType
    values: np.ndarray
    scales: np.ndarray | None

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        """In the order of the kernels' arguments."""
        return self.values, self.scales

    @property
    def rows(self) -> int:
        """Rows of a column-parallel slice."""
        return len(self.values) * LANES

    @property
    def bytes(self) -> int:
        """Bytes of the slice."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def embed(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Write rows of the matrix to `out` float64 [tokens, width], zeros where `rows` (int64, local) is negative."""
        if self.scales is None:
            embedding.embed_floats(self.values, rows, out)
        else:
            embedding.embed_blocks(self.values, self.scales, rows, out)


def any_quantised(*matrices: Matrix) -> bool:
    """Whether their activations must be quantised."""
    return any(m.scales is not None for m in matrices)
