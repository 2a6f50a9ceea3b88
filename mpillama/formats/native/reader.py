"""A native model: where its arrays lie in the file, and reading a rank's slices of them straight into place."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import xxhash

from mpillama.errors import UserError
from mpillama.formats.reading import MAX_READ, SourceFile, cut_extent
from mpillama.models.config import ModelConfig
from mpillama.models.tensors import ArraySpec, TensorSpec, WeightTypes
from mpillama.quant.weight_type import WeightType


@dataclass(frozen=True)
class TableEntry:
    """One stored array: where it lies (64-bit byte offset) and the checksums of its units."""

    spec: ArraySpec
    offset: int
    checksums: np.ndarray

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry of the axis that is split."""
        return int(np.dtype(self.spec.dtype).itemsize) * math.prod(self.spec.shape[2 if self.spec.experts else 1 :])

    @property
    def bytes(self) -> int:
        """Bytes of the whole array."""
        return int(np.dtype(self.spec.dtype).itemsize) * math.prod(self.spec.shape)

    @property
    def parts(self) -> int:
        """The number of extents of a range of units: one, or one for each expert."""
        return max(1, self.spec.experts)

    def extent(self, units: range, part: int = 0) -> tuple[int, int]:
        """File offset and byte count of a range of units, of one expert."""
        unit_bytes = self.spec.entries * self.entry_bytes
        start = self.offset + part * (self.bytes // self.parts)
        return start + units.start * unit_bytes, len(units) * unit_bytes


@dataclass(frozen=True)
class NativeModel:
    """What rank 0 reads of a model file and gives to the others: everything but the weights."""

    path: str
    file_size: int
    format_version: int
    config_json: Mapping[str, Any]
    weight_types: WeightTypes
    entries: Mapping[str, TableEntry]
    texts: Mapping[str, bytes] = field(repr=False)
    metadata_sha256: str = ""

    @property
    def files(self) -> Mapping[str, int]:
        """The file and its size, as rank 0 sees it."""
        return {self.path: self.file_size}

    def stored_bytes(self, spec: TensorSpec, units: range) -> int:
        """The bytes of the file that these units of a tensor take."""
        entries = [self.entries[array.name] for array in spec.arrays()]
        return sum(entry.extent(units)[1] * entry.parts for entry in entries)

    def requantised(self) -> Mapping[str, tuple[WeightType, int]]:
        """Nothing: what the file holds is what kernels take."""
        return {}

    def reader(self, on_bytes: Callable[[int], None], workers: int = 1, verify: bool = False) -> "NativeReader":
        """Open the file for reading slices; one worker is enough, since nothing is computed."""
        return NativeReader(self, on_bytes, verify=verify)

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return ModelConfig.from_hf(self.config_json)

    @property
    def specs(self) -> list[TensorSpec]:
        """The model's tensors in the order of the file."""
        return self.config.tensors(self.weight_types)


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


def unit_checksums(values: np.ndarray, units: int) -> np.ndarray:
    """XXH3-64 of each of `units` equal parts of a contiguous array."""
    parts = values.reshape(units, -1).view(np.uint8)
    return np.array([xxhash.xxh3_64_intdigest(p.data) for p in parts], np.uint64)
