"""Where the threads and memory of ranks are, and what is wrong with that: told by `doctor`, and before a model loads.

Slow placements give the same answers at a fraction of the speed, so nothing fails by itself.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mpillama.job.start import World, mpi_library
from mpillama.job.topology import Topology, bytes_by_node, read_topology
from mpillama.kernels.library import ANYWHERE, Team, thread_places
from mpillama.models.weights import Arena

TOUCHED_BYTES = 64 << 20
"""Memory by which first touch is checked."""
FAR_SHARE = 0.05
"""The share of a rank's memory that may lie on other nodes than its cores."""
Core = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """A rank's place on its host: the processors of its mask, the cores that threads are bound to, and where these lie.

    `core_count` counts its mask's cores, hyperthreads as one. `memory` is where the pages lie that its threads touched
    first, in bytes of each NUMA node: empty unless it was measured, or if the system does not say.
    """

    host: str
    processors: tuple[int, ...]
    threads: int
    bound: tuple[Core, ...]
    core_count: int
    sockets: tuple[int, ...]
    nodes: tuple[int, ...]
    memory: dict[int, int]

    @property
    def far_share(self) -> float:
        """The share of its memory that lies on nodes where it has no core."""
        total = sum(self.memory.values())
        return sum(size for node, size in self.memory.items() if node not in self.nodes) / total if total else 0.0


def place_of(host: str, threads: int, topology: Topology, memory: dict[int, int] | None = None) -> Placement:
    """This rank's place."""
    processors = tuple(sorted(os.sched_getaffinity(0)))
    bound = tuple(topology.core_of(place) for place in thread_places(threads) if place != ANYWHERE)
    return Placement(
        host,
        processors,
        threads,
        bound,
        len({topology.core_of(processor) for processor in processors}),
        tuple(topology.sockets_of(processors)),
        tuple(topology.nodes_of(processors)),
        memory or {},
    )


def first_touch(team: Team) -> dict[int, int]:
    """Where the pages lie that a rank's threads touch as those of weights: bytes of each NUMA node."""
    memory = Arena(TOUCHED_BYTES).take("u1", (TOUCHED_BYTES,))
    team.touch_pages(memory)
    return bytes_by_node(int(memory.ctypes.data))


def measured_place(world: World, team: Team) -> Placement:
    """This rank's place, and where the memory lies that its threads touch."""
    return place_of(world.host, team.threads, read_topology(), first_touch(team))


def warn_of_shared_cores(world: World, threads: int) -> None:
    """Rank 0 warns if threads of two ranks have one core, although others may be free; call it on all ranks."""
    mine = (world.comm.rank, place_of(world.host, threads, read_topology()))
    sentence = next(shared_cores(dict(world.neighbours.gather(mine))), None) if world.neighbours.size > 1 else None
    found = [each for each in world.comm.gather(sentence if world.neighbours.is_root else None) if each is not None]
    if found and world.comm.is_root:
        others = f" So it is on {len(found) - 1} more." if found[1:] else ""
        logging.getLogger(__name__).warning("%s%s", found[0], others, extra={"of_run": True})


# -- sentences ------------------------------------------------------------------------------------------------------


def shared_cores(places: Mapping[int, Placement]) -> Iterator[str]:
    """Say which ranks of a host share cores: through OpenMP's variables, or through masks that are too small for them.

    `places` are those of one host, by rank.
    """
    ranks_on: dict[Core, list[int]] = defaultdict(list)
    for rank, place in places.items():
        for core in dict.fromkeys(place.bound):
            ranks_on[core].append(rank)
    for core, ranks in sorted(ranks_on.items()):
        if len(ranks) > 1:
            yield (
                f"Threads of ranks {ranks[0]} and {ranks[1]} on host {places[ranks[0]].host} are bound to the same "
                f"core ({core[1]}) by {_binding_variables()}, which can halve the speed: unset it, or let the launcher "
                f"give each rank cores of its own ({launch_advice('core')})."
            )
    everywhere = {processor for place in places.values() for processor in place.processors}
    for mask in dict.fromkeys(place.processors for place in places.values()):
        inside = {rank: place.threads for rank, place in places.items() if set(place.processors) <= set(mask)}
        if len(inside) > 1 and sum(inside.values()) > len(mask) < len(everywhere):
            first, second = sorted(inside)[:2]
            yield (
                f"Ranks {first} and {second} on host {places[first].host} are bound to the same processors "
                f"({processor_list(mask)}), fewer than their {sum(inside.values())} threads, though the host has more: "
                f"let the launcher give each rank cores of its own ({launch_advice('core')})."
            )


def placement_advice(places: Sequence[Placement]) -> list[str]:
    """What should be changed about the places of all ranks: a sentence for the first of each kind."""
    hosts: dict[str, dict[int, Placement]] = defaultdict(dict)
    for rank, place in enumerate(places):
        hosts[place.host][rank] = place
    found = [sentence for mates in hosts.values() for sentence in shared_cores(mates)][:1]
    for rank, place in enumerate(places):
        if len(place.sockets) > 1:
            found.append(
                f"The cores of rank {rank} on host {place.host} are on {len(place.sockets)} sockets, and its threads "
                f"read weights through the link between them: start one rank a socket ({launch_advice('socket')})."
            )
            break
    for rank, place in enumerate(places):
        if place.far_share > FAR_SHARE:
            found.append(
                f"{100 * place.far_share:.0f} % of what rank {rank} on host {place.host} touches first lies on other "
                "NUMA nodes than its cores: start it without numactl's --interleave or --membind, free memory there."
            )
            break
    return found


def launch_advice(unit: str) -> str:
    """How this job's launcher binds ranks to sockets, or each to cores of its own."""
    library = mpi_library()
    if "SLURM_JOB_ID" in os.environ and "OMPI_COMM_WORLD_SIZE" not in os.environ:
        return "srun --ntasks-per-socket=1 --cpu-bind=sockets" if unit == "socket" else "srun --cpu-bind=cores"
    if "Open MPI" in library:
        where = "ppr:1:package" if unit == "socket" else "slot:PE=THREADS"
        return f"mpirun --map-by {where} --bind-to {'package' if unit == 'socket' else 'core'}"
    if "Intel" in library:
        return "I_MPI_PIN_DOMAIN=socket" if unit == "socket" else "I_MPI_PIN_DOMAIN=auto"
    return "mpirun -bind-to socket" if unit == "socket" else "mpirun -bind-to core:THREADS"


def _binding_variables() -> str:
    """Those of OpenMP's variables that are set."""
    names = ("OMP_PROC_BIND", "OMP_PLACES")
    return " and ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name)) or "OMP_PLACES"


def processor_list(processors: Sequence[int]) -> str:
    """Numbers as the taskset command writes them: 0-3,8."""
    parts: list[list[int]] = []
    for number in processors:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, p)) for p in parts)
