"""Sets up the kernels of this process: instruction set, library and team of threads."""

import os
import warnings
from dataclasses import dataclass

from mpillama.errors import UserError
from mpillama.kernels.comparison import same_products
from mpillama.kernels.isa import InstructionSet, choose_isa, host_features, missed_isa
from mpillama.kernels.library import REMEDY, Library, Team, load


@dataclass(frozen=True)
class Target:
    """What the kernels of this process run on."""

    isa: InstructionSet
    threads: int
    library: Library
    team: Team


def requested_isa() -> str:
    """The instruction set that the environment asks for, "" for the best."""
    return os.environ.get("MPILLAMA_ISA", "")


def prepare(requested_isa: str, threads: int, yields: bool = False) -> Target:
    """Choose the instruction set, load its library and start the threads.

    `yields`: there are more threads than cores, so waiting threads must not spin. UserError if the requested
    instruction set cannot be used here.
    """
    features = host_features()
    isa = choose_isa(requested_isa, features)
    if not requested_isa and (missed := missed_isa(isa, features)):
        warnings.warn(f"There are no kernels for {missed}, plain code runs, which is slow: {REMEDY}.", stacklevel=2)
    if isa.name == "amx" and not _agrees_with_vnni():
        if requested_isa:
            raise UserError("AMX gives other results than VNNI on this processor: unset MPILLAMA_ISA.")
        warnings.warn("AMX gives other results than VNNI on this processor and is not used.", stacklevel=2)
        isa = choose_isa("avx512_vnni", features)
    library = load(isa.name)
    return Target(isa, threads, library, library.team(threads, yields))


def _agrees_with_vnni() -> bool:
    """AMX was only ever run in software: it is used where its bits are those of VNNI."""
    return same_products(load("amx"), load("avx512_vnni"))
