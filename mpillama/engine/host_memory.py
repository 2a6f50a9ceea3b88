"""How much memory this rank's host still gives: what is free, and every limit that was set on this process."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60
"""Limits from here on mean none (cgroup v1 writes a huge number instead of a word)."""


def available_bytes(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that the ranks of this host may still take together."""
    return min([int(psutil.virtual_memory().available), *cgroup_rooms(root, membership), *_slurm_rooms()])


def process_room() -> int:
    """Bytes that this process alone may still map (ulimit -v)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return UNLIMITED if limit == resource.RLIM_INFINITY else max(0, limit - psutil.Process().memory_info().vms)


def cgroup_rooms(root: Path, membership: Path) -> Iterator[int]:
    """What each memory group above this process still allows, versions 1 and 2; files cached by it can be dropped."""
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = "memory.max", "memory.current", "inactive_file"
            base = root
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            base = root / "memory"
        else:
            continue
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            yield from _room(group, *names)
            if group == base:
                break


def _room(group: Path, limit_name: str, usage_name: str, cached_name: str) -> Iterator[int]:
    limit, usage = _read(group / limit_name).strip(), _read(group / usage_name).strip()
    if not limit.isdigit() or not usage.isdigit() or int(limit) >= UNLIMITED:
        return
    cached = dict(line.split() for line in _read(group / "memory.stat").splitlines() if len(line.split()) == 2)
    yield max(0, int(limit) - int(usage) + int(cached.get(cached_name, 0)))


def _slurm_rooms() -> Iterator[int]:
    """Slurm's grant for the job on this node, in MiB; 0 means all there is."""
    granted = os.environ.get("SLURM_MEM_PER_NODE", "")
    if granted.isdigit() and int(granted):
        yield int(granted) << 20


def _read(path: Path) -> str:
    """A small file of the system's; nothing where it does not exist or may not be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
