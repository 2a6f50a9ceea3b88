"""How an instruction set is chosen; test_kernels.py compares all that this processor has."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpillama.errors import UserError
from mpillama.kernels.comparison import same_products
from mpillama.kernels.isa import (
    AMX_GRANTED,
    ARM_SETS,
    AVX512_VNNI,
    X86_SETS,
    InstructionSet,
    choose_isa,
    cpu_flags,
    host_features,
    known_sets,
    missed_isa,
    sets_of,
)
from mpillama.kernels.library import SOURCES, is_built, library_path, load
from tests.kernels.kernel_parts import LIBRARY_TOO

VNNI_FLAGS = [
    f"-m{name}" for name in ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")
]
EVERYTHING = frozenset[str]().union(*(isa.needs for isa in (*X86_SETS, *ARM_SETS)))


def on(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)


def choose(requested: str, features: frozenset[str], *not_built: str) -> InstructionSet:
    return choose_isa(requested, features, lambda name: name not in not_built)


@pytest.mark.parametrize(
    ("lacking", "best"),
    [
        ((), "amx"),
        (("amx_tile",), "avx512_vnni"),
        ((AMX_GRANTED,), "avx512_vnni"),
        (("avx512_vnni",), "avx512"),
        (("avx512bw",), "avx2"),
        (("avx512_vnni", "f16c"), "generic"),
        (("fma",), "generic"),
        (EVERYTHING, "generic"),
    ],
)
def test_the_best_set_needs_all_its_features(monkeypatch, lacking, best):
    on(monkeypatch, "x86_64")
    assert choose("", EVERYTHING - set(lacking)).name == best


@pytest.mark.parametrize(("features", "best"), [(EVERYTHING, "neon"), (EVERYTHING - {"asimddp"}, "generic")])
def test_arm_processors_have_their_own_sets(monkeypatch, features, best):
    on(monkeypatch, "aarch64")
    assert choose("", features).name == best
    with pytest.raises(UserError, match=r"MPILLAMA_ISA=avx2 is unknown \(there are neon, generic\)"):
        choose("avx2", features)


def test_other_processors_have_the_generic_set(monkeypatch):
    on(monkeypatch, "riscv64")
    assert [isa.name for isa in known_sets()] == ["generic"]
    assert choose("", EVERYTHING).name == "generic"


def test_plain_code_on_a_processor_that_could_do_better_is_noticed(monkeypatch):
    on(monkeypatch, "x86_64")
    assert missed_isa(choose("", EVERYTHING, *(isa.name for isa in X86_SETS[:-1])), EVERYTHING) == "amx"
    assert not missed_isa(choose("", EVERYTHING, "amx"), EVERYTHING)
    assert not missed_isa(choose("", frozenset()), frozenset())


def test_a_set_that_was_not_built_is_not_chosen(monkeypatch):
    on(monkeypatch, "x86_64")
    assert choose("", EVERYTHING, "amx").name == "avx512_vnni"
    with pytest.raises(UserError, match=r"MPILLAMA_ISA=amx was not built: choose one of avx512_vnni, "):
        choose("amx", EVERYTHING, "amx")
    with pytest.raises(UserError, match=r"no kernels .*make kernels"):
        choose("", EVERYTHING, *(isa.name for isa in X86_SETS))


def test_a_set_that_the_processor_lacks_is_refused_with_those_it_has(monkeypatch):
    on(monkeypatch, "x86_64")
    without_vnni = EVERYTHING - {"avx512_vnni"}
    with pytest.raises(UserError, match=r"MPILLAMA_ISA=avx512_vnni is not in .* lacks avx512_vnni: .*avx2, generic"):
        choose("avx512_vnni", without_vnni)
    with pytest.raises(UserError, match=r"MPILLAMA_ISA=sse9 is unknown .*choose one of amx, avx512_vnni, avx512, "):
        choose("sse9", EVERYTHING)


def test_a_weaker_set_may_be_asked_for(monkeypatch):
    on(monkeypatch, "x86_64")
    assert [choose(isa.name, EVERYTHING) for isa in X86_SETS] == list(X86_SETS)


def test_this_processor_has_its_best_library():
    """All that the compiler knows was built, and every needed feature goes by the name that Linux gives it."""
    assert is_built("generic")
    best = choose_isa("", host_features())
    assert library_path(best.name).exists()
    assert best in sets_of(host_features())


def test_flags_are_those_of_the_first_processor(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2\nbugs\t\t:\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert cpu_flags(cpuinfo) == {"fpu", "avx2"}
    cpuinfo.write_text("processor\t: 0\nisa\t\t: rv64\n")
    assert cpu_flags(cpuinfo) == frozenset()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_amx_gives_the_same_bits_with_its_tiles_in_software(tmp_path):
    """All of it but the instructions themselves, on a processor that has the rest; in another process."""
    if lacking := AVX512_VNNI - host_features():
        pytest.skip(f"the rest of AMX's kernels needs {', '.join(sorted(lacking))}")
    if not (compiler := shutil.which(os.environ.get("CXX", "g++"))):
        pytest.skip("no C++ compiler")
    library = tmp_path / "libamx.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-Wno-psabi", *VNNI_FLAGS]
    source = ["-DMPILLAMA_AMX_IN_SOFTWARE", "-I", SOURCES, SOURCES / "kernels.cpp"]
    compiled = subprocess.run([compiler, *flags, *source, "-o", library], capture_output=True, text=True, timeout=1500)
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    files = ["tests/kernels/test_kernels.py", "tests/kernels/test_half_layers.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        cwd=Path(__file__).parents[2],
        env={**os.environ, LIBRARY_TOO: str(library)},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_libraries_are_compared_before_one_is_trusted() -> None:
    first, *others = [load(known.name) for known in sets_of(host_features()) if is_built(known.name)]
    assert all(same_products(first, other) for other in others)
