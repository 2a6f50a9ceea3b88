"""What the ranks log: warnings to standard error as sentences; with --log-dir, everything to a file of each rank."""

import logging
import os
import platform
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from mpillama import __version__
from mpillama.comm.failure import describe_rank, print_error
from mpillama.errors import UserError
from mpillama.job.start import World, mpi_library
from mpillama.redaction import hide, shown_arguments

ROOT = "mpillama"
LIBRARIES = ("numpy", "mpi4py", "h5py")
MONITOR = "mpillama.job.monitor"
OF_RUN = {"of_run": True}
"""Extra of a warning that is about no rank in particular."""


class Sentences(logging.Handler):
    """Prints `warnings`, and what the `monitor` says; errors are printed by who raises them."""

    def __init__(self, world: World, warnings: bool, monitor: bool):
        super().__init__(logging.INFO)
        self.where = f"{describe_rank(world.comm.rank, world.comm.size)}: "
        self.warnings = warnings
        self.monitor = monitor

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno == logging.WARNING:
            return self.warnings
        return self.monitor and record.name == MONITOR and record.levelno == logging.INFO

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, in one piece; a warning of the whole run (extra of_run) names no rank."""
        kind = "warning: " if record.levelno == logging.WARNING else ""
        where = "" if getattr(record, "of_run", False) else self.where
        print_error(f"mpillama: {kind}{where}{record.getMessage()}")


class RankFile(logging.Handler):
    """Appends lines to a file; once that fails, it says so on standard error and stops."""

    def __init__(self, path: Path, world: World):
        super().__init__()
        self.path = path
        self.comm = world.comm
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if stat.S_ISREG(os.fstat(self.fd).st_mode):
            os.fchmod(self.fd, 0o600)  # the file may be an older one
        where = f"{self.comm.rank}/{self.comm.size}@{world.host}"
        self.setFormatter(logging.Formatter(f"%(asctime)s.%(msecs)03d {where} %(levelname)s %(message)s", "%FT%T"))

    def emit(self, record: logging.LogRecord) -> None:
        if self.fd < 0:
            return
        line = (hide(self.format(record)) + "\n").encode(errors="replace")
        try:
            while line:
                line = line[os.write(self.fd, line) :]
        except OSError as error:
            self.close()
            print_error(
                f"mpillama: warning: {describe_rank(self.comm.rank, self.comm.size)}: {self.path} cannot be written "
                f"({(error.strerror or str(error)).lower()}): its log ends here, the run goes on."
            )

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            _close(fd)
        super().close()


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        return  # a network file system that tells here what it could not write; emit has told, or it is the end


@contextmanager
def logged(world: World, quiet: bool, directory: str | None = None, level: str = "info") -> Iterator[None]:
    """Set logging up for this rank; UserError on all ranks if a log cannot be written."""
    handlers: list[logging.Handler] = [Sentences(world, not quiet, directory is None)]
    if directory is not None:
        handlers.append(world.comm.together(lambda: _open(Path(directory), world)))
        handlers[-1].setLevel(level.upper())
    logger = logging.getLogger(ROOT)
    logger.setLevel(min(handler.level for handler in handlers))
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    try:
        with _told(world, directory is not None):
            yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True


def _open(directory: Path, world: World) -> RankFile:
    """This rank's file, named so that a listing is in the order of ranks."""
    size = world.comm.size
    path = directory / f"mpillama-{world.comm.rank:0{len(str(size - 1))}d}-of-{size}.log"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return RankFile(path, world)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"--log-dir {directory}: {path.name} cannot be written ({reason}): name a folder that all hosts may "
            "write to."
        ) from error


@contextmanager
def _told(world: World, in_file: bool) -> Iterator[None]:
    """Log how the run starts, and how it ends if it fails."""
    log, start = logging.getLogger(__name__), time.monotonic()
    if in_file:
        libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        log.info("mpillama %s, Python %s, %s, %s.", __version__, platform.python_version(), libraries, mpi_library())
        log.info("process %d, %d threads, Linux %s.", os.getpid(), world.threads, platform.release())
        log.info("arguments: %s", shown_arguments(sys.argv[1:]) or "none")
    try:
        yield
    except UserError as error:
        log.error("%s", error)
        raise
    except BaseException as error:
        log.critical("%s: %s", type(error).__name__, error)
        raise
    log.info("done after %.1f s.", time.monotonic() - start)
