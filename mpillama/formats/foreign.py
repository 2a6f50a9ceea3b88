"""What the readers of foreign checkpoints share: refusals, texts of bounded size, checks of the table."""

import json
import re
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mpillama.errors import UserError
from mpillama.formats.checkpoint import StoredTensor
from mpillama.formats.reading import read_exactly
from mpillama.formats.stand_ins import HEAD_BYTES, refuse_stand_in, refuse_text_stand_in
from mpillama.formats.stored_arrays import StoredArray
from mpillama.models.family import Family, Fused
from mpillama.models.router import MOST_EXPERTS
from mpillama.models.tensors import LAYER_PREFIX

MOST_TEXT = 2**28
"""Bytes of a text file that are read at the most; the largest tokenizer.json has a tenth of it."""


def damaged(path: str | Path, what: str) -> UserError:
    """The refusal of a file that contradicts itself."""
    return UserError(f"{path}: the file is damaged or truncated ({what}): copy or download it again.")


def one_line(error: BaseException) -> str:
    """What another library found, as part of a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def unreadable(path: str | Path, error: OSError) -> UserError:
    """The refusal of a file that the system does not give."""
    reason = (error.strerror or str(error)).lower()
    return UserError(f"{path}: {reason}: check the path of the model and who may read it.")


def regular_size(path: str | Path) -> int:
    """The size of a file; UserError if it is missing or no regular file (a pipe would be waited for)."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:  # a zero byte in a name
        raise UserError(f"{str(path)!r}: no such file: check the path of the model.") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: not a regular file: give the path of a model.")
    return status.st_size


def read_text(path: Path) -> bytes:
    """The bytes of a small file."""
    size = regular_size(path)
    if size > MOST_TEXT:
        raise UserError(f"{path}: has {size} bytes, a text beside a model at most {MOST_TEXT}: download it again.")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    refuse_text_stand_in(path, text[:HEAD_BYTES])
    return text


def read_json(path: Path) -> Mapping[str, Any]:
    """The JSON object that a small file holds."""
    text = read_text(path)
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({one_line(error)}): copy or download it again.") from error
    if not isinstance(value, dict):
        raise damaged(path, f"it holds a {type(value).__name__}, expected a JSON object")
    return value


class PathSource:
    """A checkpoint's files for the few bytes that rank 0 reads before there are readers; see Source."""

    def __init__(self, files: Sequence[str]):
        self.files = files

    def path(self, file: int) -> str:
        return self.files[file]

    def fill(self, file: int, buffer: memoryview, offset: int, name: str) -> None:
        try:
            with Path(self.files[file]).open("rb") as opened:
                read_exactly(opened.fileno(), buffer, offset)
        except OSError as error:
            raise unreadable(self.files[file], error) from error

    def forget(self, file: int, offset: int, count: int) -> None:
        """They may be wanted again."""


def check_extents(
    files: Sequence[str], sizes: Sequence[int], tensors: Iterable[StoredTensor] | Iterable[StoredArray]
) -> None:
    """Refuse tensors of impossible shape, past the end of their file, or over each other."""
    extents = []
    for tensor in tensors:
        path, size = files[tensor.file], sizes[tensor.file]
        try:
            end = tensor.offset + tensor.bytes
        except ValueError as error:
            raise damaged(path, f"tensor {tensor.name!r}: {error}") from error
        if tensor.offset < 0 or end > size:
            raise damaged(path, f"tensor {tensor.name!r} ends at byte {end}, but the file has {size} bytes")
        extents.append((tensor.file, tensor.offset, end, tensor.name))
    for before, after in pairwise(sorted(extents)):
        if before[0] == after[0] and before[2] > after[1]:
            raise damaged(files[after[0]], f"tensors {before[3]!r} and {after[3]!r} overlap at byte {after[1]}")


def by_name(files: Sequence[str], tensors: Iterable[StoredTensor]) -> dict[str, StoredTensor]:
    """The table by name; UserError for a name that appears twice."""
    table: dict[str, StoredTensor] = {}
    for tensor in tensors:
        if tensor.name in table:
            raise damaged(files[tensor.file], f"tensor {tensor.name!r} appears twice")
        table[tensor.name] = tensor
    return table


def split_experts(path: str, prefix: str, tensor: StoredTensor, parts: Sequence[str]) -> Iterator[StoredTensor]:
    """Cut [experts, rows, columns] into a matrix for each expert and part; the parts of an expert follow each other."""
    if len(tensor.shape) != 3 or tensor.shape[0] > MOST_EXPERTS or tensor.shape[1] % len(parts):
        raise damaged(path, f"tensor {tensor.name!r} of stacked experts has shape {tensor.shape}")
    experts, rows, columns = tensor.shape
    rows //= len(parts)
    step = rows * tensor.type.row_bytes(columns)
    for number in range(experts * len(parts)):
        name = f"{prefix}{number // len(parts)}.{parts[number % len(parts)]}.weight"
        yield replace(tensor, name=name, shape=(rows, columns), offset=tensor.offset + number * step)


def split_expert_vectors(path: str, prefix: str, tensor: StoredTensor, part: str) -> Iterator[StoredTensor]:
    """Cut [experts, rows] into a bias for each expert."""
    if len(tensor.shape) != 2 or tensor.shape[0] > MOST_EXPERTS:
        raise damaged(path, f"tensor {tensor.name!r} of stacked experts has shape {tensor.shape}")
    experts, rows = tensor.shape
    for number in range(experts):
        offset = tensor.offset + number * tensor.type.row_bytes(rows)
        yield replace(tensor, name=f"{prefix}{number}.{part}.bias", shape=(rows,), offset=offset)


def module_of(name: str) -> str:
    """A tensor's module within its layer, "" outside the layers."""
    found = re.fullmatch(LAYER_PREFIX.format("[0-9]+") + r"(.+?)(?:\.(?:weight|bias))?", name)
    return found[1] if found else ""


def flattened(tensor: StoredTensor, family: Family | None) -> StoredTensor:
    """As a vector, if the family has it so."""
    if family is None or not family.flat or not re.search(family.flat, tensor.name):
        return tensor
    return replace(tensor, shape=(prod(tensor.shape),))


def cut_fused(path: str, tensor: StoredTensor, fused: Fused) -> Iterator[StoredTensor]:
    """The tensors that lie one below the other in one of a layer's modules; any other tensor as it is."""
    module = module_of(tensor.name)
    parts = fused.get(module, ())
    if not parts:
        yield tensor
        return
    if sum(rows for _, rows in parts) != tensor.shape[0]:
        shown = " + ".join(f"{rows} of {module}" for module, rows in parts)
        raise damaged(path, f"tensor {tensor.name!r} has {tensor.shape[0]} rows, the configuration asks for {shown}")
    first = 0
    for part, rows in parts:
        yield tensor.some_rows(tensor.name.replace(module, part), first, rows)
        first += rows


# -- Reading a binary header piece by piece, with bounds --------------------------------------------------------------


MOST_HEADER = 2**27
"""Bytes of a header that are read at the most; the largest vocabularies take a tenth of it."""


class Cursor:
    """A place in a file; what would lie past the end is refused before memory is asked for."""

    def __init__(self, path: str, limit: int = MOST_HEADER):
        self.path = path
        self.size = regular_size(path)
        self.end = min(self.size, limit)
        self.place = 0
        try:
            self.file = Path(path).open("rb")  # noqa: SIM115 - closed by __exit__
            head = self.file.read(HEAD_BYTES)
            self.file.seek(0)
        except OSError as error:
            raise unreadable(path, error) from error
        try:
            refuse_stand_in(path, head)
        except UserError:
            self.file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def expect(self, count: int, what: str) -> None:
        """Refuse a header that has no room for `count` more bytes."""
        if count < 0 or count > self.end - self.place:
            raise damaged(
                self.path,
                f"at byte {self.place} it promises {count} bytes of {what}, but its header ends by byte {self.end}",
            )

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        self.expect(count, what)
        try:
            data = self.file.read(count)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if len(data) != count:
            raise damaged(self.path, f"it ends at byte {self.place + len(data)} while it is read")
        self.place += count
        return data

    def number(self, code: str, what: str) -> Any:
        """The next little-endian number, by its letter in the struct module."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]
