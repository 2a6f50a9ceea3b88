"""Debian's packages that some tests need."""

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

INSTALL_SECONDS = 300.0
LOCK = Path(tempfile.gettempdir()) / "packages-for-tests.lock"
"""Held by whoever installs: of two at the same time, one would be told that the other holds apt's own lock."""


def missing(programs: Sequence[str]) -> list[str]:
    """Those that are not on PATH."""
    return [name for name in programs if shutil.which(name) is None]


def install(packages: Sequence[str], programs: Sequence[str]) -> str:
    """Install packages that bring programs, as root; returns why that failed, "" if it did not."""
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        end = time.monotonic() + INSTALL_SECONDS
        for words in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
            command = ["apt-get", "--quiet", *words]
            try:
                subprocess.run(command, env=quiet, check=True, capture_output=True, timeout=end - time.monotonic())
            except subprocess.CalledProcessError as error:
                return f"{' '.join(command)} failed: {error.stderr.decode(errors='replace').strip()[-300:]}"
            except subprocess.TimeoutExpired:
                return f"{' '.join(command)} took longer than {INSTALL_SECONDS:.0f} s"
    left = missing(programs)
    return f"{', '.join(left)} not found after installing {' and '.join(packages)}" if left else ""
