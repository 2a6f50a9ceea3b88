"""`pack`: the unpacked archive is an environment of its own."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mpillama.cli.pack import TOP, files_to_pack
from tests.system.mpi.launch import PROGRAM, environment, mpirun, run

needs_venv = pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="this Python is no virtual environment")


@needs_venv
def test_an_archive_holds_the_environment_and_the_package(tmp_path: Path) -> None:
    names = {name for _, name in files_to_pack(tmp_path / "none")}
    inside = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    assert {"bin/python", "pyvenv.cfg", f"{inside}/mpillama/__main__.py", f"{inside}/numpy/__init__.py"} <= names
    assert any(name.startswith(f"{inside}/mpillama/kernels/lib/") for name in names)


@needs_venv
@pytest.mark.slow
def test_an_unpacked_archive_runs_by_itself(tmp_path: Path) -> None:
    """On two ranks, with its own mpirun, package and kernels, and nothing of this checkout."""
    archive, target = tmp_path / "env.tar", tmp_path / "node"
    result = run(None, *PROGRAM, "pack", archive)
    assert result.status == 0, result.stderr
    assert f"VENV=/tmp/{TOP}" in " ".join(result.stdout.split())
    with tarfile.open(archive) as packed:
        packed.extractall(target, filter="fully_trusted")
    binaries = target / TOP / "bin"
    launcher = (
        (str(binaries / Path(mpirun()).name), "-n", "2") if (binaries / "mpirun").exists() else (mpirun(), "-n", "2")
    )
    code = "import mpillama.__main__ as m, numpy, sys; print(m.__file__); sys.exit(m.main(['doctor', '--json']))"
    clean = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    clean["PATH"] = f"{binaries}:{os.environ['PATH']}"
    done = subprocess.run(
        [*launcher, str(binaries / "python"), "-c", code],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env=clean,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{target}/{TOP}/lib" in done.stdout
    assert '"ranks": 2' in done.stdout


def test_a_python_without_an_environment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpillama.cli.options import PackOptions
    from mpillama.cli.pack import pack
    from mpillama.errors import UserError

    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    with pytest.raises(UserError, match="no virtual environment"):
        pack(PackOptions(file=str(tmp_path / "env.tar")))
