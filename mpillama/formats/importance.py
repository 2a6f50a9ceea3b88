"""Importance matrices of llama.cpp's imatrix tool: how much the columns of each matrix count when it is quantised.

As GGUF (of each matrix NAME.in_sum2, the sums of its inputs' squares, and NAME.counts, how many inputs there were), and
in the older form, usually called .dat, which has the same of dense models in one run of numbers.
Formats: https://github.com/ggml-org/llama.cpp/tree/master/tools/imatrix
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpillama.errors import UserError
from mpillama.formats.checkpoint import StoredTensor
from mpillama.formats.foreign import Cursor, check_extents, damaged, unreadable
from mpillama.formats.gguf.config import canonical
from mpillama.formats.gguf.header import MAGIC, GgufHeader, read_gguf_header
from mpillama.formats.reading import read_exactly
from mpillama.models.families import FAMILIES
from mpillama.quant.weight_type import Float32

SUMS, COUNTS = ".in_sum2", ".counts"
LEAST = np.float32(1e-6)
"""Of a matrix's largest importance: what was never used in the calibration is not to be lost altogether."""
MOST_ENTRIES, MOST_NAME, MOST_COLUMNS = 1 << 20, 1 << 10, 1 << 31
STACKED = "_exps."
"""In names of tensors that hold the matrices of all experts."""


@dataclass(frozen=True)
class Entry:
    """What a file says of one tensor of GGUF: float32 [experts, columns], one expert if there are none."""

    name: str
    values: Float32


def read_importance(path: str, model_type: str, experts: int, columns: Mapping[str, int]) -> dict[str, Float32]:
    """The importance of every column by the matrix's name in Hugging Face's spelling.

    `experts` of each layer, 0 if there are none; `columns` are those of the model's matrices. UserError if the file is
    of another model.
    """
    family = FAMILIES[model_type]
    if family.gguf is None:
        raise UserError(
            f"{path}: no GGUF names are known for models of type {model_type}, so an importance matrix cannot be used."
        )
    with Cursor(path) as cursor:
        is_gguf = cursor.take(min(4, cursor.size), "magic") == MAGIC
    found = {}
    for entry in _of_gguf(path) if is_gguf else _of_dat(path, experts):
        parts, width = entry.values.shape
        named = StoredTensor(entry.name, (parts, 2, width) if STACKED in entry.name else (1, width), "f32", 0, 0)
        for tensor in canonical(path, named, family.gguf, 0):
            if tensor.name in columns:
                found[tensor.name] = _checked(path, tensor.name, entry, columns[tensor.name])
    if not found:
        raise UserError(f"{path}: names no matrix of this model: make it with the same model's GGUF file.")
    return found


def _checked(path: str, name: str, entry: Entry, columns: int) -> Float32:
    """One matrix's importance; UserError if it does not fit."""
    expert = re.search(r"\.experts\.([0-9]+)\.", name)
    values = entry.values[int(expert[1]) if expert else 0]
    if len(values) != columns:
        raise UserError(
            f"{path}: has {len(values)} columns for {entry.name}, but {name} has {columns}: it was made with another "
            "model."
        )
    if not np.isfinite(values).all() or values.min() < 0:
        raise damaged(path, f"the importance of {entry.name} has numbers that are no mean of squares")
    most = values.max()
    return np.maximum(values, most * LEAST) if most > 0 else np.ones_like(values)


def _means(sums: np.ndarray, counts: np.ndarray) -> Float32:
    """Mean squares [experts, columns]; ones for an expert that was never chosen."""
    counts = counts.reshape(-1, 1).astype(np.float32)
    means: Float32 = np.where(counts > 0, sums.reshape(len(counts), -1) / np.maximum(counts, 1), np.float32(1))
    return means


# -- GGUF -----------------------------------------------------------------------------------------------------------


def _of_gguf(path: str) -> Iterator[Entry]:
    header = read_gguf_header(path, 0)
    kind = header.value("general.type")
    if kind != "imatrix":
        raise UserError(f"{path}: a GGUF file of type {kind!r}, not an importance matrix (imatrix): name that file.")
    check_extents((path,), (header.size,), header.tensors)
    table = {tensor.name: tensor for tensor in header.tensors}
    for name, tensor in table.items():
        if name.endswith(SUMS):
            counts = table.get(name.removesuffix(SUMS) + COUNTS)
            if counts is None:
                raise damaged(path, f"it has {name}, but no {COUNTS.removeprefix('.')} of it")
            yield _entry(header, tensor, counts)


def _entry(header: GgufHeader, sums: StoredTensor, counts: StoredTensor) -> Entry:
    values, numbers = (_floats(header, tensor) for tensor in (sums, counts))
    if not len(numbers) or len(values) % len(numbers):
        raise damaged(header.path, f"{sums.name} has {len(values)} numbers for {len(numbers)} counts")
    return Entry(sums.name.removesuffix(SUMS), _means(values, numbers))


def _floats(header: GgufHeader, tensor: StoredTensor) -> Float32:
    if tensor.stored != "f32":
        raise damaged(header.path, f"{tensor.name} is stored as {tensor.stored}, expected f32")
    values = np.empty(tensor.bytes // 4, "<f4")
    try:
        with Path(header.path).open("rb") as file:
            read_exactly(file.fileno(), values.view(np.uint8).data, tensor.offset)
    except OSError as error:
        raise unreadable(header.path, error) from error
    return values


# -- the older form -------------------------------------------------------------------------------------------------


def _of_dat(path: str, experts: int) -> Iterator[Entry]:
    """A count of entries; of each the length of its name, name, calls, the number of values, float32 values."""
    with Cursor(path, limit=1 << 62) as cursor:
        for _ in range(_count(cursor, MOST_ENTRIES, "entries")):
            name = cursor.take(_count(cursor, MOST_NAME, "bytes of a name"), "name").decode(errors="replace")
            calls, count = cursor.number("i", "calls"), _count(cursor, MOST_COLUMNS, "values")
            sums = np.frombuffer(cursor.take(4 * count, "values"), "<f4")
            parts = experts if STACKED in name else 1
            if not count or not parts or count % parts:
                raise damaged(path, f"it has {count} values for {name}")
            yield Entry(name, _means(sums, np.full(parts, calls)))


def _count(cursor: Cursor, most: int, what: str) -> int:
    found = int(cursor.number("i", what))
    if not 0 < found < most:
        raise UserError(
            f"{cursor.path}: not an importance matrix of llama.cpp (it would have {found} {what}): name a file that "
            "llama.cpp's imatrix tool wrote."
        )
    return found
