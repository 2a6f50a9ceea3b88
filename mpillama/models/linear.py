"""Weight matrices in row lanes, and a layer's tensors by name."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from mpillama.kernels import arguments
from mpillama.quant.weight_type import LANES, WeightType


@dataclass(frozen=True)
class Matrix:
    """This rank's slice of a weight matrix: the arrays that its type has in row lanes.

    Column-parallel: values [groups, …]; row-parallel: [panels, groups, …]. What the type does not have is None.
    """

    weight_type: WeightType
    values: np.ndarray
    scales: np.ndarray | None = None
    supers: np.ndarray | None = None

    @classmethod
    def of(cls, weight_type: WeightType, arrays: Sequence[np.ndarray]) -> "Matrix":
        """From the arrays of a type, in its order."""
        return cls(weight_type, **{a.part: array for a, array in zip(weight_type.lanes, arrays, strict=True)})

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Those that there are, in the order of the type."""
        return tuple(getattr(self, a.part) for a in self.weight_type.lanes)

    @property
    def columns(self) -> int:
        """Columns, of a panel if it is row-parallel."""
        return int(self.values.shape[-2]) * self.weight_type.lanes[0].unit

    def column_parallel(self) -> arguments.Matrix:
        """For kernels: rows are this rank's; [groups, …], with experts [experts, groups, …]."""
        *experts, groups = self.values.shape[:-2]
        return self._argument(prod(experts), 1, groups)

    def row_parallel(self) -> arguments.Matrix:
        """For kernels: columns are this rank's; [panels, groups, …], with experts [experts, panels, groups, …]."""
        *experts, panels, groups = self.values.shape[:-2]
        return self._argument(prod(experts), panels, groups)

    def _argument(self, experts: int, panels: int, groups: int) -> arguments.Matrix:
        addresses = (arguments.address(array) for array in (self.values, self.scales, self.supers))
        of_supers = self.weight_type.super_columns(self.columns)
        return arguments.Matrix(*addresses, self.weight_type.number, experts, panels, groups, self.columns, of_supers)

    @property
    def rows(self) -> int:
        """Rows of a column-parallel slice."""
        return len(self.values) * LANES

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


def any_quantised(*matrices: Matrix) -> bool:
    """Whether their activations must be quantised."""
    return any(m.weight_type.quantised for m in matrices)


class LayerWeights:
    """This rank's tensors of one decoder layer, by their names within it.

    `expert_matrices` hold a matrix for each expert, of which a token leaves the share `idle` unread.
    """

    def __init__(
        self, tensors: Mapping[str, Matrix | np.ndarray], expert_matrices: Collection[str] = (), idle: float = 0.0
    ):
        self._tensors = tensors
        self._expert_matrices = expert_matrices
        self._idle = idle

    def matrix(self, name: str) -> Matrix:
        found = self._tensors[name]
        assert isinstance(found, Matrix), name
        return found

    def vector(self, name: str) -> np.ndarray | None:
        """A vector; None if the model has none of this name."""
        found = self._tensors.get(name)
        assert not isinstance(found, Matrix), name
        return found

    def address(self, name: str) -> int | None:
        """Where a vector's values lie, for kernels."""
        return arguments.address(self.vector(name))

    def bytes_read(self, names: Iterable[str], tokens: int) -> float:
        """Bytes of the named matrices that a step of so many tokens reads.

        Of experts it is an expectation: as if each token chose its own evenly.
        """
        used = 1 - self._idle**tokens
        return sum(self.matrix(n).bytes * (used if n in self._expert_matrices else 1) for n in names)

    def bytes_unread(self, tokens: int) -> float:
        """Bytes of experts that no token of a step chooses, as bytes_read expects it."""
        return sum(self.matrix(name).bytes for name in self._expert_matrices) * self._idle**tokens
