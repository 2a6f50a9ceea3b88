"""How much memory this rank's host still gives: what is free, and every limit that was set on this process."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MUCH = 256 << 20
"""Bytes of swap or of reserved pages that are worth a warning."""
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


def memory_warnings(swapped: int, pages: Path = Path("/sys/kernel/mm")) -> dict[str, str]:
    """What makes this host's memory slower or smaller than it need be, by kind; `swapped` bytes of swap are in use."""
    found = {}
    if swapped > MUCH:
        found["swap"] = (
            f"{swapped / 1e9:.1f} GB of swap are in use: weights in swap make every token wait for the disk; "
            "end what else runs there."
        )
    if "[never]" in _read(pages / "transparent_hugepage/enabled"):
        found["pages"] = (
            "transparent huge pages are off, which slows down reading the weights: ask for "
            "`echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`."
        )
    if (reserved := _reserved_bytes(pages / "hugepages")) > MUCH:
        found["reserved"] = (
            f"{reserved / 1e9:.1f} GB are set aside as reserved huge pages, which nothing uses and mpillama cannot: "
            "ask for `sysctl vm.nr_hugepages=0`."
        )
    return found


def _reserved_bytes(folder: Path) -> int:
    """Free pages of all sizes of HugeTLB."""
    free = ((p.name, _read(p / "free_hugepages").strip()) for p in folder.glob("hugepages-*kB"))
    return sum(
        int(name.removeprefix("hugepages-").removesuffix("kB")) * 1024 * int(count)
        for name, count in free
        if count.isdigit()
    )


def _read(path: Path) -> str:
    """A small file of the system's; nothing where it does not exist or may not be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
