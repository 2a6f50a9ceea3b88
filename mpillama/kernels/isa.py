"""Which vector instructions the kernels use: one library for each set of them, chosen once per process.

The choice is made by the features that the processor has and the operating system grants, never by the processor's
name, which virtual machines report wrongly. CMakeLists.txt has the compiler's flags for each set.
"""

import ctypes
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpillama.errors import UserError
from mpillama.kernels.library import REMEDY, is_built

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA = 158, 0x1023, 18
AT_HWCAP = 16
HWCAP = {"fphp": 9, "asimdhp": 10, "asimddp": 20}
"""Bits of Linux's arch/arm64/include/uapi/asm/hwcap.h."""
AMX_GRANTED = "amx granted"
"""Not a processor's feature: the operating system lets this process use AMX's tiles."""


@dataclass(frozen=True)
class InstructionSet:
    """A set that has a library, and the features that it needs, by the names of /proc/cpuinfo."""

    name: str
    needs: frozenset[str] = frozenset()


AVX2 = frozenset(("avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "popcnt"))
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
AVX512_VNNI = AVX512 | {"avx512_vnni"}
AMX = AVX512_VNNI | {"amx_tile", "amx_int8", AMX_GRANTED}

GENERIC = InstructionSet("generic")
X86_SETS = (
    InstructionSet("amx", AMX),
    InstructionSet("avx512_vnni", AVX512_VNNI),
    InstructionSet("avx512", AVX512),
    InstructionSet("avx2", AVX2),
    GENERIC,
)
ARM_SETS = (InstructionSet("neon", frozenset(HWCAP)), GENERIC)
"""The best first."""


def known_sets() -> tuple[InstructionSet, ...]:
    """The sets that this kind of processor may have, the best first."""
    return {"x86_64": X86_SETS, "aarch64": ARM_SETS}.get(platform.machine(), (GENERIC,))


def choose_isa(requested: str, features: frozenset[str], is_built: Callable[[str], bool] = is_built) -> InstructionSet:
    """Return the best set that was built and that `features` allow, or the requested one.

    `requested` is a name, or "" for the best. UserError if it is unknown, was not built, or this processor lacks it.
    """
    usable = [s for s in sets_of(features) if is_built(s.name)]
    if not usable:
        raise UserError(f"there are no kernels for this processor beside mpillama: {REMEDY}.")
    if not requested:
        return usable[0]
    for candidate in usable:
        if candidate.name == requested:
            return candidate
    raise UserError(
        f"MPILLAMA_ISA={requested} {_reason(requested, features)}: choose one of "
        f"{', '.join(s.name for s in usable)}, or unset MPILLAMA_ISA to let mpillama choose."
    )


def missed_isa(chosen: InstructionSet, features: frozenset[str]) -> str:
    """The best set of a processor that runs plain code since none of its own was built, else ""."""
    best = sets_of(features)[0]
    return best.name if chosen == GENERIC != best else ""


def sets_of(features: frozenset[str]) -> list[InstructionSet]:
    """The sets whose needs `features` meet, whether they were built or not; the best first."""
    return [s for s in known_sets() if s.needs <= features]


def _reason(requested: str, features: frozenset[str]) -> str:
    for known in known_sets():
        if known.name == requested:
            lacking = sorted(known.needs - features)
            return f"is not in this processor, which lacks {', '.join(lacking)}" if lacking else "was not built"
    return f"is unknown (there are {', '.join(s.name for s in known_sets())})"


def host_features() -> frozenset[str]:
    """The features of this processor that the operating system grants."""
    if platform.machine() == "aarch64":
        return _arm_features()
    features = cpu_flags(Path("/proc/cpuinfo"))
    return features | {AMX_GRANTED} if "amx_int8" in features and grant_amx() else features


def cpu_flags(cpuinfo: Path) -> frozenset[str]:
    """The flags of the first processor that Linux lists; none if it lists none."""
    with cpuinfo.open() as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "flags":
                return frozenset(value.split())
    return frozenset()


def _arm_features() -> frozenset[str]:
    """Ask the C library, since an emulator shows the host's /proc/cpuinfo."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    word = getauxval(AT_HWCAP)
    return frozenset(name for name, bit in HWCAP.items() if word >> bit & 1)


def grant_amx() -> bool:
    """Ask Linux to let this process use AMX's tiles (Documentation/arch/x86/xstate); returns whether it does."""
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0)
