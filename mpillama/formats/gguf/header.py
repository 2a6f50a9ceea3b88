"""The header of one GGUF file: its metadata and its table of tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).

Read here and not with the gguf package, whose GGUFReader trusts the counts of the file: an array that promises 2^60
entries makes it append empty slices until memory is full. Here every count is held against the bytes that are left.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpillama.errors import UserError
from mpillama.formats.checkpoint import StoredTensor
from mpillama.formats.foreign import Cursor, damaged
from mpillama.quant.ggml import UNREAD
from mpillama.quant.registry import STORED_TYPES
from mpillama.quant.weight_type import round_up

MAGIC = b"GGUF"
VERSIONS = (2, 3)
BIG_ENDIAN = tuple(int.from_bytes(version.to_bytes(4, "big"), "little") for version in VERSIONS)
ALIGNMENT = 32
MOST_AXES = 4

TEXT, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value types of metadata, as letters of the struct module."""

GGML_TYPES = {t.ggml: t.name for t in STORED_TYPES.values() if t.ggml is not None}


@dataclass(frozen=True)
class GgufHeader:
    """One file's metadata and tensors, under GGUF's names, shapes as Hugging Face writes them, offsets absolute."""

    path: str
    size: int
    metadata: Mapping[str, Any]
    tensors: list[StoredTensor]

    def value(self, key: str, default: Any = None) -> Any:
        """A number, truth value or text of the metadata; UserError if it is an array."""
        found = self.metadata.get(key, default)
        if isinstance(found, list | np.ndarray):
            raise damaged(self.path, f"its metadata has {key} as an array, expected one value")
        return found


def read_gguf_header(path: str, number: int) -> GgufHeader:
    """Read the header of a file, which is number `number` of its checkpoint."""
    with Cursor(path) as cursor:
        _check_magic(cursor)
        tensor_count, pair_count = cursor.number("Q", "counts"), cursor.number("Q", "counts")
        metadata = _metadata(cursor, pair_count)
        cursor.expect(tensor_count * 24, "tensor table")
        tensors = [_tensor(cursor, number) for _ in range(tensor_count)]
    start = round_up(cursor.place, _alignment(path, metadata))
    return GgufHeader(path, cursor.size, metadata, [replace(t, offset=start + t.offset) for t in tensors])


def _check_magic(cursor: Cursor) -> None:
    found = cursor.take(min(4, cursor.size), "magic")
    if found != MAGIC:
        raise UserError(
            f"{cursor.path}: not a GGUF file: it begins with {found.hex(' ') or '(nothing)'}, not with GGUF."
        )
    version = cursor.number("I", "version")
    if version in BIG_ENDIAN:
        raise UserError(f"{cursor.path}: a big-endian GGUF file: take the little-endian file of the model.")
    if version not in VERSIONS:
        raise UserError(
            f"{cursor.path}: GGUF version {version}: mpillama reads versions 2 and 3, convert the model again."
        )


def _alignment(path: str, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise damaged(path, f"general.alignment is {alignment!r}, no power of two")
    return alignment


# -- metadata -------------------------------------------------------------------------------------------------------


def _metadata(cursor: Cursor, count: int) -> dict[str, Any]:
    """The pairs of key and value; arrays of numbers stay NumPy arrays, arrays of texts are lists."""
    cursor.expect(count * 13, "metadata")
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = _text(cursor)
        if key in metadata:
            raise damaged(cursor.path, f"its metadata has the key {key!r} twice")
        metadata[key] = _value(cursor, cursor.number("I", "value type"))
    return metadata


def _value(cursor: Cursor, kind: int) -> Any:
    if kind == TEXT:
        return _text(cursor)
    if kind == ARRAY:
        return _array(cursor, cursor.number("I", "value type"), cursor.number("Q", "array length"))
    value = cursor.number(_scalar(cursor, kind), "metadata")
    # A float32 is given as the shortest decimal that means it, as its author wrote it: 1e-5, not 9.99999975e-06.
    return float(str(np.float32(value))) if SCALARS[kind] == "f" else value


def _array(cursor: Cursor, kind: int, count: int) -> Any:
    if kind == TEXT:
        cursor.expect(count * 8, "texts")
        return [_text(cursor) for _ in range(count)]
    dtype = np.dtype("<" + _scalar(cursor, kind))
    return np.frombuffer(cursor.take(count * dtype.itemsize, "numbers"), dtype)


def _scalar(cursor: Cursor, kind: int) -> str:
    if kind not in SCALARS:
        raise damaged(cursor.path, f"at byte {cursor.place} its metadata has a value of the unknown type {kind}")
    return SCALARS[kind]


def _text(cursor: Cursor) -> str:
    """A text; bytes that are no UTF-8 are kept as Python's surrogates."""
    return cursor.take(cursor.number("Q", "text length"), "text").decode(errors="surrogateescape")


# -- tensors --------------------------------------------------------------------------------------------------------


def _tensor(cursor: Cursor, number: int) -> StoredTensor:
    """One row of the table; its offset counts from the end of the header yet. GGUF names the fastest axis first."""
    name, axes = _text(cursor), cursor.number("I", "axes")
    if not 1 <= axes <= MOST_AXES:
        raise damaged(cursor.path, f"tensor {name!r} has {axes} axes")
    shape = tuple(cursor.number("Q", "shape") for _ in range(axes))[::-1]
    kind, offset = cursor.number("I", "tensor type"), cursor.number("Q", "offset")
    return StoredTensor(name, shape, _stored(cursor.path, name, kind), number, offset)


def _stored(path: str, name: str, kind: int) -> str:
    stored = GGML_TYPES.get(kind)
    if stored is None:
        shown = UNREAD[kind].upper() if kind in UNREAD else f"GGML's type {kind}, which this mpillama does not know"
        raise UserError(
            f"{path}: tensor {name!r} is stored as {shown}: "
            f"mpillama reads {', '.join(GGML_TYPES.values()).upper()}, take the model in one of these."
        )
    return stored
