"""Reading a rank's slices of a native file straight into place."""

import os
from collections.abc import Callable, Sequence
from threading import Lock

import numpy as np

from mpillama.errors import UserError
from mpillama.files.native import NativeModel, TableEntry, open_for_reading, unit_checksums
from mpillama.files.reading import MAX_READ, read_exactly
from mpillama.model.tensors import TensorSpec


class NativeReader:
    """Reads extents of an open model file, several at a time if asked; counts the bytes; needs no HDF5."""

    at_once = 4
    """Tensors worth reading at the same time: it hides the latency of the file system and of fresh memory."""

    def __init__(
        self, model: NativeModel, on_bytes: Callable[[int], None], limit: int = MAX_READ, verify: bool = False
    ):
        self.model = model
        self.on_bytes = on_bytes
        self.limit = limit
        self.verify = verify
        self.bytes_read = 0
        self.counting = Lock()
        self.fd = _open(model)

    def read(self, spec: TensorSpec, units: range, arrays: Sequence[np.ndarray]) -> None:
        """Fill the arrays of a tensor with the given units; UserError names the file if it cannot be read."""
        for array_spec, array in zip(spec.arrays(), arrays, strict=True):
            entry, flat = self.model.entries[array_spec.name], array.reshape(-1).view(np.uint8).data
            assert entry.extent(units)[1] * entry.parts == array.nbytes
            for part in range(entry.parts):
                offset, count = entry.extent(units, part)
                self.fill(flat[part * count : (part + 1) * count], offset, array_spec.name)
            if self.verify:
                self._check(entry, units, array)

    def _check(self, entry: TableEntry, units: range, array: np.ndarray) -> None:
        """UserError if the units just read are not what was written."""
        for part, values in enumerate(array.reshape(entry.parts, -1) if len(units) else ()):
            place = part * (len(entry.checksums) // entry.parts) + units.start
            wanted = entry.checksums[place : place + len(units)]
            for i in np.flatnonzero(unit_checksums(values, len(units)) != wanted):
                offset, count = entry.extent(range(units.start + int(i), units.start + int(i) + 1), part)
                raise UserError(
                    f"{self.model.path}: tensor {entry.spec.name} is damaged at bytes {offset} to "
                    f"{offset + count - 1}: copy or convert the file again."
                )

    def fill(self, buffer: memoryview, offset: int, name: str) -> None:
        """Fill a buffer from a place in the file; UserError if it cannot be read."""
        try:
            read_exactly(self.fd, buffer, offset, self.limit)
            os.posix_fadvise(self.fd, offset, len(buffer), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise UserError(
                f"{self.model.path}: tensor {name} cannot be read at byte {offset}: {error.strerror or error}; "
                "is the file still being written, or was it changed?"
            ) from error
        with self.counting:
            self.bytes_read += len(buffer)
            self.on_bytes(len(buffer))

    def close(self) -> None:
        """Give the file back."""
        os.close(self.fd)


def _open(model: NativeModel) -> int:
    try:
        fd = open_for_reading(model.path)
    except OSError as error:
        raise UserError(
            f"{model.path}: {(error.strerror or str(error)).lower()} on this rank's host: "
            "the model file must lie on a file system that all hosts share."
        ) from error
    size = os.fstat(fd).st_size
    if size != model.file_size:
        os.close(fd)
        raise UserError(f"{model.path}: has {size} bytes on this rank's host, but rank 0 sees {model.file_size}.")
    return fd
