"""Whether every rank's host sees the same bytes of a model: a few samples, spread over all of its files.

A copy that a host keeps for itself may be stale, or still be on its way, and have the right size all the same.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np
import xxhash

from mpillama.errors import UserError
from mpillama.formats.reading import read_exactly

SAMPLES = 32
"""Places spread evenly over all bytes, besides the beginning of each file."""
SAMPLE_BYTES = 4096

Files = Mapping[str, int]
"""Path and size of each of a model's files, as rank 0 sees them."""


@dataclass(frozen=True)
class Sample:
    """A place in a file, and how many bytes are looked at there."""

    path: str
    offset: int
    count: int


def samples(files: Files) -> list[Sample]:
    """The beginning of each file, and places evenly spread up to the last bytes."""
    ends = list(accumulate(files.values()))
    total, last = ends[-1], max(ends[-1] - SAMPLE_BYTES, 0)
    spread = {last * i // SAMPLES for i in range(1, SAMPLES + 1)} if total else set()
    paths, places = list(files), {(path, 0) for path in files}
    for position in spread:
        file = next(i for i, end in enumerate(ends) if position < end)
        places.add((paths[file], position - (ends[file] - files[paths[file]])))
    return [Sample(path, offset, min(SAMPLE_BYTES, files[path] - offset)) for path, offset in sorted(places)]


def sample_digests(files: Files) -> np.ndarray:
    """uint64: one for each of samples(files); UserError if this host does not have the files, or in other sizes."""
    by_file = groupby(samples(files), key=lambda s: s.path)
    return np.fromiter((d for path, places in by_file for d in _digests_of(path, files[path], places)), np.uint64)


def _digests_of(path: str, size: int, places: Iterable[Sample]) -> Iterator[int]:
    fd = _open(path, size)
    with closing(os.fdopen(fd, "rb", buffering=0)):
        for sample in places:
            buffer = bytearray(sample.count)
            try:
                read_exactly(fd, memoryview(buffer), sample.offset)
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be read at byte {sample.offset}: {error.strerror or error}; "
                    "is the file still being written, or was it changed?"
                ) from error
            yield xxhash.xxh3_64_intdigest(buffer)


def _open(path: str, size: int) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(
            f"{path}: {(error.strerror or str(error)).lower()} on this rank's host: "
            "the model must lie on a file system that all hosts share."
        ) from error
    found = os.fstat(fd).st_size
    if found == size:
        return fd
    os.close(fd)
    raise UserError(
        f"{path}: has {found} bytes on this rank's host, but rank 0 sees {size}: copy it there again, or put it on a "
        "file system that all hosts share."
    )


def refuse_other_contents(files: Files, digests: Sequence[np.ndarray | None], hosts: Sequence[str]) -> None:
    """UserError that names the first rank which sees other bytes than rank 0.

    `digests`: those of rank 0 and of every other rank that has looked, None of the others; `hosts`: of every rank.
    """
    seen = {rank: found for rank, found in enumerate(digests) if found is not None}
    others = [rank for rank, found in seen.items() if not np.array_equal(found, seen[0])]
    if not others:
        return
    rank = others[0]
    place = samples(files)[int(np.flatnonzero(seen[rank] != seen[0])[0])]
    more = f" and {len(others) - 1} more" if others[1:] else ""
    raise UserError(
        f"rank {rank} of {len(digests)} on {hosts[rank]}{more}: {place.path} has other contents there than for rank 0 "
        f"on {hosts[0]} (in bytes {place.offset} to {place.offset + place.count - 1}): copy it there again, or put it "
        "on a file system that all hosts share."
    )
