"""Which ranks hold a draft model if the user does not say: both ways are tried while loading, the faster one stays."""

import logging
import time
from collections import deque
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from mpillama.comm.launcher import launched_here
from mpillama.engine.executor import Executor, Segment
from mpillama.engine.mtp import MtpExecutor
from mpillama.errors import UserError
from mpillama.job.host_memory import available_bytes, process_room
from mpillama.job.start import World
from mpillama.kernels.target import Target
from mpillama.loading.draft import Draft, Progress, draft_bytes_of_ranks, load_draft
from mpillama.text.sampler import wanted_of
from mpillama.text.sampling_params import SamplingParams

LOG = logging.getLogger(__name__)
MOST_GUESSES = 16
ROUNDS = 9
"""How often guesses are timed; their median counts."""
WARM_UP = 2
"""Rounds before, in which memory is allocated and read for the first time."""
TRIAL_SECONDS = 1.0
"""No more rounds once so much time has passed: one at least counts, be it the first of all."""


@dataclass(frozen=True)
class PlacedDraft:
    """A draft model on the ranks that hold it; no `executor` on the others."""

    draft: Draft
    executor: Executor | None


def place_draft(
    draft: Draft, world: World, target: Target, main: Executor, guesses: int, progress: Progress
) -> PlacedDraft:
    """Load a draft model on all ranks or on rank 0 alone, as the user wants or so many guesses take less time.

    Answers are the same. Call it on all ranks, before anything else runs on `main`.
    """

    def load(alone: bool) -> PlacedDraft:
        chosen = replace(draft, alone=alone)
        return PlacedDraft(chosen, load_draft(chosen, world, target, main, progress))

    if not draft.chosen_by_trial or world.comm.size == 1:
        return load(draft.alone)
    divided = load(False)
    reason = world.comm.on_root(lambda: _reason_against_trial(divided, main, world.comm.size))
    reason = reason or _lack_of_memory(draft, world, main)
    if reason:
        LOG.info("all ranks divide the draft model: %s.", reason)
        return divided
    try:
        alone = load(True)
    except UserError as error:  # on all ranks
        LOG.info("all ranks divide the draft model: rank 0 alone cannot hold it: %s", error)
        return divided
    guesses = min(guesses, MOST_GUESSES, main.max_seq_len)
    of_all, of_first = world.comm.broadcast([_seconds(main, each.executor, guesses) for each in (divided, alone)])
    chosen, other = (alone, divided) if of_first < of_all else (divided, alone)
    LOG.info(
        "%s the draft model: %d guesses took %.2f ms on all ranks, %.2f ms on rank 0.",
        "rank 0 alone has" if chosen is alone else "all ranks divide", guesses, 1e3 * of_all, 1e3 * of_first,
    )  # fmt: skip
    if other.executor is not None:
        other.executor.comm.free_sums()
    return chosen


def _reason_against_trial(divided: PlacedDraft, main: Executor, ranks: int) -> str:
    """Why rank 0 need not try to guess alone; empty if it shall."""
    assert divided.executor is not None
    guess = ranks * divided.executor.model.weights.bytes_per_step()
    step = main.model.weights.bytes_per_step()
    if guess < step:
        return ""
    return f"for a guess rank 0 alone would read {guess / 1e9:.3g} GB, more than the {step / 1e9:.3g} GB of a step"


def _lack_of_memory(draft: Draft, world: World, main: Executor) -> str:
    """Why rank 0 cannot hold the draft model beside its part of it for a while; empty if it can. The same on all ranks.

    Caches take their memory when they are written, so they are counted as if they were full. Other groups of ranks on
    rank 0's host have promised as much, and may try at the same time: each has its share of what is left.
    """
    promised = sum(array.nbytes for layer in main.cache.layers for array in layer)
    caches = world.neighbours.gather(promised)
    groups = -(-max(launched_here(), world.neighbours.size) // world.neighbours.size)
    free = min(available_bytes() // groups - sum(caches), process_room()) if world.comm.is_root else 0
    ways = (replace(draft, alone=alone) for alone in (False, True))
    needed = sum(draft_bytes_of_ranks(way, main, world.comm.size)[0] for way in ways)

    def reason() -> str:
        if needed < 0.9 * free:
            return ""
        return f"rank 0 has {max(0, free) / 1e9:.3g} GB left, too little to try with {needed / 1e9:.3g} GB more"

    return world.comm.on_root(reason)


def _seconds(main: Executor, draft: Executor | None, guesses: int) -> float:
    """Seconds that so many guesses in one sequence take, on rank 0; ranks that hold the draft model compute along."""
    if draft is None:
        return 0.0
    shared = draft.comm.size > 1
    if isinstance(draft, MtpExecutor):  # guesses begin with a hidden state of the model, which has none yet
        main.model.workspace.residual(0, 1)[:] = 0
    if not main.comm.is_root:
        main.draft = draft
        main.follow()
        main.draft = None
        return 0.0
    times: list[float] = []
    begin = time.perf_counter()
    while not times or (len(times) < WARM_UP + ROUNDS and time.perf_counter() - begin < TRIAL_SECONDS):
        start = time.perf_counter()
        if shared:
            main.begin_drafts()
        _guess(main, draft, guesses)
        if shared:
            draft.end(0)
        times.append(time.perf_counter() - start)
    if shared:
        main.end(0)
    draft.model.forget_costs()
    return median(times[WARM_UP:] or times[-1:])


def _guess(main: Executor, draft: Executor, guesses: int) -> None:
    """Run the steps of guesses; what they write to the cache is overwritten before it is read."""
    wanted = wanted_of(SamplingParams(), draft.model.config.vocab_size)
    for place in range(guesses):
        if isinstance(draft, MtpExecutor):
            draft.rows[0] = 0 if place == 0 else -1  # then the row of the guess before
        segment = Segment(0, place, np.zeros(1, np.int64), 1, wanted=wanted)
        deque(draft.forward_in_pieces([segment]), maxlen=0)
        main.get_on()  # alone it enters no wait, in which it would answer those that wait for it
