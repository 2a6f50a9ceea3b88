"""Which vector instructions the kernels are compiled for.

The choice is made by CPU features, never by the CPU's name, which virtual machines report wrongly. It is made once
per process, before the first kernel is compiled, and lives in Numba's own target settings.
"""

import ctypes
import platform
from collections.abc import Mapping
from dataclasses import dataclass

from mpillama.errors import UserError

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA = 158, 0x1023, 18
AMX_GRANTED = "amx-granted"
"""Not a processor's feature: the operating system lets this process use AMX's tiles."""


@dataclass(frozen=True)
class InstructionSet:
    """A compilation target: LLVM's CPU level, extra features, and the CPU features it asks for."""

    name: str
    cpu_name: str
    cpu_features: str
    needs: tuple[str, ...]


AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512vnni", "fma", "f16c", "bmi2")
X86_SETS = (
    InstructionSet(
        "amx",
        "x86-64-v4",
        "+avx512vnni,-prefer-256-bit,+amx-tile,+amx-int8",
        (*AVX512, "amx-tile", "amx-int8", AMX_GRANTED),
    ),
    InstructionSet("vnni512", "x86-64-v4", "+avx512vnni,-prefer-256-bit", AVX512),
    InstructionSet("avx2", "x86-64-v3", "", ("avx2", "fma", "f16c", "bmi2")),
    InstructionSet("portable", "x86-64", "", ()),
)
OTHER_SETS = (InstructionSet("portable", "", "", ()),)
NAMES = tuple(s.name for s in X86_SETS)


def choose_isa(requested: str, features: Mapping[str, bool]) -> InstructionSet:
    """Return the best instruction set that `features` allow, or the requested one.

    `requested` is a name of NAMES, or "" for the best. UserError if the name is unknown or this CPU lacks it.
    """
    known = X86_SETS if platform.machine() in ("x86_64", "AMD64") else OTHER_SETS
    usable = [s for s in known if all(features.get(f, False) for f in s.needs)]
    if not requested:
        return usable[0]
    for candidate in usable:
        if candidate.name == requested:
            return candidate
    raise UserError(
        f"MPILLAMA_ISA={requested} cannot be used on this CPU: choose one of {', '.join(s.name for s in usable)}, "
        "or unset MPILLAMA_ISA to let mpillama choose."
    )


def host_features() -> Mapping[str, bool]:
    """Return the CPU features that the processor has and the operating system grants, under LLVM's names."""
    from llvmlite import binding

    features = dict(binding.get_host_cpu_features())
    return {**features, AMX_GRANTED: features.get("amx-int8", False) and grant_amx()}


def grant_amx() -> bool:
    """Ask Linux to let this process use AMX's tiles (Documentation/arch/x86/xstate); returns whether it does."""
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0)
