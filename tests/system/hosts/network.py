"""Simulated hosts: namespaces of network, name, processes and /dev/shm on this machine, and a wire between them.

Nothing of the machine itself is changed, and all ends with the process that made it. Commands run on a host through
its agent, which stands for sshd; MPI's launcher calls it so. The wire counts, delays and loses what is sent.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.packages import missing
from tests.system.hosts.agent import NETWORK
from tests.system.mpi.launch import ROOT, TIMEOUT, Launch, Result, environment, is_open_mpi, mpirun

HERE = Path(__file__).parent
WIRE = ROOT / "build" / "wire"
COMPILER = "c++"
PROGRAMS = ("unshare", "nsenter", "taskset", "mount")
SPACES = ("unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork")
START_SECONDS = 60.0
COMPILE_SECONDS = 120.0
MTU = 9000
# Of UCX, which MPICH's wheel is made with, and of Hydra: the one interface that joins the hosts.
SETTINGS = {"UCX_NET_DEVICES": "eth0", "UCX_TLS": "tcp,self,sysv,posix"}


@cache
def why_not() -> str:
    """Why there can be no hosts here, "" if there can."""
    if os.geteuid() != 0:
        return "simulated hosts need root"
    if lacking := missing(PROGRAMS):
        return f"simulated hosts need {', '.join(lacking)}"
    if not WIRE.exists() and missing((COMPILER,)):
        return f"simulated hosts need {COMPILER}, or {WIRE} as another machine has compiled it"
    if not Path("/dev/net/tun").exists():
        return "simulated hosts need /dev/net/tun"
    command = [*SPACES, "mount", "-t", "tmpfs", "none", "/dev/shm"]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS)
    if tried.returncode:
        return f"simulated hosts need namespaces: {tried.stderr.strip()}"
    return "the hosts are started as MPICH's Hydra starts them" if is_open_mpi() else ""


@dataclass(frozen=True)
class Count:
    """What a host has sent."""

    frames: int
    bytes: int
    messages: int
    """Frames that carry bytes of a TCP stream; a message of up to 8 kB is one."""


class Hosts:
    """Running hosts h1, h2, …, whose first processes are `pids`.

    Each has `cores_per_host` of this machine's for itself, and the wire the rest; all share all if it is 0.
    """

    def __init__(self, folder: Path, count: int, cores_per_host: int = 0):
        self.folder = folder
        self.cores_per_host = cores_per_host
        self.names = [f"h{i + 1}" for i in range(count)]
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self.pids: dict[str, int] = {}
        self.wire: subprocess.Popen[str] | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring up hosts and network."""
        table = "".join(f"{NETWORK}{i + 1} {name}\n" for i, name in enumerate(self.names))
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + table)
        launcher = self.folder / "launcher"
        launcher.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE / "agent.py"} call {self.folder} "$@"\n')
        launcher.chmod(0o755)
        for name in self.names:
            self._start_host(name)
        words = [*self.own_cores(""), str(wire_program()), *(str(pid) for pid in self.pids.values())]
        self.wire = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._expect("ready")
        for i, name in enumerate(self.names):
            self.call(name, sys.executable, str(HERE / "agent.py"), "join", str(i + 1), str(len(self.names)), str(MTU))

    def _start_host(self, name: str) -> None:
        agent = (sys.executable, str(HERE / "agent.py"), "serve", str(self.folder / name), name)
        with (self.folder / f"{name}.log").open("wb") as log:
            self.agents[name] = subprocess.Popen(
                [*self.own_cores(name), *SPACES, "--mount-proc", "--kill-child", *agent, str(self.folder / "hosts")],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment(), cwd=ROOT,
            )  # fmt: skip
        end = time.monotonic() + START_SECONDS
        while not (self.folder / name).exists():
            words = (self.folder / f"{name}.log").read_text(errors="replace")
            assert self.agents[name].poll() is None, f"{name} did not start: {words}"
            assert time.monotonic() < end, f"{name} did not start in {START_SECONDS:.0f} s: {words}"
            time.sleep(0.02)
        children = Path(f"/proc/{self.agents[name].pid}/task/{self.agents[name].pid}/children")
        self.pids[name] = int(children.read_text())

    def stop(self) -> None:
        """End the wire, and the hosts with all that runs on them."""
        for name in self.names:
            self.kill(name)
        if self.wire is not None:
            self.wire.kill()
            self.wire.wait()

    def kill(self, name: str) -> None:
        """A host's power fails: its processes end, and nothing of it answers any more."""
        if name in self.agents:
            if self.wire is not None and self.wire.poll() is None:
                self.link(name, up=False)
            self.agents[name].kill()
            self.agents[name].wait()

    def own_cores(self, name: str) -> list[str]:
        """The words before a command that is to run on a host's cores, "" for the wire's."""
        each, usable = self.cores_per_host, sorted(os.sched_getaffinity(0))
        first = each * (self.names.index(name) if name else len(self.names))
        own = usable[first : first + each] if name else usable[first:]
        return ["taskset", "-c", ",".join(map(str, own))] if each and own else []

    # -- the wire ------------------------------------------------------------------------------------------------------

    def shape(self, delay_us: float = 0, mbit: float = 0, loss_percent: float = 0) -> None:
        """Set one-way delay, rate (0: unlimited) and loss. The wire's own delay comes on top: see `ping`."""
        self._tell(f"shape {delay_us} {mbit} {loss_percent}")

    def link(self, name: str, up: bool) -> None:
        self._tell(f"link {self.names.index(name)} {int(up)}")

    def counts(self) -> dict[str, Count]:
        """What each host has sent since the last call."""
        numbers = [int(word) for word in self._tell("counts").split()]
        return {name: Count(*numbers[3 * i : 3 * i + 3]) for i, name in enumerate(self.names)}

    def _tell(self, command: str) -> str:
        assert self.wire is not None
        assert self.wire.stdin is not None
        self.wire.stdin.write(command + "\n")
        self.wire.stdin.flush()
        return self._expect("")

    def _expect(self, words: str) -> str:
        assert self.wire is not None
        assert self.wire.stdout is not None
        line = self.wire.stdout.readline().strip()
        assert line.startswith(words), f"the wire says {line!r}"
        assert self.wire.poll() is None, "the wire has ended"
        return line

    # -- commands ------------------------------------------------------------------------------------------------------

    def enter(self, name: str) -> list[str]:
        """The words before a command that is to run on a host."""
        spaces = ("--net", "--uts", "--mount", "--ipc", "--pid")
        return [*self.own_cores(name), "nsenter", "--target", str(self.pids[name]), *spaces, f"--wdns={ROOT}"]

    def call(self, name: str, *words: str, timeout: float = START_SECONDS) -> str:
        """Run a command on a host and return its standard output; AssertionError if it fails."""
        done = subprocess.run([*self.enter(name), *words], capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{words} on {name}: {done.stderr}"
        return done.stdout

    def ping(self, count: int = 50) -> float:
        """Median seconds there and back between the first two hosts, by messages as small as can be."""
        agent, address = (sys.executable, str(HERE / "agent.py")), NETWORK + "2"
        words = [*self.enter(self.names[1]), *agent, "echo", address]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout is not None
                server.stdout.readline()
                return float(self.call(self.names[0], *agent, "ask", address, str(count)))
            finally:
                server.kill()

    def mpirun(self, per_host: int, *arguments: str | Path, wrapper: str = "", tree: Path = ROOT) -> list[str]:
        """The command that runs Python on so many ranks of each host, started on the first, in a folder.

        Hosts that share all cores could not know of it: the launcher's count of ranks tells them.
        `wrapper`: a line of shell that runs the command "$0" "$@" of each rank.
        """
        total = per_host * len(self.names)
        launcher = ("-launcher", "ssh", "-launcher-exec", str(self.folder / "launcher"), "-iface", "eth0")
        ranks = ("-hosts", ",".join(self.names), "-ppn", str(per_host), "-n", str(total), "-wdir", str(tree))
        sharing = () if self.cores_per_host else (f"MPI_LOCALNRANKS={total}",)
        python = ("env", f"PYTHONPATH={tree}", *sharing, *(("sh", "-c", wrapper) if wrapper else ()), sys.executable)
        return [*self.enter(self.names[0]), mpirun(), *launcher, *ranks, *python, *map(str, arguments)]

    @contextmanager
    def started(
        self, per_host: int, *arguments: str | Path, wrapper: str = "", tree: Path = ROOT,
        settings: Mapping[str, str] | None = None,
    ) -> Iterator[Launch]:  # fmt: skip
        """Start Python so on the hosts; it is killed at the end."""
        command = self.mpirun(per_host, *arguments, wrapper=wrapper, tree=tree)
        launch = Launch(command, {**environment(), **SETTINGS, **(settings or {})}, ROOT)
        try:
            yield launch
        finally:
            launch.kill()

    def run(
        self, per_host: int, *arguments: str | Path, timeout: float = TIMEOUT, tree: Path = ROOT,
        settings: Mapping[str, str] | None = None,
    ) -> Result:  # fmt: skip
        """As `started`, and wait for the end."""
        with self.started(per_host, *arguments, tree=tree, settings=settings) as launch:
            return launch.finish(b"", timeout)


@contextmanager
def running_hosts(folder: Path, count: int, cores_per_host: int = 0) -> Iterator[Hosts]:
    """Started hosts, which are gone afterwards."""
    hosts = Hosts(folder, count, cores_per_host)
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.stop()


@cache
def wire_program() -> Path:
    """The compiled wire, made anew if its source is newer and there is a compiler."""
    source = HERE / "wire.cpp"
    fresh = WIRE.exists() and WIRE.stat().st_mtime >= source.stat().st_mtime
    if not fresh and not missing((COMPILER,)):
        WIRE.parent.mkdir(exist_ok=True)
        part = WIRE.with_suffix(f".{os.getpid()}")
        command = (COMPILER, "-std=c++17", "-O2", "-static-libstdc++", "-static-libgcc", "-o", part, source)
        subprocess.run(command, check=True, timeout=COMPILE_SECONDS)
        part.replace(WIRE)
    return WIRE
