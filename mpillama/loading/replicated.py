"""Tensors that every rank holds whole (norms, some biases, routers): rank 0 reads them, the others get them from it."""

import logging
from collections.abc import Sequence

import numpy as np

from mpillama.comm.communicator import Communicator
from mpillama.models.tensors import TensorSpec
from mpillama.models.weights import Read


class ReplicatedTensors:
    """Stands before a reader: `read` leaves out on other ranks what `share` then gives to them."""

    def __init__(self, comm: Communicator, read_slice: Read):
        self.comm = comm
        self.read_slice = read_slice
        self.whole: dict[str, Sequence[np.ndarray]] = {}

    def read(self, spec: TensorSpec, units: range, arrays: Sequence[np.ndarray]) -> None:
        """Fill the arrays of a tensor with the given units, unless rank 0 does."""
        if spec.split is None:
            self.whole[spec.name] = arrays
            if not self.comm.is_root:
                return
        self.read_slice(spec, units, arrays)
        logging.getLogger(__name__).debug("%s: units %d to %d are read.", spec.name, units.start, units.stop)

    def share(self) -> int:
        """Broadcast what rank 0 has read; call it on all ranks once all have read. Returns the bytes."""
        arrays = [array for name in sorted(self.whole) for array in self.whole[name]]
        self.comm.broadcast_arrays(arrays)
        return sum(array.nbytes for array in arrays)


def is_read(spec: TensorSpec, comm: Communicator) -> bool:
    """Whether this rank reads its units of a tensor from the file."""
    return comm.is_root or spec.split is not None
