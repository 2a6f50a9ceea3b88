"""`doctor`: what a run would get: MPI, hosts, cores, threads, instruction set, Slurm; with advice."""

import json
import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

from mpillama import __version__
from mpillama.cli.display import in_units, print_sentence, print_table
from mpillama.cli.options import DoctorOptions
from mpillama.comm.launcher import launched_size
from mpillama.engine.measure import read_bandwidths
from mpillama.job.host_memory import available_bytes
from mpillama.job.start import World, mpi_library, mpi_threads
from mpillama.kernels.isa import host_features, sets_of
from mpillama.kernels.library import is_built
from mpillama.kernels.target import Target
from mpillama.loading.placement import Placement, launch_advice, measured_place, placement_advice, processor_list
from mpillama.loading.session import choose_target

SLURM_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_NNODES",
    "SLURM_NTASKS",
    "SLURM_CPUS_PER_TASK",
    "SLURM_MEM_PER_NODE",
    "SLURM_JOB_END_TIME",
)


UNEVEN = 1.15
"""Bandwidths that differ by more than this are worth uneven shares."""


def doctor(options: DoctorOptions, world: World) -> int:
    """Print the report on rank 0; returns the exit status."""
    target = choose_target(world)
    ranks = world.comm.gather(_describe_rank(world, target))
    places = world.comm.gather(measured_place(world, target.team))
    if options.bandwidth:
        memory = world.comm.gather(world.neighbours.broadcast(available_bytes()) // world.neighbours.size)
        speeds = read_bandwidths(world.comm, target.team)
        for rank, speed, room in zip(ranks, speeds, memory, strict=True):
            rank |= {"read_bandwidth_bytes_per_second": speed, "memory_bytes": room}
    if world.comm.is_root:
        report = _report(world, ranks, places)
        sys.stdout.write(json.dumps(report, indent=2) + "\n") if options.json else _print(report)
    return 0


def _describe_rank(world: World, target: Target) -> dict[str, Any]:
    possible = [isa.name for isa in sets_of(host_features())]
    return {
        "rank": world.comm.rank,
        "host": os.uname().nodename,
        "cores": sorted(os.sched_getaffinity(0)),
        "cores_of_host": os.cpu_count() or 1,
        "threads": target.threads,
        "isa": target.isa.name,
        "isas": [name for name in possible if is_built(name)],
        "isas_not_built": [name for name in possible if not is_built(name)],
        "oversubscribed": world.comm.yields,
    }


def _report(world: World, ranks: list[dict[str, Any]], places: list[Placement]) -> dict[str, Any]:
    variable, launched = launched_size()
    report = {
        "mpillama": __version__,
        "python": platform.python_version(),
        "mpi": mpi_library(),
        "mpi_threads": mpi_threads(),
        "ranks": world.comm.size,
        "launched": {"variable": variable, "processes": launched},
        "slurm": {name: os.environ[name] for name in SLURM_VARIABLES if name in os.environ},
        "per_rank": [{**rank, **_as_json(place)} for rank, place in zip(ranks, places, strict=True)],
    }
    return {**report, "advice": [*advice(report), *placement_advice(places)]}


def _as_json(place: Placement) -> dict[str, Any]:
    return {
        "physical_cores": place.core_count,
        "sockets": place.sockets,
        "numa_nodes": place.nodes,
        "first_touch_bytes_per_numa_node": place.memory,
    }


def advice(report: dict[str, Any]) -> list[str]:
    """What should be changed, a sentence each; empty if all is well."""
    ranks, found = report["per_rank"], []
    if report["launched"]["processes"] > 1 and report["ranks"] == 1:
        found.append(
            f"{report['launched']['processes']} processes were launched, but MPI connects none of them: "
            "use `srun --mpi=pmi2`, or the mpirun of the MPI library named above."
        )
    found += _too_many_threads(ranks)
    if "Open MPI" in report["mpi"] and _fill_their_cores(ranks):
        found.append("Open MPI starts more ranks than cores only with `mpirun --map-by :OVERSUBSCRIBE`.")
    idle = sum(max(0, len(r["cores"]) - r["threads"]) for r in ranks if not _shares_cores(r, ranks))
    if idle:
        found.append(f"{idle} cores are not used: raise --threads.")
    if len({r["isa"] for r in ranks}) > 1:
        found.append("Hosts have different instruction sets: answers are the same, the slowest host sets the pace.")
    speeds = [r["read_bandwidth_bytes_per_second"] for r in ranks if "memory_bytes" in r]
    if speeds and max(speeds) > UNEVEN * min(speeds):
        found.append(
            f"The fastest rank reads memory {max(speeds) / min(speeds):.1f} times as fast as the slowest: save this "
            "report with --json and give it as --shares, so that each takes as much as it can."
        )
    if any(r["isa"] == "generic" for r in ranks):
        found.append("The generic kernels are slow: a processor with AVX2, AVX-512 or NEON is much faster.")
    if lacking := {name for r in ranks for name in r["isas_not_built"]}:
        found.append(f"{', '.join(sorted(lacking))}: not built, although a processor has it; a newer compiler would.")
    return found


def _too_many_threads(ranks: list[dict[str, Any]]) -> Iterator[str]:
    """Say so of the first host where threads have to share cores, and whether others are free there."""
    rank = next((r for r in ranks if r["oversubscribed"]), None)
    if rank is None:
        return
    cores = sorted({core for r in ranks if r["host"] == rank["host"] for core in r["cores"]})
    if len(cores) < rank["cores_of_host"]:
        yield (
            f"More threads than cores on host {rank['host']}, where ranks may use only {processor_list(cores)} of "
            f"{rank['cores_of_host']}: let the launcher give each rank cores of its own ({launch_advice('core')}), ask "
            "for more, or start fewer ranks."
        )
    else:
        yield "More threads than cores on a host: start fewer ranks or give fewer --threads."


def _fill_their_cores(ranks: list[dict[str, Any]]) -> bool:
    """Whether a host has no core for a further rank, and none has more ranks than cores already."""
    left = []
    for host in {r["host"] for r in ranks}:
        beside = [r for r in ranks if r["host"] == host]
        left.append(len({core for r in beside for core in r["cores"]}) - len(beside))
    return min(left) == 0


def _shares_cores(rank: dict[str, Any], ranks: list[dict[str, Any]]) -> bool:
    return any(r is not rank and r["host"] == rank["host"] and set(r["cores"]) & set(rank["cores"]) for r in ranks)


def _print(report: dict[str, Any]) -> None:
    facts = {key: str(report[key]) for key in ("mpillama", "python", "mpi", "mpi_threads", "ranks")}
    print_table((), list({**facts, **report["slurm"]}.items()))
    fields = ("rank", "host", "cores", "threads", "isa", "isas")
    ranks = [{**r, "cores": processor_list(r["cores"]), "isas": ", ".join(r["isas"])} for r in report["per_rank"]]
    header = ("rank", "host", "cores it may use", "threads", "instructions", "of those that work here")
    print_table(header, [[str(r[field]) for field in fields] for r in ranks])
    places = ("rank", "physical cores", "sockets", "NUMA nodes", "memory it touches first is on")
    print_table(places, [_places_row(r) for r in report["per_rank"]])
    if "memory_bytes" in report["per_rank"][0]:
        measured = ("rank", "reads memory at", "memory that it may take", "share of the bandwidth")
        print_table(measured, list(_measured_rows(report["per_rank"])))
    for sentence in report["advice"] or ["All is well."]:
        print_sentence(sentence)


def _measured_rows(ranks: list[dict[str, Any]]) -> Iterator[list[str]]:
    total = sum(r["read_bandwidth_bytes_per_second"] for r in ranks)
    for r in ranks:
        speed = r["read_bandwidth_bytes_per_second"]
        yield [str(r["rank"]), f"{speed / 1e9:.1f} GB/s", in_units(r["memory_bytes"]), f"{100 * speed / total:.1f} %"]


def _places_row(rank: dict[str, Any]) -> list[str]:
    memory = rank["first_touch_bytes_per_numa_node"]
    shares = [
        f"node {node}: {100 * size / sum(memory.values()):.0f} %" for node, size in sorted(memory.items()) if size
    ]
    lists = (processor_list(rank[name]) for name in ("sockets", "numa_nodes"))
    return [str(rank["rank"]), str(rank["physical_cores"]), *lists, ", ".join(shares) or "not told by this system"]
