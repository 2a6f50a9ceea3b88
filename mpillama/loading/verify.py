"""Checking the bytes of a model, all ranks together: against checksums where a format has them, else for numbers."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from math import prod

import numpy as np

from mpillama.comm.communicator import Communicator
from mpillama.formats.checkpoint import Checkpoint
from mpillama.formats.checkpoint_model import CheckpointModel
from mpillama.formats.native.reader import NativeModel, NativeReader, unit_checksums
from mpillama.formats.reading import SourceFile
from mpillama.formats.stored_arrays import DTYPES, StoredArray
from mpillama.loading.model_file import ModelFile
from mpillama.models.partition import split_units
from mpillama.quant.coded import as_float32
from mpillama.quant.registry import STORED_TYPES

RUN_BYTES = 64 << 20
RUN_VALUES = 4 << 20
"""About as many values are turned into float32 at a time."""


@dataclass(frozen=True)
class Difference:
    """Bytes of a tensor that are not what was written, or no finite numbers."""

    tensor: str
    file: str
    first_byte: int
    last_byte: int


@dataclass(frozen=True)
class Check:
    """What was looked at, in how many bytes, and what was wrong there, in the order of the files.

    That the files have their sizes and the table fits them and the configuration is known once a model is open.
    """

    checked: tuple[str, ...]
    bytes: int
    differences: list[Difference]


def checked_bytes(model: ModelFile) -> int:
    """The bytes that a check reads, on all ranks together."""
    if isinstance(model, NativeModel):
        return sum(entry.bytes for entry in model.entries.values())
    return sum(part.bytes for part in _parts(_checkpoint(model)))


def verify_file(model: ModelFile, comm: Communicator, on_bytes: Callable[[int], None]) -> Check:
    """Check every tensor, a share of each on each rank."""
    native = isinstance(model, NativeModel)
    look = _different if isinstance(model, NativeModel) else _not_finite
    parts = comm.gather(comm.together(lambda: list(look(model, comm, comm.counting(on_bytes)))))
    found = sorted((d for part in parts for d in part), key=lambda d: (d.file, d.first_byte))
    return Check(("sizes", "table", "checksums" if native else "finite values"), checked_bytes(model), found)


def _checkpoint(model: ModelFile) -> Checkpoint:
    assert isinstance(model, CheckpointModel)
    return model.checkpoint


# -- checksums --------------------------------------------------------------------------------------------------------


def _different(model: ModelFile, comm: Communicator, on_bytes: Callable[[int], None]) -> Iterator[Difference]:
    assert isinstance(model, NativeModel)
    with closing(NativeReader(model, on_bytes)) as reader:
        for name in model.entries:
            yield from _differences(model, reader, name, comm)


def _differences(model: NativeModel, reader: NativeReader, name: str, comm: Communicator) -> Iterator[Difference]:
    entry = model.entries[name]
    count = len(entry.checksums)
    unit_bytes = entry.bytes // count
    units, step = split_units(count, comm.size)[comm.rank], max(1, RUN_BYTES // unit_bytes)
    for start in range(units.start, units.stop, step):
        stop = min(start + step, units.stop)
        buffer = np.empty((stop - start) * unit_bytes, np.uint8)
        reader.fill(buffer.data, entry.offset + start * unit_bytes, name)
        for i in np.flatnonzero(unit_checksums(buffer, stop - start) != entry.checksums[start:stop]):
            first = entry.offset + (start + int(i)) * unit_bytes
            yield Difference(name, model.path, first, first + unit_bytes - 1)


# -- finite values ----------------------------------------------------------------------------------------------------


def _not_finite(model: ModelFile, comm: Communicator, on_bytes: Callable[[int], None]) -> Iterator[Difference]:
    checkpoint = _checkpoint(model)
    with ExitStack() as stack:
        pairs = zip(checkpoint.files, checkpoint.file_sizes, strict=True)
        files = [stack.enter_context(closing(SourceFile(path, size))) for path, size in pairs]
        for part in _parts(checkpoint):
            yield from _rows_not_finite(part, files[part.file], comm, on_bytes)
        for file in files:
            file.check_unchanged()


def _parts(checkpoint: Checkpoint) -> list[StoredArray]:
    """The arrays of all tensors, each once: those of gate and up may lie in the same."""
    parts = (part for tensor in checkpoint.tensors.values() for part in tensor.parts)
    return list({(part.file, part.offset): part for part in parts}.values())


def _rows_not_finite(
    part: StoredArray, file: SourceFile, comm: Communicator, on_bytes: Callable[[int], None]
) -> Iterator[Difference]:
    """The rows of this rank's share that hold NaN or an infinity."""
    columns = part.shape[-1] if part.shape else 1
    size = part.bytes // max(1, prod(part.shape[:-1]))
    rows = split_units(part.bytes // size, comm.size)[comm.rank]
    step = max(1, RUN_VALUES // columns)
    for start in range(rows.start, rows.stop, step):
        raw = np.empty((min(step, rows.stop - start), size), np.uint8)
        place = part.offset + start * size
        file.read(raw.reshape(-1).data, place, part.name)
        file.drop(place, raw.nbytes)
        on_bytes(raw.nbytes)
        with np.errstate(all="ignore"):  # damage is what is looked for
            finite = np.isfinite(_values(part, raw)).all(axis=1)
        for i in np.flatnonzero(~finite):
            first = place + int(i) * size
            yield Difference(part.name, file.path, first, first + size - 1)


def _values(part: StoredArray, raw: np.ndarray) -> np.ndarray:
    """What can be no number of a part's rows: weights, and the scales of those that are spread over several arrays."""
    if part.dtype in STORED_TYPES:
        return STORED_TYPES[part.dtype].decode(raw)
    numbers = raw.view(DTYPES[part.dtype])
    if part.dtype == "U8" and not part.name.endswith(("scale", "scales")):
        return numbers
    return as_float32(numbers, part.dtype)
