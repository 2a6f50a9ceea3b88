"""Sets up Numba for this process: instruction set, threads and the cache of compiled kernels."""

import hashlib
import os
import platform
import stat
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mpillama.kernels.isa import InstructionSet, choose_isa, host_features

SPIN_COUNT = "20000"
"""How long a thread polls for its next kernel before it sleeps: some 50 us, longer than the gaps of a step."""


@dataclass(frozen=True)
class Target:
    """What the kernels of this process are compiled for."""

    isa: InstructionSet
    threads: int
    cache_directory: str


def requested_isa() -> str:
    """The instruction set that the environment asks for, "" for the best."""
    return os.environ.get("MPILLAMA_ISA", "")


def prepare(requested_isa: str, threads: int, yields: bool = False) -> Target:
    """Choose the instruction set and tell Numba; must come before anything imports Numba.

    `yields`: there are more threads than cores, so waiting threads must not spin. UserError if the requested
    instruction set cannot be used here.
    """
    isa = choose_isa(requested_isa, host_features())
    if "numba" in sys.modules:
        raise RuntimeError("Numba was imported before the kernels' target was prepared")
    # Numba reads the number of threads when it is imported, the OpenMP library the others when it is loaded.
    os.environ["NUMBA_NUM_THREADS"] = str(threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "0" if yields else SPIN_COUNT)
    from numba.core import config

    if isa.cpu_name:
        config.CPU_NAME, config.CPU_FEATURES = isa.cpu_name, isa.cpu_features
    config.CACHE_DIR = str(cache_directory(isa.name))
    return Target(isa, threads, config.CACHE_DIR)


def start_threads() -> str:
    """Start the thread pool and return the name of the threading layer that Numba chose."""
    from numba import threading_layer
    from numba.np.ufunc.parallel import _launch_threads

    _launch_threads()
    return str(threading_layer())


def cache_directory(isa_name: str) -> Path:
    """Return this user's directory for compiled kernels on this node, made if need be.

    MPILLAMA_CACHE_DIR replaces the node's temporary directory. The name holds a digest of the kernels' sources and of
    the compiler, because Numba itself looks at one source file only. A directory that others may write to, or that
    another user made, is not used: what is loaded from it is executed.
    """
    root = os.environ.get("MPILLAMA_CACHE_DIR")
    base = Path(root) if root else Path(tempfile.gettempdir()) / f"mpillama-{os.getuid()}"
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = base.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        base = Path(tempfile.mkdtemp(prefix="mpillama-"))
    directory = base / f"kernels-{isa_name}-{_sources_digest()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def _sources_digest() -> str:
    import llvmlite
    import numba
    import numpy as np

    versions = f"{platform.python_version()} {numba.__version__} {llvmlite.__version__} {np.__version__}"
    digest = hashlib.sha256(versions.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
