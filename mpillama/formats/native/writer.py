"""Writing the native model file."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpillama.errors import UserError
from mpillama.formats.native.reader import TableEntry, unit_checksums
from mpillama.formats.native.table import ALIGNMENT, FORMAT, HdfFile, format_version, hdf5, metadata_digest
from mpillama.formats.reading import write_exactly
from mpillama.models.config import ModelConfig
from mpillama.models.tensors import ArraySpec, TensorSpec, WeightTypes
from mpillama.quant.weight_type import Arrays, WeightType


def write_model(
    path: str,
    config_json: Mapping[str, Any],
    weight_type: WeightType,
    tensor: Callable[[str], np.ndarray],
    texts: Mapping[str, bytes],
) -> None:
    """Write a model: `tensor(name)` gives each tensor in Hugging Face's name and shape, in any float dtype.

    The file appears under its name only when it is whole; one tensor is held at a time.
    """
    temporary = f"{path}.writing-{os.getpid()}"
    types = WeightTypes(weight_type)
    specs = ModelConfig.from_hf(config_json).tensors(types)
    try:
        entries = create_file(temporary, config_json, types, specs, texts)
        checksums = _write_tensors(temporary, specs, entries, tensor)
        seal_file(temporary, config_json, types, entries, texts, checksums)
        Path(temporary).rename(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def create_file(
    path: str, config_json: Mapping[str, Any], types: WeightTypes, specs: list[TensorSpec], texts: Mapping[str, bytes]
) -> dict[str, TableEntry]:
    """Lay the file out: every dataset has its place, none is filled. Returns the table, checksums still 0."""
    entries = {}
    with _new_file(path) as file:
        file.attrs["format"], file.attrs["format_version"] = np.bytes_(FORMAT), format_version(types)
        file.attrs["config"] = np.bytes_(json.dumps(config_json))
        file.attrs["weight_types"] = np.bytes_(json.dumps(types_json(types)))
        hdf5().h5g.create(file.id, b"text", gcpl=_timeless(hdf5().h5p.GROUP_CREATE))
        for name, text in sorted(texts.items()):
            file[f"text/{name}"] = np.frombuffer(text, np.uint8)
        total = 0
        for spec in specs:
            for array in spec.arrays():
                offset = _allocate(file, array)
                entries[array.name] = TableEntry(array, offset, np.zeros(spec.checksums, np.uint64))
                total += spec.checksums
        file["checksums"] = np.zeros(total, np.uint64)
    return entries


def _new_file(path: str) -> HdfFile:
    """An empty HDF5 file with aligned datasets and checksummed headers; the same contents give the same bytes."""
    h5py = hdf5()
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_alignment(ALIGNMENT, ALIGNMENT)
    return h5py.File(h5py.h5f.create(path.encode(), h5py.h5f.ACC_TRUNC, _timeless(h5py.h5p.FILE_CREATE), access))


def _timeless(kind: Any) -> Any:
    """Properties of an object that does not remember when it was made."""
    h5py = hdf5()
    properties = h5py.h5p.create(kind)
    properties.set_obj_track_times(False)
    return properties


def _allocate(file: HdfFile, array: ArraySpec) -> int:
    """Give a dataset its bytes at once, unfilled; returns their offset."""
    h5py = hdf5()
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # the same model gives the same bytes
    space = h5py.h5s.create_simple(array.shape)
    dtype = h5py.h5t.py_create(np.dtype(array.dtype))
    dataset = h5py.h5d.create(file.id, array.name.encode(), dtype, space, dcpl=properties)
    return int(dataset.get_offset())


def _write_tensors(
    path: str, specs: list[TensorSpec], entries: Mapping[str, TableEntry], tensor: Callable[[str], np.ndarray]
) -> dict[str, np.ndarray]:
    fd = os.open(path, os.O_WRONLY)
    checksums = {}
    try:
        for spec in specs:
            for array in spec.arrays():
                checksums[array.name] = np.empty(spec.checksums, np.uint64)
            for part, name in enumerate(spec.source_names):
                packed = pack_tensor(spec, tensor(name))
                for array, values in zip(spec.arrays(), packed, strict=True):
                    offset = entries[array.name].extent(range(spec.units), part)[0]
                    write_exactly(fd, values.reshape(-1).view(np.uint8).data, offset)
                    sums = unit_checksums(values, spec.units)
                    checksums[array.name][part * spec.units : (part + 1) * spec.units] = sums
        os.fsync(fd)
    finally:
        os.close(fd)
    return checksums


def pack_tensor(spec: TensorSpec, source: np.ndarray) -> Arrays:
    """Pad a checkpoint's tensor and turn it into what the file stores; UserError if its shape is wrong."""
    if source.shape != spec.source_shape:
        raise UserError(f"tensor {spec.name} has shape {source.shape}, the configuration asks for {spec.source_shape}.")
    padded = spec.pad(source.astype(np.float32))
    if spec.vector:
        return (padded,)
    return spec.weight_type.pack(padded, spec.panel)


def types_json(types: WeightTypes) -> dict[str, Any]:
    """The weight types as they are written."""
    return {"default": types.default.name, "by_name": {k: v.name for k, v in (types.by_name or {}).items()}}


def seal_file(
    path: str,
    config_json: Mapping[str, Any],
    types: WeightTypes,
    entries: Mapping[str, TableEntry],
    texts: Mapping[str, bytes],
    checksums: Mapping[str, np.ndarray],
) -> None:
    """Write the checksums and the digest that says that the file is whole."""
    sealed = {name: TableEntry(e.spec, e.offset, checksums[name]) for name, e in entries.items()}
    with hdf5().File(path, "r+", libver=("v110", "v110")) as file:
        file["checksums"][...] = np.concatenate([e.checksums for e in sealed.values()])
        config = json.loads(json.dumps(config_json))
        digest = metadata_digest(format_version(types), config, types_json(types), sealed, texts)
        file.attrs["metadata_sha256"] = np.bytes_(digest)
