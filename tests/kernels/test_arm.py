"""ARM has the bits of x86: compiled here by Debian's cross compiler and run by its emulator, QEMU."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mpillama.kernels.isa import AMX_GRANTED, ARM_SETS, host_features, sets_of
from mpillama.kernels.library import SOURCES, is_built, library_path
from tests.kernels.arm_python import EMULATOR, ArmPython, CannotBeHadError
from tests.packages import install, missing
from tests.system.mpi import launch

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "tests/kernels/kernels_driver.cpp"
COMPILER = "aarch64-linux-gnu-g++"
PACKAGES = ("g++-aarch64-linux-gnu", "qemu-user")
EMULATED = (EMULATOR, "-L", "/usr/aarch64-linux-gnu")
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra", "-Wno-psabi", "-Werror")
CASES = 273
HANG_SECONDS = 1500

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def why_not() -> str:
    """Install what is missing; returns why ARM's kernels cannot be compiled and run here, "" if they can."""
    if platform.machine() != "x86_64":
        return "results of ARM are compared with those of x86"
    if not (lacking := missing((COMPILER, EMULATOR))):
        return ""
    if os.geteuid() != 0 or missing(["apt-get"]):
        return f"{', '.join(lacking)} not found, and only root can install {' and '.join(PACKAGES)} (Debian)"
    return install(PACKAGES, (COMPILER, EMULATOR))


def run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=HANG_SECONDS, cwd=ROOT)
    assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def build_driver(compiler: str, to: Path) -> Path:
    run([compiler, *FLAGS, "-I", SOURCES, DRIVER, "-o", to, "-ldl"])
    return to


def cmake() -> str:
    """The system's CMake, or the one that `make` installed for want of it."""
    return shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))


@pytest.fixture(scope="module")
def arm_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := why_not():
        pytest.skip(reason)
    build, libraries = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("lib")
    target = {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64", "CMAKE_CXX_COMPILER": COMPILER}
    settings = {**target, "CMAKE_CXX_FLAGS": "-Werror", "MPILLAMA_LIBRARIES": libraries}
    run([cmake(), "-S", ROOT, "-B", build, *(f"-D{name}={value}" for name, value in settings.items())])
    run([cmake(), "--build", build, "--parallel", str(len(os.sched_getaffinity(0)))])
    return libraries


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The digests of x86's kernels, each set's that this processor has: all the same."""
    driver = build_driver(os.environ.get("CXX", "g++"), tmp_path_factory.mktemp("x86") / "driver")
    names = [isa.name for isa in sets_of(host_features() - {AMX_GRANTED}) if is_built(isa.name)]
    digests = {name: run([driver, library_path(name)]).splitlines() for name in names}
    for name in names:
        assert digests[name] == digests["generic"], name
    return digests["generic"]


@pytest.fixture(scope="module")
def arm_driver(arm_libraries: Path) -> Path:
    return build_driver(COMPILER, arm_libraries / "driver")


@pytest.mark.parametrize("name", [isa.name for isa in ARM_SETS])
def test_arm_has_the_same_bits(arm_libraries: Path, arm_driver: Path, expected: list[str], name: str) -> None:
    found = run([*EMULATED, arm_driver, arm_libraries / f"libmpillama_{name}.so"]).splitlines()
    assert len(found) == len(expected) == CASES
    different = [(x86, arm) for x86, arm in zip(expected, found, strict=True) if x86 != arm]
    assert not different


@pytest.fixture(scope="module")
def arm_python(arm_libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> ArmPython:
    try:
        return ArmPython(tmp_path_factory.mktemp("python"))
    except CannotBeHadError as error:
        pytest.skip(f"no Python for ARM: {error}")


def test_the_whole_program_has_the_same_bits(arm_libraries: Path, arm_python: ArmPython, tmp_path: Path) -> None:
    """The demo on two ranks of an ARM machine, and on one of this machine."""
    mpirun = launch.mpirun()
    if not (Path(mpirun).resolve().parent / "mpiexec.hydra").exists():
        pytest.skip("ARM's ranks have MPICH, which wants its own mpirun")
    shutil.copytree(ROOT / "mpillama", tmp_path / "mpillama", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    shutil.copytree(arm_libraries, tmp_path / "mpillama/kernels/lib", ignore=shutil.ignore_patterns("driver"))
    options = [*launch.PROGRAM, "--model", str(launch.DEMO_MODEL), "--seed", "1", "--max-tokens", "24", "--json"]
    here = launch.run(None, *options)
    assert here.status == 0, here.stderr
    command = [mpirun, "-n", "2", *arm_python.command, *options, "--threads", "1"]
    environment = {**launch.environment(), **arm_python.environment(tmp_path)}
    there = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert there.returncode == 0, there.stderr
    x86, arm = json.loads(here.stdout), json.loads(there.stdout)
    assert (arm["options"]["isa"], arm["ranks"]) == ("neon", 2)
    assert [arm[k] for k in ("token_ids", "logits_sha256")] == [x86[k] for k in ("token_ids", "logits_sha256")]
