"""The native model file: HDF5 with contiguous, aligned datasets that any rank can read by offset.

Root attributes: `format`, `format_version`, `config` (JSON in Hugging Face's spelling), `weight_types` (JSON),
`metadata_sha256` over everything that is not weights. Datasets: one for each array of each tensor (values, scales, what
several scales have in common), texts under `text/`, and `checksums`: one XXH3-64 for each unit of each array (of each
expert), in the order of the table.

Version 1 has the weight types of mpillama 0.2; version 2 any. A file gets the lowest version that has its types, so
that whoever can read its weights reads it, and others are told to install a newer mpillama.
"""

import hashlib
import json
import stat
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mpillama.errors import UserError
from mpillama.formats.native.reader import NativeModel, TableEntry
from mpillama.models.config import ModelConfig
from mpillama.models.tensors import TensorSpec, WeightTypes
from mpillama.quant.registry import WEIGHT_TYPES, weight_type_named
from mpillama.quant.weight_type import WeightType

FORMAT = "mpillama"
VERSIONS = (1, 2)
TYPES_OF_VERSION_1 = frozenset(("f32", "f16", "bf16", "q8_0", "q4_0"))
ALIGNMENT = 4096
TEXTS = ("tokenizer.json", "chat_template.jinja", "generation_config.json", "tokenizer_config.json")
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
HdfFile = Any
"""h5py.File"""


def hdf5() -> Any:
    """The package h5py, which rank 0 alone imports: thousands of ranks would look for its libraries at once."""
    import h5py

    return h5py


def read_table(path: str) -> NativeModel:
    """Read and check everything but the weights; UserError says what was found and what was expected."""
    size = _check_is_hdf5(path)
    try:
        with hdf5().File(path, "r", locking=False) as file:
            model = _read_open_file(file, path, size)
    except UserError:
        raise
    except (
        OSError,
        RuntimeError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
        MemoryError,
    ) as error:
        # What HDF5 and h5py raise on a damaged file; the sentence keeps what they found.
        raise UserError(
            f"{path}: the file is damaged or truncated ({_one_line(error)}): copy or convert it again."
        ) from error
    return model


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _check_is_hdf5(path: str) -> int:
    """Return the file's size; UserError if it cannot be opened or does not begin as HDF5 does."""
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file: give the path of a model file with --model.")
        with Path(path).open("rb") as file:
            found = file.read(len(HDF5_SIGNATURE))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{path}: {reason}: give the path of a model file with --model.") from error
    if found != HDF5_SIGNATURE:
        raise UserError(
            f"{path}: not a mpillama file: it begins with the bytes {found.hex(' ') or '(none)'}, "
            f"a mpillama file with {HDF5_SIGNATURE.hex(' ')} (HDF5)."
        )
    return status.st_size


def _read_open_file(file: HdfFile, path: str, size: int) -> NativeModel:
    version = _checked_version(file, path)
    config_json, types_json = (json.loads(_text_attribute(file, name)) for name in ("config", "weight_types"))
    types = _weight_types(types_json, path)
    specs = ModelConfig.from_hf(config_json).tensors(types)
    texts = {name: file[f"text/{name}"][()].tobytes() for name in TEXTS if f"text/{name}" in file}
    entries = _read_entries(file, specs, size)
    digest = metadata_digest(version, config_json, types_json, entries, texts)
    if digest != _text_attribute(file, "metadata_sha256"):
        raise UserError(
            f"{path}: the file's header is damaged (its checksum is {digest[:16]}…, "
            f"expected {_text_attribute(file, 'metadata_sha256')[:16]}…): copy or convert it again."
        )
    return NativeModel(str(path), size, version, config_json, types, entries, texts, digest)


def format_version(types: WeightTypes) -> int:
    """The version of a file that holds such weights."""
    names = {types.default.name, *(kind.name for kind in (types.by_name or {}).values())}
    return 1 if names <= TYPES_OF_VERSION_1 else 2


def _checked_version(file: HdfFile, path: str) -> int:
    if _text_attribute(file, "format", "") != FORMAT:
        raise UserError(f"{path}: an HDF5 file, but not a mpillama model: it has no attribute format='{FORMAT}'.")
    version = int(file.attrs.get("format_version", -1))
    if version not in VERSIONS:
        remedy = "install a newer mpillama" if version > VERSIONS[-1] else "convert the model again"
        known = " and ".join(map(str, VERSIONS))
        raise UserError(f"{path}: format version {version}, this mpillama reads versions {known}: {remedy}.")
    if "metadata_sha256" not in file.attrs:
        raise UserError(f"{path}: the file was never finished (its writer was stopped): write it again.")
    return version


def _text_attribute(file: HdfFile, name: str, default: str | None = None) -> str:
    if name not in file.attrs:
        if default is None:
            raise ValueError(f"attribute {name!r} is missing")
        return default
    kind = file.attrs.get_id(name).get_type()
    if not isinstance(kind, hdf5().h5t.TypeStringID) or kind.is_variable_str():
        raise ValueError(f"attribute {name!r} is not text")
    return bytes(file.attrs[name]).decode()


def _weight_types(types_json: Any, path: str) -> WeightTypes:
    """Read {"default": name, "by_name": {tensor: name}}."""

    def known(name: str) -> WeightType:
        found = weight_type_named(name)
        if found is None:
            raise UserError(
                f"{path}: unknown weight type {name!r}: this mpillama reads {', '.join(WEIGHT_TYPES)}: install a newer "
                "one, or convert the model again."
            )
        return found

    return WeightTypes(known(types_json["default"]), {k: known(v) for k, v in types_json["by_name"].items()})


def _read_entries(file: HdfFile, specs: list[TensorSpec], size: int) -> dict[str, TableEntry]:
    """Check every dataset against what the configuration says it must be."""
    arrays = [(spec, array) for spec in specs for array in spec.arrays()]
    checksums = file["checksums"][()]
    if checksums.dtype != np.uint64 or checksums.shape != (sum(s.checksums for s, _ in arrays),):
        raise ValueError(f"the checksums have dtype {checksums.dtype} and shape {checksums.shape}")
    entries, place = {}, 0
    for spec, array in arrays:
        dataset = file[array.name]
        if dataset.shape != array.shape or dataset.dtype != np.dtype(array.dtype):
            raise ValueError(
                f"tensor {array.name} has dtype {dataset.dtype} and shape {dataset.shape}, "
                f"expected {np.dtype(array.dtype)} and {array.shape}"
            )
        offset = dataset.id.get_offset()
        entry = TableEntry(array, -1 if offset is None else offset, checksums[place : place + spec.checksums])
        if entry.offset < 0 or entry.offset + entry.bytes > size:
            raise ValueError(
                f"tensor {array.name} ends at byte {entry.offset + entry.bytes}, but the file has {size} bytes"
            )
        entries[array.name], place = entry, place + spec.checksums
    _refuse_overlaps(entries)
    return entries


def _refuse_overlaps(entries: Mapping[str, TableEntry]) -> None:
    """Two arrays in the same bytes can only be damage."""
    ordered = sorted(entries.values(), key=lambda e: e.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.bytes > after.offset:
            raise ValueError(f"tensors {before.spec.name} and {after.spec.name} overlap at byte {after.offset}")


def metadata_digest(
    version: int, config_json: Any, types_json: Any, entries: Mapping[str, TableEntry], texts: Mapping[str, bytes]
) -> str:
    """SHA-256 over everything that is not weights, the checksums of the weights included."""
    table = [[e.spec.name, e.spec.dtype, list(e.spec.shape), e.offset] for e in entries.values()]
    head = [FORMAT, version, config_json, types_json, table, {k: len(v) for k, v in sorted(texts.items())}]
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for _, text in sorted(texts.items()):
        digest.update(text)
    for entry in entries.values():
        digest.update(np.ascontiguousarray(entry.checksums, "<u8").tobytes())
    return digest.hexdigest()
