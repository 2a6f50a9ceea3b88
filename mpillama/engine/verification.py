"""Comparing the bytes of a native file with its checksums, all ranks together."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mpillama.comm.communicator import Communicator
from mpillama.errors import UserError
from mpillama.files.native import NativeModel, unit_checksums
from mpillama.files.native_reader import NativeReader
from mpillama.model.partition import split_units

RUN_BYTES = 64 << 20


@dataclass(frozen=True)
class Difference:
    """Bytes of a tensor that are not what was written."""

    tensor: str
    first_byte: int
    last_byte: int


def verify_file(model: NativeModel, comm: Communicator, on_bytes: Callable[[int], None]) -> list[Difference]:
    """Check every array's units, a share on each rank; returns what differs, in the order of the file."""

    def check() -> list[Difference]:
        reader = NativeReader(model, comm.counting(on_bytes))
        try:
            return [d for name in model.entries for d in _differences(model, reader, name, comm)]
        finally:
            reader.close()

    found = [difference for part in comm.gather(comm.together(check)) for difference in part]
    return sorted(found, key=lambda d: d.first_byte)


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
            yield Difference(name, first, first + unit_bytes - 1)


def refuse_differences(path: str, found: list[Difference]) -> None:
    """UserError that names the first tensor that differs."""
    if found:
        more = f" (and {len(found) - 1} more places)" if len(found) > 1 else ""
        raise UserError(
            f"{path}: tensor {found[0].tensor} is damaged at bytes {found[0].first_byte} to "
            f"{found[0].last_byte}{more}: copy or convert the file again."
        )
