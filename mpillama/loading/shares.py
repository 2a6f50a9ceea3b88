"""How much of a model each rank takes: evenly, as told, or by what `doctor --bandwidth` measured of unequal hosts.

Answers do not depend on it: units are dealt out, and no sum knows whose they are.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mpillama.errors import UserError
from mpillama.loading.memory import RESERVE, MemoryModel
from mpillama.models.cache import blocks_for, cache_bytes
from mpillama.models.config import ModelConfig
from mpillama.models.partition import Division
from mpillama.models.weights import slice_bytes

NUMBERS = re.compile(r"\s*[0-9.]+\s*(,\s*[0-9.]+\s*)*")
PYTHON_ROOM = 110_000_000
"""Bytes of a rank that is not loaded yet, but for a tokenizer."""


@dataclass(frozen=True)
class Measured:
    """A rank as `doctor --bandwidth --json` found it: bytes per second that it reads, and memory that it may take."""

    host: str
    bandwidth: float
    memory: int


def read_shares(text: str) -> tuple[float, ...] | list[Measured]:
    """What --shares says: a number for each rank, or a file that `doctor --bandwidth --json` wrote; else UserError."""
    if NUMBERS.fullmatch(text):
        try:
            numbers = tuple(float(part) for part in text.split(","))
        except ValueError as error:
            raise UserError(f"--shares {text}: is no list of numbers like 3,3,1.") from error
        if not any(numbers):
            raise UserError(f"--shares {text}: some rank must take more than 0.")
        return numbers
    try:
        ranks = json.loads(Path(text).read_text())["per_rank"]
        return [
            Measured(str(r["host"]), float(r["read_bandwidth_bytes_per_second"]), int(r["memory_bytes"])) for r in ranks
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--shares {text}: is neither a list of numbers like 3,3,1 nor the output of "
            f"`doctor --bandwidth --json` ({type(error).__name__}: {error})."
        ) from error


def on_these_hosts(measured: Sequence[Measured], hosts: Sequence[str], path: str) -> list[Measured]:
    """What was measured of each rank's host, in whichever order hosts are in this job; UserError if one is missing."""
    left, found = list(measured), []
    for rank, host in enumerate(hosts):
        of_host = next((m for m in left if m.host == host), None)
        if of_host is None:
            raise UserError(
                f"--shares {path}: has no measurement for rank {rank} on {host}: measure the ranks of this job with "
                "`doctor --bandwidth --json`."
            )
        left.remove(of_host)
        found.append(of_host)
    return found


def divide(ranks: int, stages: int, shares: tuple[float, ...] | None, layers: int) -> Division:
    """Check that so many ranks can divide a model so."""
    if ranks % stages:
        raise UserError(f"--pipeline is {stages}: {ranks} ranks do not divide into groups of equal size.")
    if stages > layers:
        raise UserError(f"--pipeline is {stages}: this model has only {layers} layers.")
    if shares is not None and len(shares) != ranks:
        raise UserError(f"--shares has {len(shares)} numbers: give one for each of the {ranks} ranks.")
    division = Division(ranks, shares, stages)
    for first in range(0, ranks, division.group) if shares else ():
        if not any(shares[first : first + division.group] if shares else ()):
            raise UserError(f"--shares: ranks {first} to {first + division.group - 1}, a stage, take nothing at all.")
    return division


def repeats_cache(config: ModelConfig, division: Division) -> bool:
    """Whether several ranks hold the same part of the cache, and could divide it by positions."""
    if not config.divides_positions:
        return False
    parts, whole = config.partition(division), config.partition(1)[0]
    return sum(cache_bytes(config, part, 1, "f32") for part in parts) > cache_bytes(config, whole, 1, "f32")


def by_positions(division: Division, config: ModelConfig) -> Division:
    """The same with positions divided over ranks; UserError if no two ranks would hold the same part of the cache."""
    if not config.divides_positions:
        raise UserError(
            "--context-parallel: this model's layers choose among all positions (an indexer), so that every rank must "
            "hold the cache of all of them: leave it out."
        )
    if not repeats_cache(config, division):
        raise UserError(
            f"--context-parallel divides what several ranks hold of the KV cache, but of {division.ranks} (--pipeline "
            f"{division.stages}) no two hold the same part of this model's: leave it out."
        )
    return replace(division, context_parallel=True)


def balanced(speeds: Sequence[float], rooms: Sequence[float], need: float) -> tuple[float, ...]:
    """Deal out `need` in proportion to speeds, none more than its room; if there is too little room, all of it."""
    if need >= sum(rooms):
        return tuple(max(0.0, room) for room in rooms)
    shares, open_, left = [0.0] * len(speeds), [i for i, room in enumerate(rooms) if room > 0], need
    while open_:
        total = sum(speeds[i] for i in open_)
        full = [i for i in open_ if left * speeds[i] / total > rooms[i]]
        if not full:
            for i in open_:
                shares[i] = left * speeds[i] / total
            break
        for i in full:
            shares[i] = rooms[i]
        left, open_ = left - sum(rooms[i] for i in full), [i for i in open_ if i not in full]
    return tuple(shares)


def measured_division(measured: Sequence[Measured], model: MemoryModel, context: int) -> Division:
    """Shares by bandwidth, limited by memory: of each stage by itself. `model` has ranks and stages."""
    even, config = model.division, model.config
    whole = config.partition(1)[0]
    cache = model.sequences * cache_bytes(config, whole, blocks_for(context), model.kv_type)
    need = (slice_bytes(model.specs, whole) + cache) / even.stages
    shares: list[float] = []
    fixed = [RESERVE + PYTHON_ROOM + rank.buffers + rank.tokenizer for rank in model.of_ranks(0)]
    rooms = [m.memory - taken for m, taken in zip(measured, fixed, strict=True)]
    for first in range(0, even.ranks, even.group):
        mates = slice(first, first + even.group)
        shares += balanced([m.bandwidth for m in measured[mates]], rooms[mates], need)
    total = sum(shares)
    if not total > 0:
        raise UserError("--shares: no host has memory left for a part of this model.")
    found = divide(even.ranks, even.stages, tuple(share / total for share in shares), config.most_stages)
    return replace(found, context_parallel=even.context_parallel)


def gain_of(model: MemoryModel, division: Division, measured: Sequence[Measured]) -> float:
    """How much faster all weights are read once if ranks divide them so, and not as `model` does."""
    return _seconds_of_reading(model, measured) / _seconds_of_reading(replace(model, division=division), measured)


def _seconds_of_reading(model: MemoryModel, measured: Sequence[Measured]) -> float:
    """What the slowest rank of each stage takes to read its weights once, for all stages one after the other."""
    division = model.division
    sizes = [slice_bytes(model.specs, part) for part in model.config.partition(division)]
    seconds = [size / m.bandwidth for size, m in zip(sizes, measured, strict=True)]
    return sum(max(seconds[i : i + division.group]) for i in range(0, division.ranks, division.group))
