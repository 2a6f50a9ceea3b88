"""A file with what one rank held of one block of the KV cache, or of one recurrent state.

A prologue of fixed size, a header in JSON, an XXH3-64 of each record, the records as `models/cache_layout` lays them
out. The prologue has the checksum of header and checksums. A file is written under another name and renamed, and
whatever is read of it is compared with its checksum: a torn file is none.
"""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from threading import get_native_id

import numpy as np
import xxhash

from mpillama.formats.reading import ShortReadError, read_exactly, write_exactly
from mpillama.models.cache_layout import Coverage, Layout, Run, StripeKey

MAGIC = b"mpikv001"
PROLOGUE = struct.Struct("<8sQQQ")
"""Magic, bytes of the header, records, checksum of what follows up to the records."""
LONGEST_HEADER = 1 << 20
NEW = ".new"
"""The end of a file's name while it is written."""

LayoutOf = Callable[[Coverage], Layout]


class TornFileError(Exception):
    """A file that is not as it was written, or is of something else."""


@dataclass(frozen=True)
class Name:
    """What a file is of: the model as it runs, and the text up to the block's end, both by their digests."""

    model: str
    text: str


def write_cache_file(path: Path, name: Name, layout: Layout, data: np.ndarray) -> int:
    """Write uint8 [layout.size] to a new file beside `path` and give it that name; returns the bytes of the file.

    OSError as the system says; nothing is left then.
    """
    said = {**vars(name), "kind": layout.kind, **layout.coverage.as_json()}
    header, view = json.dumps(said, sort_keys=True).encode(), data.data
    borders = accumulate(layout.record_sizes.tolist(), initial=0)
    sums = [xxhash.xxh3_64_intdigest(view[a:b]) for a, b in pairwise(borders)]
    checked = header + np.array(sums, "<u8").tobytes()
    start = PROLOGUE.pack(MAGIC, len(header), layout.records, xxhash.xxh3_64_intdigest(checked)) + checked
    new = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.{get_native_id()}{NEW}")
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)  # nobody else may read it
        try:
            write_exactly(fd, memoryview(start), 0)
            write_exactly(fd, view, len(start))
        finally:
            os.close(fd)
        new.rename(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    return len(start) + len(data)


class CacheFile:
    """An open file; TornFileError if it is not of `name`, or its beginning is not as it was written; OSError."""

    def __init__(self, path: Path, name: Name, kind: str, layout_of: LayoutOf):
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._read_beginning(name, kind, layout_of)
        except BaseException:
            self.close()
            raise

    def _read_beginning(self, name: Name, kind: str, layout_of: LayoutOf) -> None:
        magic, length, records, checksum = PROLOGUE.unpack(self._bytes(0, PROLOGUE.size))
        if magic != MAGIC or length > LONGEST_HEADER or PROLOGUE.size + 8 * records > os.fstat(self._fd).st_size:
            raise TornFileError("no file of a cache")
        checked = self._bytes(PROLOGUE.size, length + 8 * records)
        if xxhash.xxh3_64_intdigest(checked) != checksum:
            raise TornFileError("a torn header")
        said = json.loads(checked[:length])
        if said["model"] != name.model or said["text"] != name.text or said["kind"] != kind:
            raise TornFileError("of another text")
        try:
            self.layout = layout_of(Coverage.from_json(said))
        except (ValueError, TypeError, LookupError) as error:
            raise TornFileError("of another model") from error
        if self.layout.records != records:
            raise TornFileError("of another model")
        self._sums = np.frombuffer(checked, "<u8", offset=length) if records else np.empty(0, np.uint64)
        self._records_start = PROLOGUE.size + len(checked)

    def _bytes(self, offset: int, count: int) -> bytearray:
        found = bytearray(count)
        self._fill(memoryview(found), offset)
        return found

    def _fill(self, buffer: memoryview, offset: int) -> None:
        try:
            read_exactly(self._fd, buffer, offset)
        except ShortReadError as error:
            raise TornFileError("too short") from error

    def read(self, key: StripeKey, units: range, into: np.ndarray) -> None:
        """Fill [len(units), …] with these units of a stripe; TornFileError if one is not as it was written."""
        run: Run = self.layout.runs[key]
        assert run.units.start <= units.start <= units.stop <= run.units.stop
        first = units.start - run.units.start
        data = into if into.flags.c_contiguous else np.empty(into.shape, into.dtype)
        view = data.reshape(-1).view(np.uint8).data
        self._fill(view, self._records_start + run.offset + run.bytes * first)
        for i in range(len(units)):
            found = xxhash.xxh3_64_intdigest(view[run.bytes * i : run.bytes * (i + 1)])
            if found != int(self._sums[run.record + first + i]):
                raise TornFileError(f"a torn record of layer {key[0]}")
        if data is not into:
            into[...] = data

    def close(self) -> None:
        os.close(self._fd)
