"""Where cores and memory of this host lie: sockets, NUMA nodes, and the node of each page."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

SYSTEM = Path("/sys/devices/system")
PLACED = re.compile(r"\bN(\d+)=(\d+)")
PAGE_SIZE = re.compile(r"\bkernelpagesize_kB=(\d+)")


@dataclass(frozen=True)
class Topology:
    """The processors (as the system numbers them) of each NUMA node, and the socket and core of each processor.

    Hyperthreads are processors that share a core. A system that tells nothing has one socket and one node.
    """

    nodes: Mapping[int, frozenset[int]]
    sockets: Mapping[int, int]
    cores: Mapping[int, tuple[int, int]]

    def core_of(self, processor: int) -> tuple[int, int]:
        """Socket and core; of a processor that is not known, one of its own."""
        return self.cores.get(processor, (-1, processor))

    def nodes_of(self, processors: Collection[int]) -> list[int]:
        """The NUMA nodes that some of these processors belong to."""
        return sorted(node for node, members in self.nodes.items() if members & set(processors))

    def sockets_of(self, processors: Collection[int]) -> list[int]:
        """The sockets that some of these processors belong to."""
        return sorted({self.sockets.get(processor, 0) for processor in processors})


def read_topology(root: Path = SYSTEM) -> Topology:
    """What the system says of this host."""
    nodes = {
        int(folder.name.removeprefix("node")): frozenset(processors_of(_read(folder / "cpulist")))
        for folder in (root / "node").glob("node[0-9]*")
    }
    sockets, cores = {}, {}
    for folder in (root / "cpu").glob("cpu[0-9]*"):
        socket, core = (_read(folder / "topology" / name) for name in ("physical_package_id", "core_id"))
        if socket and core:
            processor = int(folder.name.removeprefix("cpu"))
            sockets[processor] = int(socket)
            cores[processor] = int(socket), int(core)
    if not nodes:
        nodes = {0: frozenset(range(psutil.cpu_count() or 1))}
    return Topology(nodes, sockets, cores)


def processors_of(text: str) -> list[int]:
    """Read a list such as 0-3,8."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def bytes_by_node(address: int, maps: Path = Path("/proc/self/numa_maps")) -> dict[int, int]:
    """On which NUMA nodes the pages of the mapping with this address lie; empty if the system does not say."""
    found, nearest = "", -1
    for line in _read(maps).splitlines():
        start = int(line.partition(" ")[0], 16)
        if nearest < start <= address:
            found, nearest = line, start
    size = PAGE_SIZE.search(found)
    page = 1024 * int(size[1]) if size else 4096
    return {int(node): page * int(pages) for node, pages in PLACED.findall(found)}


def _read(path: Path) -> str:
    """A small file of the system's; nothing where it does not exist or may not be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
