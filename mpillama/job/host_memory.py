"""How much memory this rank's host still gives: what is free, and every limit that was set on this process."""

import os
import resource
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import psutil

from mpillama.errors import UserError

CGROUPS = Path("/sys/fs/cgroup")
SHARED = Path("/dev/shm")
MPICH_BYTES, WINDOW_BYTES = 1_100_000, 2_110_000
"""What MPICH 5 takes of /dev/shm for a rank at the least, and what sums do, once they are large, for each rank and once
more with several hosts. With less a rank ends by a bus error, at the start or in the midst of a prompt.
"""
UCX_BYTES, UCX_SPARE = 7_600_000, 24_000_000
"""What each rank takes of it at the most where UCX, below MPICH, lays files there too, and what must stay free then:
UCX begins to if it finds 16 MiB, and crashes if others' files leave less before it has laid all of its own.
"""
UCX_TRANSPORTS = "UCX_TLS"
START_BYTES = 64_000_000
"""What a rank takes before it can look at its limits: Python, MPI, numpy, its share of the launcher."""
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


def refuse_small_host(
    ranks: int, shared: Path = SHARED, root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")
) -> None:
    """UserError if so many ranks could not even start here: they would be killed while Python and MPI are loaded."""
    host, need = os.uname().nodename, ranks * START_BYTES
    limit = min((found for group, names in _groups(root, membership) if (found := _limit(group, names))), default=need)
    if limit < need:
        raise UserError(
            f"the memory of host {host} is limited to {limit / 1e6:.0f} MB (memory cgroup), but Python and MPI alone "
            f"need {need / 1e6:.0f} MB for {ranks} rank{'s' * (ranks > 1)}: ask for more (Slurm: --mem, containers: "
            "--memory), or start fewer ranks on a host."
        )
    (size, free), need = _size(shared), ranks * MPICH_BYTES + (ranks + 1) * WINDOW_BYTES
    if ranks > 1 and free < need:
        holds = f"holds {size / 1e6:.0f} MB"
        if size >= need:
            holds = f"has {free / 1e6:.0f} of {size / 1e6:.0f} MB free"
        raise UserError(
            f"{shared} on host {host} {holds}, but {ranks} ranks that exchange messages through it "
            f"need {need / 1e6:.0f} MB: make it larger (docker: --shm-size, root: mount -o remount,size=1G {shared}), "
            f"{'remove what killed jobs have left in it, ' if size >= need else ''}or start fewer ranks on a host."
        )


def spare_shared_memory(ranks: int, environment: MutableMapping[str, str] | None = None, shared: Path = SHARED) -> None:
    """Keep UCX's files out of a small /dev/shm, as it is in containers, before MPI is loaded; what the user set stays.

    MPICH's own messages within a host go on through it.
    """
    environment = os.environ if environment is None else environment
    if _size(shared)[1] < ranks * UCX_BYTES + UCX_SPARE:
        environment.setdefault(UCX_TRANSPORTS, "^posix")


def _size(folder: Path) -> tuple[int, int]:
    """Bytes of a file system, and those that are free; as many as can be where that is not known or not limited."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return UNLIMITED, UNLIMITED
    if found.f_blocks == 0:
        return UNLIMITED, UNLIMITED
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def cgroup_rooms(root: Path, membership: Path) -> Iterator[int]:
    """What each memory group above this process still allows, versions 1 and 2; files cached by it can be dropped."""
    for group, names in _groups(root, membership):
        yield from _room(group, names)


def _groups(root: Path, membership: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The memory groups above this process, and the names of their files: limit, usage, and cached in memory.stat."""
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
            yield group, names
            if group == base:
                break


def _limit(group: Path, names: tuple[str, str, str]) -> int:
    """Bytes that a group may take; 0 if it has no limit."""
    limit = _read(group / names[0]).strip()
    return int(limit) if limit.isdigit() and int(limit) < UNLIMITED else 0


def _room(group: Path, names: tuple[str, str, str]) -> Iterator[int]:
    limit, usage = _limit(group, names), _read(group / names[1]).strip()
    if not limit or not usage.isdigit():
        return
    cached = dict(line.split() for line in _read(group / "memory.stat").splitlines() if len(line.split()) == 2)
    yield max(0, limit - int(usage) + int(cached.get(names[2], 0)))


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
