"""Weight matrices in row lanes."""

from dataclasses import dataclass
from math import prod

import numpy as np

from mpillama.kernels import arguments
from mpillama.quant.weight_type import LANES, WeightType


@dataclass(frozen=True)
class Matrix:
    """This rank's slice of a weight matrix: the arrays that its type has in row lanes.

    Column-parallel: values [groups, …]; row-parallel: [panels, groups, …]; `scales` is None for types of one array.
    """

    weight_type: WeightType
    values: np.ndarray
    scales: np.ndarray | None = None

    @property
    def columns(self) -> int:
        """Columns, of a panel if it is row-parallel."""
        return int(self.values.shape[-2]) * self.weight_type.unit

    def column_parallel(self) -> arguments.Matrix:
        """For kernels: rows are this rank's; [groups, …], with experts [experts, groups, …]."""
        *experts, groups = self.values.shape[:-2]
        return self._argument(prod(experts), 1, groups)

    def row_parallel(self) -> arguments.Matrix:
        """For kernels: columns are this rank's; [panels, groups, …], with experts [experts, panels, groups, …]."""
        *experts, panels, groups = self.values.shape[:-2]
        return self._argument(prod(experts), panels, groups)

    def _argument(self, experts: int, panels: int, groups: int) -> arguments.Matrix:
        values, scales = arguments.address(self.values), arguments.address(self.scales)
        return arguments.Matrix(values, scales, self.weight_type.number, experts, panels, groups, self.columns)

    @property
    def rows(self) -> int:
        """Rows of a column-parallel slice."""
        return len(self.values) * LANES

    @property
    def bytes(self) -> int:
        """Bytes of the slice."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)


def any_quantised(*matrices: Matrix) -> bool:
    """Whether their activations must be quantised."""
    return any(m.weight_type.quantised for m in matrices)
