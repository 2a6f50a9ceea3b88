"""A Slurm of one node in a directory of its own: nothing of the machine's own Slurm or MUNGE is read or changed."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.packages import install, missing
from tests.system.mpi.launch import ROOT, environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "salloc", "scontrol")
PACKAGES = ("slurm-wlm", "munge")
START_SECONDS = 60.0
END_SECONDS = 20.0
JOB_SECONDS = 400.0
"""On a busy machine."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=0
MpiDefault=none
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire is also how long a job that was put back waits; 5 s is the least that Slurm takes.


def why_not() -> str:
    """Install what is missing; returns why there can be no Slurm here, "" if there can."""
    if os.geteuid() != 0:
        return "a Slurm of one node needs root"
    lacking = missing(PROGRAMS)
    if lacking and shutil.which("apt-get") is None:
        return f"{', '.join(lacking)} not found, and no apt-get to install {' and '.join(PACKAGES)}"
    return install(PACKAGES, PROGRAMS) if lacking else ""


class Job:
    """A submitted job."""

    def __init__(self, cluster: "Cluster", number: str, directory: Path):
        self.cluster = cluster
        self.number = number
        self.directory = directory

    def show(self, key: str) -> str:
        """A field of `scontrol show job`."""
        fields = self.cluster.call("scontrol", "--oneliner", "show", "job", self.number).split()
        return dict(field.partition("=")[::2] for field in fields)[key]

    @property
    def output(self) -> str:
        """Standard output so far."""
        return self._read("out")

    @property
    def errors(self) -> str:
        """Standard error so far."""
        return self._read("err")

    def _read(self, kind: str) -> str:
        path = self.directory / f"{self.number}.{kind}"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = JOB_SECONDS) -> None:
        """Poll; AssertionError with everything the job wrote if it does not come in time or the job ends without."""
        end = time.monotonic() + seconds
        while not condition():
            state = self.show("JobState")
            gone = state in ENDED and not condition()
            assert not gone, f"{what}: the job ended ({state}): {self.output} {self.errors}"
            assert time.monotonic() < end, f"{what}: not within {seconds} s ({state}): {self.output} {self.errors}"
            time.sleep(0.1)

    def wait_for_end(self, seconds: float = JOB_SECONDS) -> tuple[str, int]:
        """Wait until Slurm is done with it; returns state and the script's exit status."""
        self.wait_until(lambda: self.show("JobState") in ENDED, "the end", seconds)
        return self.show("JobState"), int(self.show("ExitCode").partition(":")[0])

    def signal(self, name: str) -> None:
        """Send a signal to the batch script alone, as `#SBATCH --signal=B:` does."""
        self.cluster.call("scancel", f"--signal={name}", "--batch", self.number)


class Cluster:
    """The running daemons."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.configuration = directory / "slurm.conf"
        self.daemons: list[subprocess.Popen[bytes]] = []

    def environment(self, **variables: str | Path) -> dict[str, str]:
        """What a user at this cluster has, with these variables."""
        own = {"SLURM_CONF": str(self.configuration), "VENV": sys.prefix}
        return {**environment(), **own, **{name: str(value) for name, value in variables.items()}}

    def call(self, *command: str | Path, **variables: str | Path) -> str:
        """Run one of Slurm's commands; AssertionError with its words if it fails."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment(**variables),
            cwd=ROOT,
            capture_output=True,
            timeout=START_SECONDS,
        )
        assert done.returncode == 0, f"{command}: {done.stderr.decode(errors='replace')}"
        return done.stdout.decode()

    def submit(self, script: Path, directory: Path, *options: str, ranks: int = 2, **variables: str | Path) -> Job:
        """Hand a script to sbatch, with its parameters as environment."""
        streams = (f"--output={directory}/%j.out", f"--error={directory}/%j.err")
        words = ("sbatch", "--parsable", f"--ntasks={ranks}", *streams, *options, script)
        return Job(self, self.call(*words, **variables).strip(), directory)

    def start(self) -> None:
        """Start MUNGE, the controller and the node; each is waited for."""
        self._configure()
        here, conf = self.directory, str(self.configuration)
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid"}
        names |= {"seed-file": "munged.seed", "log-file": "munged.log"}
        # Without --force it insists on a directory that everybody may enter.
        self._daemon(
            "munged", "--foreground", "--force", *(f"--{option}={here / name}" for option, name in names.items())
        )
        self._wait(lambda: (here / "munge.socket").exists())
        self._daemon("slurmctld", "-D", "-f", conf)
        self._wait(lambda: "is UP" in self.call("scontrol", "ping"))
        self._daemon("slurmd", "-D", "-f", conf, "-N", _host())
        self._wait(lambda: "idle" in self.call("sinfo", "--noheader", "--format=%T"))

    def stop(self) -> None:
        """End every job, daemon and whatever else is left of this cluster."""
        if len(self.daemons) == 3:
            subprocess.run(["scancel", "--user=root"], env=self.environment(), timeout=START_SECONDS, check=False)
            _until(lambda: not self.call("squeue", "--noheader"), END_SECONDS)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            _until(lambda daemon=daemon: daemon.poll() is not None, END_SECONDS)
        for process in self.processes():
            process.kill()
        for daemon in self.daemons:
            daemon.wait(END_SECONDS)

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on this cluster's configuration."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_CONF") == str(self.configuration):
                    found.append(process)
            except (psutil.Error, OSError):
                continue  # it has ended, or is somebody else's
        return found

    def _configure(self) -> None:
        for name in ("state", "spool"):
            (self.directory / name).mkdir()
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        controller_port, node_port = _free_ports(2)
        values = {"host": _host(), "controller_port": controller_port, "node_port": node_port}
        self.configuration.write_text(CONFIGURATION.format(directory=self.directory, **values))

    def _daemon(self, *command: str) -> None:
        with (self.directory / f"{command[0]}.printed").open("wb") as printed:
            self.daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=printed,
                    stderr=printed,
                    start_new_session=True,
                )
            )

    def _wait(self, ready: Callable[[], bool]) -> None:
        def is_ready() -> bool:
            try:
                return ready()
            except AssertionError:  # the daemon does not answer yet
                return False

        daemon = self.daemons[-1]
        _until(lambda: daemon.poll() is not None or is_ready(), START_SECONDS)
        printed = Path(self.directory / f"{daemon.args[0]}.printed").read_text(errors="replace")  # type: ignore[index]
        assert is_ready(), f"{daemon.args} did not start: {printed[-2000:]}"


@contextmanager
def running_cluster(directory: Path) -> Iterator[Cluster]:
    """A started Slurm, which is gone afterwards."""
    cluster = Cluster(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _until(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)


def _host() -> str:
    return os.uname().nodename.partition(".")[0]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    return _free_ports(1)[0]


def mpi_is_mpich(environment: Mapping[str, str] | None = None) -> bool:
    """Whether mpirun is MPICH's, whose ranks `srun --mpi=pmi2` starts too."""
    from tests.system.mpi.launch import mpirun

    told = subprocess.run([mpirun(), "--version"], capture_output=True, env=environment, timeout=START_SECONDS)
    return b"HYDRA" in told.stdout
