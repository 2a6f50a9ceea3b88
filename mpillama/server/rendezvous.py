"""Where a server in a job is found: a file that only its user can read."""

import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mpillama.errors import UserError

OF_ALL = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
"""What a node calls itself where a server listens on all addresses."""


@dataclass(frozen=True)
class Rendezvous:
    """What a client needs; `ssh` is the tunnel that brings the URL's port to another machine."""

    url: str
    key: str | None = field(repr=False)
    model: str
    host: str
    port: int
    ssh: str
    job: str | None

    def write(self, path: Path) -> None:
        """Write the file whole, mode 0600; UserError if that cannot be done."""
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(json.dumps(asdict(self), indent=1) + "\n")
            beside.replace(path)
        except OSError as error:
            raise UserError(f"--rendezvous {path}: cannot be written ({error.strerror}).") from error

    def remove(self, path: Path) -> None:
        """Remove the file, unless it is another server's by now."""
        if path.exists() and read_rendezvous(path) == self:
            path.unlink()


def read_rendezvous(path: Path) -> Rendezvous:
    """The file's content; UserError if there is none."""
    try:
        return Rendezvous(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: is no rendezvous file of a server ({error}): name another one (--rendezvous) or give --url."
        ) from error


def default_path(environment: Mapping[str, str]) -> Path:
    """In the job's directory, with the job's number if there is one."""
    job = environment.get("SLURM_JOB_ID")
    return Path(f"mpillama-serve-{job}.json" if job else "mpillama-serve.json")


def is_loopback(host: str) -> bool:
    """Whether an address is reached from its own machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def tunnel(host: str, port: int, node: str, login: str | None) -> str:
    """The command that brings the server's port to another machine, by way of a login node if there is one."""
    if login is None:
        target = OF_ALL.get(host, f"[{host}]" if ":" in host else host)
        return f"ssh -N -L {port}:{target}:{port} {node}"
    if is_loopback(host):
        return f"ssh -N -L {port}:127.0.0.1:{port} -J {login} {node}"
    return f"ssh -N -L {port}:{node}:{port} {login}"
