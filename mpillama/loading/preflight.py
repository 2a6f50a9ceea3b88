"""Before anything is allocated: does what each rank needs fit its host, and which context fits if none is given."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from mpillama.engine.cache_folder import MOST_PENDING
from mpillama.errors import UserError
from mpillama.job.host_memory import available_bytes, memory_warnings, process_room
from mpillama.job.start import World
from mpillama.loading.memory import RESERVE, MemoryModel
from mpillama.loading.model_file import ModelFile
from mpillama.loading.settings import DiskCacheSettings, ModelSettings
from mpillama.models.attention import BLOCK_POSITIONS
from mpillama.models.cache import held_blocks, held_positions, state_bytes
from mpillama.models.partition import Division

PROGRAM_ROOM = 128_000_000
"""Bytes that a process must be free to map before it loads a model: the demo takes 40 MB, mostly stacks of threads."""


def refuse_no_room(force: bool) -> None:
    """UserError if a limit of this process leaves too little for what a run maps besides the model."""
    room = process_room()
    if room < PROGRAM_ROOM and not force:
        raise UserError(
            f"a process may take only {room / 1e6:.0f} MB more (ulimit -v), but threads and tables alone need "
            f"{PROGRAM_ROOM / 1e6:.0f} MB: raise the limit (--force tries all the same)."
        )


@dataclass(frozen=True)
class Host:
    """A host's ranks together: bytes without a KV cache, bytes for each block that each holds, and what there is.

    `states` is what recurrent states take of `fixed`; positions are divided over `holders` ranks.
    """

    name: str
    fixed: int
    per_block: int
    available: int
    states: int = 0
    holders: int = 1

    def need(self, context: int) -> int:
        """Bytes for a context."""
        return self.fixed + held_blocks(context, self.holders) * self.per_block

    @property
    def longest_context(self) -> int:
        """The most positions that fit, in whole cache blocks; negative if the weights alone do not."""
        room = self.available - self.fixed
        if not self.per_block:
            return 1 << 40 if room >= 0 else -1
        return held_positions(room // self.per_block, self.holders) if room >= 0 else -1


@dataclass(frozen=True)
class Needs:
    """Bytes that a rank takes for a model: without a KV cache, for each 64 positions of it; `states` are of `fixed`."""

    fixed: int = 0
    per_block: int = 0
    states: int = 0

    def __add__(self, other: "Needs") -> "Needs":
        return Needs(self.fixed + other.fixed, self.per_block + other.per_block, self.states + other.states)

    def for_all_blocks(self, holders: int) -> "Needs":
        """What it is beside a model whose blocks are divided over so many ranks, if it has all of them itself."""
        return Needs(self.fixed, self.per_block * holders, self.states)


def rank_needs(
    file: ModelFile, world: World, settings: ModelSettings, chunk: int, division: Division, rank: int | None = None
) -> Needs:
    """What this rank (or another one of its group) takes if ranks share a model so."""
    model = MemoryModel(
        file.config, file.specs, division, settings.kv_type, chunk, states=settings.state_slots, threads=world.threads
    )
    rank = world.comm.rank % division.ranks if rank is None else rank
    part = file.config.partition(division)[rank]
    without_cache = model.of_rank(rank, part, context=0)
    longest = settings.max_seq_len or file.config.max_position_embeddings
    scratch = model.scratch(part, longest) - model.scratch(part, 0)
    per_block = model.cache_block_bytes(part)
    pending = pending_bytes(settings, max(per_block, state_bytes(file.config, part, 1)))
    return Needs(without_cache.to_allocate + scratch + pending, per_block, without_cache.states)


def pending_bytes(settings: ModelSettings, largest: int) -> int:
    """The most that waits to be written to --cache-dir, where the `largest` thing has so many bytes."""
    keeps = isinstance(settings, DiskCacheSettings) and settings.cache_folder is not None
    return MOST_PENDING + largest if keeps else 0


def measure_host(world: World, rank: Needs, holders: int = 1) -> Host:
    """What the ranks of this host need together and have, from what this rank needs; the same on each of them.

    Positions are divided over `holders` ranks.
    """
    needs = rank.fixed + RESERVE, rank.per_block, rank.states
    rooms = world.neighbours.gather(process_room())
    narrowest = min(rooms) * len(rooms)  # a limit on each process binds the fullest
    available = min(world.neighbours.broadcast(available_bytes()), narrowest)
    fixed, per_block, states = map(sum, zip(*world.neighbours.gather(needs), strict=True))
    return Host(world.host, fixed, per_block, available, states, holders)


def choose_context(file: ModelFile, world: World, wanted: int | None, host: Host, force: bool) -> int:
    """The context of the run: as wanted, or the model's own, lowered to what fits every host.

    UserError on all ranks, naming the host, if what is wanted (or the weights alone) cannot fit; `force` overrides.
    """
    hosts = world.comm.gather(host)
    known = file.config.max_position_embeddings
    tightest = min(hosts, key=lambda h: h.longest_context)
    if force or tightest.longest_context >= (known if wanted is None else wanted):
        return known if wanted is None else wanted
    if wanted is None and tightest.longest_context >= BLOCK_POSITIONS:
        return tightest.longest_context
    context = BLOCK_POSITIONS if wanted is None else wanted
    raise UserError(
        f"{file.path}: the ranks on host {tightest.name} need {tightest.need(context) / 1e9:.1f} GB for a context of "
        f"{context} tokens{_states(tightest)}, but it has {tightest.available / 1e9:.1f} GB: "
        f"{_remedy(tightest, wanted)} "
        "(`mpillama plan` shows what fits; --force tries all the same)."
    )


def cache_room(world: World, host: Host) -> int:
    """Cache blocks that every host has room for, a tenth of its memory left; the same on all ranks."""
    hosts = world.comm.gather(host)
    rooms = [int(0.9 * h.available - h.fixed) // h.per_block * h.holders for h in hosts if h.per_block]
    return max(0, min(rooms, default=0))


def smallest_group(
    file: ModelFile, world: World, settings: ModelSettings, context: int, beside: Callable[[int], Needs]
) -> int:
    """The fewest ranks that can share a model so that all ranks are in groups of that size and every host has room.

    `beside(ranks)` is what this rank needs besides in groups of so many.
    """
    size, stages = world.comm.size, settings.pipeline
    for ranks in [n for n in range(stages, size, stages) if size % n == 0]:
        division = Division(ranks, None, stages, settings.context_parallel)
        needs = rank_needs(file, world, settings, settings.prefill_chunk, division)
        needs += beside(ranks).for_all_blocks(division.holders)
        hosts = world.comm.gather(measure_host(world, needs, division.holders))
        if all(host.need(context) <= 0.9 * host.available for host in hosts):
            return ranks
    return size


def _states(host: Host) -> str:
    """What the sentence says of recurrent states."""
    return f" and {host.states / 1e9:.1f} GB of recurrent states (fewer sequences take less)" if host.states else ""


def _remedy(host: Host, wanted: int | None) -> str:
    longest = host.longest_context
    if wanted is not None and longest >= BLOCK_POSITIONS:
        return f"--max-seq-len {longest} fits, or take --kv-type q8, smaller weights or more nodes"
    return "take smaller weights (--weights q4_0, or a file converted so) or more nodes"


def warn_of_hosts(world: World) -> None:
    """Rank 0 warns, once for each kind, of what makes hosts' memory slower or smaller; call it on all ranks."""
    warnings = memory_warnings(int(psutil.swap_memory().used)) if world.neighbours.is_root else {}
    hosts = world.comm.gather((world.host, warnings))
    if not world.comm.is_root:
        return
    for kind in sorted({kind for _, found in hosts for kind in found}):
        named = [(host, found[kind]) for host, found in hosts if kind in found]
        others = f" (and on {len(named) - 1} more)" if len(named) > 1 else ""
        logging.getLogger(__name__).warning("on host %s%s %s", named[0][0], others, named[0][1], extra={"of_run": True})
