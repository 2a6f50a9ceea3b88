"""Converting a model into a native file, all ranks together: rank 0 lays it out, every rank writes its part."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mpillama.comm.communicator import Communicator
from mpillama.errors import UserError
from mpillama.formats.checkpoint_model import CheckpointModel
from mpillama.formats.importance import read_importance
from mpillama.formats.native.reader import TableEntry, unit_checksums
from mpillama.formats.native.table import TEXTS, read_table
from mpillama.formats.native.writer import create_file, seal_file
from mpillama.formats.reading import write_exactly
from mpillama.loading.model_file import ModelFile, SliceReader
from mpillama.models.partition import split_units
from mpillama.models.tensors import TensorSpec
from mpillama.quant.registry import WEIGHT_TYPES
from mpillama.quant.weight_type import round_up

RUN_BYTES = 64 << 20
"""About as much of a tensor is read, laned and written at a time."""

Checksums = dict[str, np.ndarray]


@dataclass(frozen=True)
class Target:
    """The file being written: under a temporary name until it is whole."""

    path: str
    temporary: str
    entries: Mapping[str, TableEntry]


def target_bytes(model: ModelFile) -> int:
    """Bytes of all arrays of the native file."""
    return sum(TableEntry(array, 0, np.empty(0)).bytes for spec in model.specs for array in spec.arrays())


def convert_model(
    model: ModelFile, path: str, force: bool, comm: Communicator, on_bytes: Callable[[int], None], workers: int
) -> float:
    """Write `model` to a native file; returns the seconds it took. A UserError leaves no file that looks whole."""
    start = time.perf_counter()
    target = comm.on_root(lambda: _lay_out(model, path, force))
    try:
        checksums = comm.together(
            lambda: _write_part(model, target, comm, comm.counting(on_bytes), workers), "the end of writing"
        )
        parts = comm.gather(checksums)
        comm.on_root(lambda: _seal(model, target, parts))
    finally:
        if comm.is_root:
            Path(target.temporary).unlink(missing_ok=True)
    return time.perf_counter() - start


def with_importance(model: ModelFile, path: str) -> CheckpointModel:
    """The model, quantised by an importance matrix of llama.cpp; UserError if that would change nothing."""
    if not isinstance(model, CheckpointModel):
        raise UserError(f"{model.path}: --importance is for quantising: give the original checkpoint as the source.")
    weighed = [spec for spec in model.specs if not spec.vector and spec.weight_type.weighs]
    if not weighed:
        able = ", ".join(kind.name for kind in WEIGHT_TYPES.values() if kind.weighs)
        raise UserError(f"--importance {path}: weights of these types do not use it: give --weights, one of {able}.")
    columns = {name: spec.source_shape[1] for spec in weighed for name in spec.source_names}
    experts = max(spec.experts for spec in weighed)
    found = read_importance(path, model.config.model_type, experts, columns)
    without = [name for name in columns if name not in found]
    if without:
        logging.getLogger(__name__).warning(
            "%s has no importance for %s of %s matrices (%s%s): they are quantised without.", path, len(without),
            len(columns), without[0], ", …" if without[1:] else "", extra={"of_run": True},
        )  # fmt: skip
    return replace(model, importance=found)


# -- rank 0 ---------------------------------------------------------------------------------------------------------


def refuse_target(path: str, force: bool) -> None:
    """UserError if the file cannot be written or would replace another."""
    target = Path(path)
    if target.is_dir():
        raise UserError(f"{path}: is a folder: name the .h5 file to write.")
    if target.exists() and not force:
        raise UserError(f"{path}: exists already: name another file, or replace it with --force.")
    folder = target.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{path}: there is no folder {folder}: make it, or name another file.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{path}: no permission to write in {folder}: name another file.")


def _lay_out(model: ModelFile, path: str, force: bool) -> Target:
    refuse_target(path, force)
    need, free = target_bytes(model), shutil.disk_usage(Path(path).absolute().parent).free
    if free < need:
        raise UserError(
            f"{path}: needs {need / 1e9:.1f} GB, but the file system has {free / 1e9:.1f} GB free: "
            "free some, or name a file elsewhere."
        )
    temporary = f"{path}.converting-{os.getpid()}"
    try:
        with _system_errors(path):
            entries = create_file(temporary, model.config_json, model.weight_types, model.specs, _texts(model))
    except UserError:
        Path(temporary).unlink(missing_ok=True)
        raise
    return Target(path, temporary, entries)


def _texts(model: ModelFile) -> dict[str, bytes]:
    return {name: model.texts[name] for name in TEXTS if name in model.texts}


def _seal(model: ModelFile, target: Target, parts: list[Checksums]) -> None:
    """Put the ranks' checksums together, say that the file is whole, and give it its name."""
    with _system_errors(target.path):
        whole = {name: np.bitwise_or.reduce([part[name] for part in parts]) for name in target.entries}
        seal_file(target.temporary, model.config_json, model.weight_types, target.entries, _texts(model), whole)
        _refuse_unreadable(model, target)
        Path(target.temporary).replace(target.path)


def _refuse_unreadable(model: ModelFile, target: Target) -> None:
    """Open the file as those will who run it: what would be refused then is refused now, before it has its name."""
    try:
        read_table(target.temporary)
    except UserError as error:
        reason = str(error).removeprefix(f"{target.temporary}: ")
        raise UserError(f"{model.path}: cannot be converted, the new file would not be read: {reason}") from error


@contextmanager
def _system_errors(path: str) -> Iterator[None]:
    """Turn what the system refuses into a sentence."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0].lower()  # HDF5 tells the rest of its life
        raise UserError(f"{path}: cannot be written ({reason}): the unfinished file was removed.") from error


# -- every rank -----------------------------------------------------------------------------------------------------


def _write_part(
    model: ModelFile, target: Target, comm: Communicator, on_bytes: Callable[[int], None], workers: int
) -> Checksums:
    """Write this rank's units of every tensor; returns their checksums, 0 for those of other ranks."""
    checksums = {name: np.zeros(len(entry.checksums), np.uint64) for name, entry in target.entries.items()}
    reader = model.reader(lambda count: None, workers)
    try:
        with _system_errors(target.path):
            fd = os.open(target.temporary, os.O_WRONLY)
            try:
                for spec in model.specs:
                    for units in _runs(spec, split_units(spec.units, comm.size)[comm.rank]):
                        _write_units(reader, spec, units, fd, target, checksums, on_bytes)
                os.fsync(fd)
            finally:
                os.close(fd)
    finally:
        reader.close()
    return checksums


def _runs(spec: TensorSpec, units: range) -> Iterator[range]:
    """Cut a range of units into runs of a bounded size."""
    unit_bytes = sum(TableEntry(a, 0, np.empty(0)).extent(range(1))[1] for a in spec.arrays()) * max(1, spec.experts)
    step = max(1, RUN_BYTES // unit_bytes)
    borders = range(units.start, round_up(len(units), step) + units.start, step)
    return (range(start, min(start + step, units.stop)) for start in borders)


def _write_units(
    reader: SliceReader, spec: TensorSpec, units: range, fd: int, target: Target, checksums: Checksums,
    on_bytes: Callable[[int], None],
) -> None:  # fmt: skip
    arrays = [np.empty(array.slice_shape(len(units)), array.dtype) for array in spec.arrays()]
    reader.read(spec, units, arrays)
    for array, values in zip(spec.arrays(), arrays, strict=True):
        entry = target.entries[array.name]
        for part, piece in enumerate(values.reshape(entry.parts, -1)):
            write_exactly(fd, piece.view(np.uint8).data, entry.extent(units, part)[0])
            place = part * spec.units + units.start
            checksums[array.name][place : place + len(units)] = unit_checksums(piece, len(units))
        on_bytes(values.nbytes)
