"""Reading a rank's slices of a foreign checkpoint: the bytes of the slice, and laned while they are read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from mpillama.errors import UserError
from mpillama.formats.checkpoint import Checkpoint, StoredRows, StoredTensor
from mpillama.formats.reading import MAX_READ, SourceFile
from mpillama.models.tensors import TensorSpec
from mpillama.quant.coded import Coded, KeepsCodes
from mpillama.quant.weight_type import LANES, Arrays, Float32

PIECE = 1 << 19
"""Values that a worker turns into lanes at a time: what it needs besides is a few times this in float64."""
RUN = 8
"""Pieces that are read at a time, if the tensor is large enough to keep all workers busy so."""
MOST_WORKERS = 8
WIDE_RUN_BYTES = 16 << 20
"""About as much is read together of tensors whose file has columns one after the other, by all workers."""

Rows = StoredRows | Coded
Piece = Callable[[], int]
"""Reads and places some rows; returns the bytes it read."""


@dataclass(frozen=True)
class Slice:
    """What a rank wants of one matrix: stored rows and columns, and how many of them make a head (or all there is)."""

    spec: TensorSpec
    tensor: StoredTensor
    units: range
    arrays: Sequence[np.ndarray]

    @property
    def takes_blocks(self) -> bool:
        """Whether the stored numbers go over as they are."""
        return self.tensor.keeps(self.spec.weight_type, self.spec.column_chunk)

    @property
    def columns(self) -> range:
        """The stored columns of a row-parallel slice; all of them for a column-parallel one."""
        width = self.tensor.shape[1]
        if self.spec.panel is None:
            return range(width)
        unit = width // self.spec.column_chunks if self.spec.column_chunks > 1 else self.spec.panel
        return range(min(self.units.start * unit, width), min(self.units.stop * unit, width))

    @property
    def width(self) -> int:
        """The padded columns."""
        return len(self.units) * self.spec.panel if self.spec.panel else self.spec.columns

    @property
    def column_chunks(self) -> int:
        """The parts of the columns that are padded one by one."""
        return len(self.units) if self.spec.panel and self.spec.column_chunks > 1 else 1


class Tally:
    """A reader's files, and how many bytes were read of them; see Source."""

    def __init__(self, files: Sequence[SourceFile]):
        self.files = files
        self.bytes = 0

    def path(self, file: int) -> str:
        return self.files[file].path

    def fill(self, file: int, buffer: memoryview, offset: int, name: str) -> None:
        self.files[file].read(buffer, offset, name)
        self.bytes += len(buffer)

    def forget(self, file: int, offset: int, count: int) -> None:
        self.files[file].drop(offset, count)


class CheckpointReader:
    """Fills slices from a checkpoint's files; counts the bytes it reads."""

    at_once = 1
    """Tensors read at the same time: each keeps all workers busy already."""

    def __init__(
        self, checkpoint: Checkpoint, on_bytes: Callable[[int], None], workers: int = 1, limit: int = MAX_READ,
        importance: Mapping[str, Float32] | None = None,
    ):  # fmt: skip
        self.checkpoint = checkpoint
        self.importance = importance or {}
        self.on_bytes = on_bytes
        self.bytes_read = 0
        self.count = min(workers, MOST_WORKERS)
        self.workers = ThreadPoolExecutor(self.count)
        self.files: list[SourceFile] = []
        try:
            for path, size in zip(checkpoint.files, checkpoint.file_sizes, strict=True):
                self.files.append(SourceFile(path, size, limit))
        except UserError:
            self.close()
            raise

    def check_unchanged(self) -> None:
        """UserError if a file was written to since it was opened."""
        for file in self.files:
            file.check_unchanged()

    def stop(self) -> None:
        """Make reads that are under way end soon."""
        for file in self.files:
            file.stop()

    def close(self) -> None:
        """Give the files back; what is left of them in the system's cache may go."""
        self.workers.shutdown(cancel_futures=True)
        for file in self.files:
            file.drop_all()
            file.close()
        self.files = []

    def read(self, spec: TensorSpec, units: range, arrays: Sequence[np.ndarray]) -> None:
        """Fill the arrays of a tensor with the given units; UserError names the file if it cannot be read."""
        tensors = [self.checkpoint.tensors[name] for name in spec.source_names]
        if spec.vector:
            outs = arrays[0] if spec.experts else arrays
            pieces = (partial(self._read_vector, spec, t, units, out) for t, out in zip(tensors, outs, strict=True))
            self._finish(pieces)
            return
        parts = [[a[e] for a in arrays] for e in range(spec.experts)] if spec.experts else [arrays]
        slices = [Slice(spec, tensor, units, part) for tensor, part in zip(tensors, parts, strict=True)]
        self._finish(piece for wanted in slices if len(units) for piece in self._pieces(wanted))

    def _finish(self, pieces: Iterator[Piece]) -> None:
        """Let the workers do all pieces, a bounded number of them at a time."""
        running: set[Future[int]] = set()
        for piece in pieces:
            running.add(self.workers.submit(piece))
            if len(running) >= 2 * MOST_WORKERS:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                self._count(done)
        self._count(wait(running).done)

    def _count(self, done: set[Future[int]]) -> None:
        for future in done:
            self.bytes_read += future.result()
            self.on_bytes(future.result())

    # -- vectors --------------------------------------------------------------------------------------------------

    def _read_vector(self, spec: TensorSpec, tensor: StoredTensor, units: range, out: np.ndarray) -> int:
        tally = Tally(self.files)
        values = tensor.meant(tensor.read(tally, range(1), range(tensor.shape[0])).decode()).reshape(-1, 1)
        whole = spec.pad(_straightened(values, tensor.interleaved).reshape(-1))
        out[:] = whole[units.start * spec.unit : units.stop * spec.unit]
        return tally.bytes

    # -- matrices -------------------------------------------------------------------------------------------------

    def _pieces(self, wanted: Slice) -> Iterator[Piece]:
        """Runs of padded rows: whole heads for column-parallel matrices with heads, else groups of 16."""
        spec = wanted.spec
        step = spec.rows // spec.row_chunks if spec.row_chunks > 1 else LANES
        rows = range(spec.rows)
        if spec.panel is None:
            rows = range(wanted.units.start * spec.unit, wanted.units.stop * spec.unit)
        step *= max(1, PIECE // (step * max(1, len(wanted.columns))))
        run = step * max(1, min(RUN, len(rows) // (4 * self.count * step)))
        if wanted.tensor.is_wide:
            row_bytes = -(-wanted.tensor.bytes // wanted.tensor.shape[0])
            run = step * max(1, min(-(-len(rows) // step), WIDE_RUN_BYTES // (self.count * row_bytes * step)))
        for start in range(rows.start, rows.stop, run):
            yield partial(self._read_run, wanted, range(start, min(start + run, rows.stop)), step, rows.start)

    def _read_run(self, wanted: Slice, rows: range, step: int, first: int) -> int:
        """Read padded rows of a matrix and put them in lanes into their places, `step` rows at a time."""
        spec, tensor = wanted.spec, wanted.tensor
        stored = self._stored_rows(spec, tensor, rows)
        block, columns, tally = tensor.block, wanted.columns, Tally(self.files)
        around = range(columns.start // block * block, -(-columns.stop // block) * block)
        found = tensor.read(tally, stored, around)
        for start in range(rows.start, rows.stop, step):
            part = range(start, min(start + step, rows.stop))
            of_part = self._stored_rows(spec, tensor, part)
            rows_of_part = found.rows(slice(of_part.start - stored.start, of_part.stop - stored.start))
            self._place(wanted, part, rows_of_part, around, first)
        return tally.bytes

    def _place(self, wanted: Slice, rows: range, found: Rows, around: range, first: int) -> None:
        """Put what stands behind padded rows in lanes into their places."""
        packed = (self._pack_blocks if wanted.takes_blocks else self._pack)(wanted, rows, found, around)
        groups = slice((rows.start - first) // LANES, (rows.stop - first) // LANES)
        for array, values in zip(wanted.arrays, packed, strict=True):
            if wanted.spec.panel is None:
                array[groups] = values
            else:
                array[:, groups] = values

    def _stored_rows(self, spec: TensorSpec, tensor: StoredTensor, rows: range) -> range:
        """The checkpoint's rows behind padded rows (whole heads, if there are several)."""
        if spec.row_chunks == 1:
            return range(min(rows.start, tensor.shape[0]), min(rows.stop, tensor.shape[0]))
        padded, true = spec.rows // spec.row_chunks, tensor.shape[0] // spec.row_chunks
        return range(rows.start // padded * true, rows.stop // padded * true)

    def _pack(self, wanted: Slice, rows: range, found: Rows, around: range) -> Arrays:
        spec, columns = wanted.spec, wanted.columns
        values = found.decode() if len(found) and around else np.zeros((len(found), len(around)), np.float32)
        if wanted.tensor.block > 1:
            self._refuse_not_finite(wanted.tensor, values)
        values = _straightened(values, wanted.tensor.interleaved)
        values = values[:, columns.start - around.start : columns.stop - around.start]
        padded = _padded(values, len(rows), self._row_chunks(spec, rows), wanted.width, wanted.column_chunks)
        importance = self.importance.get(wanted.tensor.name)
        if importance is not None:
            of_columns = importance[None, columns.start : columns.stop]
            importance = _padded(of_columns, 1, 1, wanted.width, wanted.column_chunks)[0]
        return spec.weight_type.pack(padded, spec.panel, importance)

    def _pack_blocks(self, wanted: Slice, rows: range, found: Rows, around: range) -> Arrays:
        """As _pack, but the type's own numbers stay as they are."""
        spec, chunks, unit = wanted.spec, self._row_chunks(wanted.spec, rows), wanted.spec.weight_type.unit
        width = wanted.width // unit
        if isinstance(found, Coded):
            assert isinstance(spec.weight_type, KeepsCodes)
            first, last, stored = 0, width, spec.weight_type.take(found.padded(wanted.width, wanted.column_chunks))
        else:
            first, last = ((column - around.start) // unit for column in (wanted.columns.start, wanted.columns.stop))
            stored = found.blocks()
            if spec.weight_type.quantised:
                self._refuse_not_finite(wanted.tensor, *stored)
        blocks = []
        for whole in stored:
            part = whole[:, first:last]
            straight, size = _straightened(part, wanted.tensor.interleaved), prod(part.shape[2:])
            padded = _padded(straight.reshape(len(found), -1), len(rows), chunks, width * size, 1)
            blocks.append(padded.reshape(len(rows), width, *part.shape[2:]))
        return spec.weight_type.pack_blocks(tuple(blocks), spec.panel)

    def _refuse_not_finite(self, tensor: StoredTensor, *numbers: np.ndarray) -> None:
        """UserError if there is what is no number among scales, or values that were scaled."""
        if not all(np.isfinite(each).all() for each in numbers if each.dtype.kind == "f"):
            raise UserError(
                f"{self.files[tensor.file].path}: tensor {tensor.name} holds scales that are NaN or infinite: the file "
                "is damaged, download it again."
            )

    def _row_chunks(self, spec: TensorSpec, rows: range) -> int:
        return len(rows) // (spec.rows // spec.row_chunks) if spec.row_chunks > 1 else 1


def _straightened(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows whose heads stand as rotary pairs, in halves; `head_dim` 0 leaves them as they are."""
    if not head_dim:
        return rows
    rest = rows.shape[1:]
    return rows.reshape(-1, head_dim // 2, 2, *rest).swapaxes(1, 2).reshape(-1, *rest)


def _padded(x: np.ndarray, rows: int, row_chunks: int, columns: int, column_chunks: int) -> np.ndarray:
    """Equal chunks of rows and columns, each padded with zeros to its share of [rows, columns]."""
    if x.shape == (rows, columns):
        return x
    out = np.zeros((row_chunks, rows // row_chunks, column_chunks, columns // column_chunks), x.dtype)
    if x.size:
        chunked = x.reshape(row_chunks, -1, column_chunks, x.shape[1] // column_chunks)
        out[:, : chunked.shape[1], :, : chunked.shape[3]] = chunked
    return out.reshape(rows, columns)
