"""A Python of ARM's with what mpillama needs, in a folder: Debian's Python, wheels from the package registry."""

import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
WHEELS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
EMULATOR = "qemu-aarch64"
SECONDS = 280.0


class CannotBeHadError(Exception):
    """What is to be fetched cannot be, and why."""


def fetch(command: Sequence[str | Path]) -> str:
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBeHadError(str(error)) from error
    if done.returncode != 0:
        raise CannotBeHadError(f"{Path(command[0]).name} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


class ArmPython:
    """Python with mpillama's dependencies and MPICH; CannotBeHadError if there is none."""

    def __init__(self, folder: Path):
        self.system, self.site = folder / "system", folder / "site"
        self._fetch_python(folder / "apt")
        version = fetch([*self.command, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
        self._fetch_packages(folder / "wheels", version.strip())
        (self.libraries,) = self.site.glob("mpich-*.data/data/lib")

    @property
    def command(self) -> list[str]:
        python = (self.system / "usr/bin/python3").resolve()
        return [EMULATOR, "-L", str(self.system), str(python)]

    def environment(self, *paths: Path) -> dict[str, str]:
        """What finds the packages; `paths` come before them."""
        return {
            "PYTHONPATH": os.pathsep.join(map(str, (*paths, self.site))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "MPI4PY_LIBMPI": str(self.libraries / "libmpi.so.12"),
            "OPENBLAS_NUM_THREADS": "1",
            "MPIR_CVAR_CH4_CMA_ENABLE": "0",  # QEMU cannot read another process's memory
        }

    def _fetch_python(self, apt: Path) -> None:
        """Have apt-get find the packages for a machine without any, whose state is in a folder."""
        for name in ("lists/partial", "archives/partial"):
            (apt / name).mkdir(parents=True)
        (apt / "status").touch()
        settings = {
            "APT::Architecture": "arm64",
            "APT::Architectures::": "arm64",
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",
            "Debug::NoLocking": "true",
            "Dir::State": apt,
            "Dir::State::status": apt / "status",
            "Dir::Cache": apt,
        }
        get = ["apt-get", "--quiet", *(f"-o{name}={value}" for name, value in settings.items())]
        fetch([*get, "update"])
        fetch([*get, "--yes", "--download-only", "install", "python3", "libstdc++6"])
        self.system.mkdir()
        for package in (apt / "archives").glob("*.deb"):
            fetch(["dpkg-deb", "-x", package, self.system])
        if not (self.system / "lib").exists():
            (self.system / "lib").symlink_to("usr/lib")

    def _fetch_packages(self, wheels: Path, version: str) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        needed = [*project["dependencies"], *project["optional-dependencies"]["mpich"]]
        kind = ["--only-binary=:all:", "--python-version", version, *(f"--platform={name}" for name in WHEELS)]
        fetch([sys.executable, "-m", "pip", "download", "--quiet", "--dest", wheels, *kind, *needed])
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(self.site)
