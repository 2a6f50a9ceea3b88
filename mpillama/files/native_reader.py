"""Reading a rank's slices of a native file straight into place."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np

from mpillama.errors import UserError
from mpillama.files.native import NativeModel, TableEntry, unit_checksums
from mpillama.files.reading import MAX_READ, SourceFile, cut_extent
from mpillama.model.tensors import TensorSpec


class NativeReader:
    """Reads extents of an open model file, several at a time if asked; counts the bytes; needs no HDF5."""

    at_once = 4
    """Tensors worth reading at the same time: it hides the latency of the file system and of fresh memory."""
    pieces_at_once = 4
    """Pieces of large tensors read at the same time, of all tensors together."""

    def __init__(
        self, model: NativeModel, on_bytes: Callable[[int], None], limit: int = MAX_READ, verify: bool = False
    ):
        self.model = model
        self.on_bytes = on_bytes
        self.verify = verify
        self.bytes_read = 0
        self.counting = Lock()
        self.file = SourceFile(model.path, model.file_size, limit)
        self.pool = ThreadPoolExecutor(self.pieces_at_once)

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
        pieces = list(cut_extent(offset, len(buffer)))

        def read(piece: tuple[int, int]) -> None:
            start, count = piece
            self._fill_piece(buffer[start - offset : start - offset + count], start, name)

        if len(pieces) == 1:
            read(pieces[0])
            return
        for _ in self.pool.map(read, pieces):
            pass  # the first failure is raised here, and what was not begun is left out

    def _fill_piece(self, buffer: memoryview, offset: int, name: str) -> None:
        self.file.read(buffer, offset, name)
        self.file.drop(offset, len(buffer))
        with self.counting:
            self.bytes_read += len(buffer)
            self.on_bytes(len(buffer))

    def check_unchanged(self) -> None:
        """UserError if the file was written to since it was opened."""
        self.file.check_unchanged()

    def stop(self) -> None:
        """Make reads that are under way end soon."""
        self.file.stop()

    def close(self) -> None:
        """Give the file back."""
        self.pool.shutdown(cancel_futures=True)
        self.file.close()
