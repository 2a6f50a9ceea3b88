"""Whether all ranks run the same mpillama: else they would not make the same calls, and wait for each other."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mpi4py import MPI

import mpillama
from mpillama.errors import UserError

RECORD = "S32", "S64", "S64", "S352"
"""Version, digest of the sources, host, folder: bytes that every version must send first of all, in just this form."""

SOURCES = (".py", ".cpp", ".h")


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


def this_program() -> Program:
    """What this process runs."""
    folder = Path(mpillama.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SOURCES):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return Program(mpillama.__version__, digest.hexdigest(), os.uname().nodename, str(folder))


def refuse_other_programs(mpi: MPI.Intracomm) -> list[str]:
    """UserError on all ranks if one runs another mpillama than rank 0; returns every rank's host."""
    mine = this_program().record()
    records = np.empty((mpi.size, len(mine)), np.uint8)
    mpi.Allgather(mine, records)
    programs = [Program.of_record(r) for r in records]
    refuse_differences(programs)
    return [p.host for p in programs]


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
