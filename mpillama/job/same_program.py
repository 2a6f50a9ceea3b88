"""All ranks must run the same mpillama: at the start they compare versions and sources.

Where all hosts see one installation, a look at its files (no file is opened) on one rank of each host is enough; where
they differ, as with a copy on each node, one rank of each host reads them.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from mpi4py import MPI

import mpillama
from mpillama.comm.launcher import launched_first
from mpillama.errors import UserError

RECORD = "S32", "S64", "S64", "S352"
"""Version, digest of the sources, host, folder: bytes that every version must send first of all, in just this form."""

SOURCES = (".py", ".cpp", ".h")
FOLDER = Path(mpillama.__file__).parent


@dataclass(frozen=True)
class Program:
    """What one rank runs."""

    version: str
    sources: str
    host: str
    folder: str

    def record(self) -> np.ndarray:
        """As it travels: uint8 [512]."""
        fields = (self.version, self.sources, self.host, self.folder)
        parts = [np.array([f.encode()], kind).view(np.uint8) for f, kind in zip(fields, RECORD, strict=True)]
        return np.concatenate(parts)

    @classmethod
    def of_record(cls, record: np.ndarray) -> "Program":
        """Read what a rank sent."""
        lengths = [int(kind[1:]) for kind in RECORD]
        parts = np.split(record, np.cumsum(lengths)[:-1])
        return cls(*(part.tobytes().rstrip(b"\0").decode(errors="replace") for part in parts))


def this_program(sources: Callable[[Path], str]) -> Program:
    """This rank's program, with a digest of its sources: `looks_of` or `contents_of`."""
    return Program(mpillama.__version__, sources(FOLDER), os.uname().nodename, str(FOLDER))


def looks_of(folder: Path) -> str:
    """The digest of names, sizes, times and numbers (inodes) of all sources: equal where all hosts see one folder."""
    digest = hashlib.sha256()
    for path in _sources(folder):
        found = path.stat()
        digest.update(f"{path.relative_to(folder)} {found.st_size} {found.st_mtime_ns} {found.st_ino}\n".encode())
    return digest.hexdigest()


def contents_of(folder: Path) -> str:
    """The digest of all sources themselves."""
    digest = hashlib.sha256()
    for path in _sources(folder):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in SOURCES)


def refuse_other_programs(mpi: MPI.Intracomm) -> list[str]:
    """UserError on all ranks if one runs another mpillama than rank 0; returns every rank's host."""
    look = looks_of if launched_first() else lambda folder: ""
    programs = told_by_the_first(_exchange(mpi, this_program(look).record()))
    if len({p.version for p in programs}) == 1 < len({p.sources for p in programs}):
        programs = _exchange(mpi, _read_by_the_first(mpi))
    refuse_differences(programs)
    return [p.host for p in programs]


def told_by_the_first(programs: list[Program]) -> list[Program]:
    """Of ranks that have not looked themselves the program is that in the same folder of their host, if one has."""
    known = {(p.host, p.folder): p.sources for p in programs if p.sources}
    return [replace(p, sources=known.get((p.host, p.folder), "")) for p in programs]


def _read_by_the_first(mpi: MPI.Intracomm) -> np.ndarray:
    """This rank's record with the contents; the first rank of a host reads for all that run from the same folder."""
    mates = cast(MPI.Intracomm, mpi.Split_type(MPI.COMM_TYPE_SHARED))
    mine = this_program(contents_of if mates.rank == 0 else lambda folder: "").record()
    first = mine.copy()
    mates.Bcast(first)
    same_folder = Program.of_record(first).folder == Program.of_record(mine).folder
    mates.Free()
    return first if same_folder else this_program(contents_of).record()


def _exchange(mpi: MPI.Intracomm, mine: np.ndarray) -> list[Program]:
    records = np.empty((mpi.size, len(mine)), np.uint8)
    mpi.Allgather(mine, records)
    return [Program.of_record(r) for r in records]


def refuse_differences(programs: list[Program]) -> None:
    """UserError that names the first rank whose program is not rank 0's."""
    first = programs[0]
    others = [r for r, p in enumerate(programs) if (p.version, p.sources) != (first.version, first.sources)]
    if not others:
        return
    other = programs[others[0]]
    more = f" (and {len(others) - 1} more)" if others[1:] else ""
    who = f"rank {others[0]} of {len(programs)} on {other.host}{more}"
    if other.version != first.version:
        found = f"runs mpillama {other.version} ({other.folder}), rank 0 on {first.host} {first.version}"
    else:
        found = f"runs other sources of mpillama {other.version} ({other.folder}) than rank 0 on {first.host}"
    raise UserError(f"{who} {found} ({first.folder}): install the same on all hosts, or in a folder that they share.")
