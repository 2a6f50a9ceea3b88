"""How the kernels are built: what a wheel has, what a stale library and a missing compiler lead to."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mpillama.errors import UserError
from mpillama.kernels import library as built
from mpillama.kernels.isa import known_sets

ROOT = Path(__file__).parents[2]
BUILT = ("CMakeLists.txt", "Makefile", "README.md", "LICENSE", "pyproject.toml", "mpillama")
TOOLS = ("cmake", "find", "make", "mkdir", "nproc", "rm", "sed", "sh", "sort", "touch")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is built, without libraries."""
    copy, left_out = tmp_path / "checkout", shutil.ignore_patterns("__pycache__", "lib")
    for name in BUILT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=left_out)
        else:
            copy.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_wheel_for_all_versions_of_python_has_all_libraries(checkout: Path, tmp_path: Path) -> None:
    """Compiled without optimisation, which takes most of the time and changes nothing of what is packed."""
    compiler, quick = os.environ.get("CXX", "c++"), tmp_path / "c++"
    quick.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    quick.chmod(0o755)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(checkout)]
    environment = {**os.environ, "CXX": str(quick)}
    done = subprocess.run(build, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    libraries = {isa.name: f"mpillama/kernels/lib/libmpillama_{isa.name}.so" for isa in known_sets()}
    assert {name for name in names if "/lib/" in name} == {libraries[n] for n in libraries if built.is_built(n)}
    assert {"mpillama/server/page/index.html", "mpillama/py.typed", "mpillama/__init__.pyi"} <= names
    assert {n for n in names if n.endswith(".h")} == {str(p.relative_to(ROOT)) for p in built.SOURCES.rglob("*.h")}


def test_the_library_was_made_of_these_sources() -> None:
    assert built.open_library("generic")


def test_a_stale_library_is_refused(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = checkout / "mpillama/kernels/src"
    monkeypatch.setattr(built, "SOURCES", sources)
    assert built.open_library("generic")
    with (sources / "kernels.cpp").open("a") as file:
        file.write("// changed\n")
    with pytest.raises(UserError, match=r"libmpillama_generic\.so: was made of other sources .*make kernels"):
        built.open_library("generic")


def test_a_library_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built, "LIBRARIES", tmp_path)
    (tmp_path / "libmpillama_generic.so").write_text("cut")
    with pytest.raises(UserError, match=r"libmpillama_generic\.so: cannot be loaded .*make kernels"):
        built.open_library("generic")


def test_without_a_compiler_a_sentence_names_what_to_install(checkout: Path, tmp_path: Path) -> None:
    """Neither CMake's list of places nor a traceback: what is missing, and its package."""
    path = tmp_path / "bin"
    path.mkdir()
    for tool in TOOLS:
        if found := shutil.which(tool):
            (path / tool).symlink_to(found)
    if not (path / "make").exists() or not (path / "cmake").exists():
        pytest.skip("there is no make or no cmake here")
    environment = {**os.environ, "PATH": str(path)}
    environment.pop("CXX", None)
    for command in (["make", "kernels"], ["cmake", "-S", ".", "-B", "build"]):
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert "install g++" in " ".join(done.stderr.split())
