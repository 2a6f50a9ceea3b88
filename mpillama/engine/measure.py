"""Timing steps of a model: all ranks do the same, the slowest one counts."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np

from mpillama.comm.communicator import Communicator, sample_addends
from mpillama.comm.pipeline import Pipeline
from mpillama.comm.ways import Traffic
from mpillama.engine.executor import StepPlan
from mpillama.engine.skew import RankTimes, skew_of, timed_layers
from mpillama.engine.step_parts import TRIES, StepParts
from mpillama.kernels.library import PARTS, Team
from mpillama.models.cache import (
    KVCache,
    Step,
    cache_read_bytes,
    dealt_blocks,
    decode_step,
    held_blocks,
    single_sequence_step,
    state_bytes,
)
from mpillama.models.decoder import Decoder
from mpillama.models.partition import split_units, steps_at_once
from mpillama.text.sampler import wanted_of
from mpillama.text.sampling_params import SamplingParams

WARM_UP_STEPS = 3
Run = Callable[[int], None]
"""Runs a step or more, in so many parts."""
BANDWIDTH_BYTES = 512 << 20
"""Memory read to measure the bandwidth: much more than any cache."""


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated steps on the slowest rank, and this rank's own work, communication and messages in them."""

    seconds: np.ndarray
    communication_seconds: float
    all_reduces: int
    own_seconds: float
    sent: Traffic
    reduce_seconds: float
    """Of these in sums over ranks, waiting included."""
    parts: int
    """In how many the steps went, so that the sums of one travel while others are computed."""
    tried: dict[int, float]
    """Tokens/s on this rank of the steps by which that was chosen, if it was."""

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def communication_share(self) -> float:
        """Share of the time in collectives on this rank."""
        return self.communication_seconds / max(float(self.seconds.sum()), 1e-12)

    @property
    def all_reduce_microseconds(self) -> float:
        """Mean time of a collective on this rank, waiting included."""
        return 1e6 * self.reduce_seconds / self.all_reduces if self.all_reduces else 0.0


@dataclass
class Ahead:
    """Rank 0 tells of steps as an engine does: of one for each stage before it runs the first of them."""

    pipeline: Pipeline
    message: np.ndarray
    left: int = 0
    """Steps that were not told yet."""

    def begin(self, steps: int) -> None:
        """So many are to come, and none is under way."""
        self.left = steps
        for _ in range(self.pipeline.stages):
            self.tell()

    def tell(self) -> None:
        """On rank 0 tell of another step, if one is to come."""
        if self.left and self.pipeline.comm.is_root:
            self.left -= 1
            self.pipeline.issue(self.message)

    def hear(self) -> None:
        """Wait for the next step, which counts as a wait for other stages."""
        start = time.perf_counter()
        self.pipeline.take(self.message)
        self.pipeline.seconds += time.perf_counter() - start


class Stopwatch:
    """Measures a model with a cache of its own."""

    def __init__(self, model: Decoder, positions: int, sequences: int, kv_type: str, prefill_chunk: int):
        self.model = model
        self.comm: Communicator = model.all_ranks
        self.kv_type = kv_type
        self.prefill_chunk = prefill_chunk
        holders = model.part.holders
        blocks = held_blocks(positions, holders) * holders
        self.cache = KVCache(model.config, model.part, blocks * sequences, kv_type, sequences)
        self.tables = dealt_blocks(sequences, positions, holders)
        plan = StepPlan(max(prefill_chunk, sequences), sequences, positions)
        self.ahead = Ahead(model.pipeline, plan.buffer) if model.pipeline else None
        self.wanted = wanted_of(SamplingParams(), model.config.vocab_size)
        self.wants_parts = False
        self.parts = np.zeros(len(PARTS))
        """Seconds of the main thread in the timed steps, by kernels.library.PARTS, if `wants_parts`."""
        self.sums = np.zeros((0, len(model.layers)))
        """Seconds in the sums over ranks of each timed step and layer, if `wants_parts`."""
        self.step_parts = StepParts(model.most_parts)

    def prefill(self, tokens: int, repetitions: int) -> Timing:
        """Time a prompt of this many tokens from an empty cache, logits for its last token."""
        ids = np.arange(tokens) % self.model.config.vocab_size

        def run(parts: int) -> None:
            for first in range(0, tokens, self.prefill_chunk):
                chunk = ids[first : first + self.prefill_chunk]
                is_last = first + len(chunk) == tokens
                step = single_sequence_step(chunk, first, self.tables[0], int(is_last))
                self.model.advance(step, self.cache, min(parts, self.model.most_parts(len(chunk))))
                self.model.logits(step.logit_rows)

        return self._time([run] * repetitions, 1, min(tokens, self.prefill_chunk))

    def at_once(self, sequences: int) -> int:
        """In how many steps under way at the same time each of so many sequences gets its token."""
        return steps_at_once(sequences, self.ahead.pipeline.stages) if self.ahead and not self.wants_parts else 1

    def decode(self, sequences: int, context: int, steps: int) -> Timing:
        """Time steps of one token of each sequence, the first at position `context`.

        In a pipeline it is as in an engine: each stage has a part of the sequences.
        """
        if self.ahead is not None and self.at_once(sequences) > 1:
            return self._decode_ahead(self.ahead, sequences, context, steps)
        ids = np.arange(sequences) % self.model.config.vocab_size

        def step(i: int) -> Run:
            plan = decode_step(ids, np.full(sequences, context + i), self.tables[:sequences])
            return lambda parts: self._discard(plan, parts)

        return self._time([step(i) for i in range(steps)], WARM_UP_STEPS, sequences)

    def _decode_ahead(self, ahead: Ahead, sequences: int, context: int, steps: int) -> Timing:
        ids = np.arange(sequences) % self.model.config.vocab_size
        groups = split_units(sequences, self.at_once(sequences))

        def step(i: int) -> Run:
            plans = [
                decode_step(ids[g.start : g.stop], np.full(len(g), context + i), self.tables[g.start : g.stop])
                for g in groups
            ]

            def run(parts: int) -> None:
                for plan in plans:
                    ahead.hear()
                    self._discard(plan, parts, max(1, self.model.micro_batches(len(plan.token_ids)) // len(groups)))
                    ahead.tell()

            return run

        return self._time([step(i) for i in range(steps)], WARM_UP_STEPS, len(groups[0]), len(groups))

    def _discard(self, plan: Step, parts: int, micro: int | None = None) -> None:
        self.model.advance(plan, self.cache, parts, micro)
        self.model.wanted_logits(plan.logit_rows, [self.wanted] * len(plan.logit_rows))

    def _time(self, runs: list[Run], warm_up: int, tokens: int, ahead: int = 0) -> Timing:
        """Time runs of steps of `tokens` tokens, after some more, in which it is chosen in how many parts they go.

        If a run has steps that are told `ahead`, each begins before the one before has ended on all ranks.
        """
        parts = self._choose_parts(runs[0], tokens, ahead)
        tried = self.step_parts.tried(tokens)
        self._begin(ahead * len(runs[:warm_up]))
        for run in runs[:warm_up]:
            run(parts)
        self.model.forget_costs()
        seconds: list[float] = []
        team = self.model.team
        if self.wants_parts:
            team.watch(True)
            self.sums = np.zeros((len(runs), len(self.model.layers)))
        self.comm.barrier()
        self._begin(ahead * len(runs))
        for number, run in enumerate(runs):
            with timed_layers(self.model, self.sums[number]) if self.wants_parts else nullcontext():
                if not ahead:
                    self.comm.barrier()
                start = time.perf_counter()
                run(parts)
                seconds.append(time.perf_counter() - start)
        if self.wants_parts:
            self.parts = team.times()[0]
            team.watch(False)
        sent = replace(self.model.sent)
        slowest = np.max(self.comm.gather(seconds), axis=0)
        communication, comm = self.model.communication_seconds, self.model.comm
        return Timing(
            slowest, communication, comm.calls, sum(seconds) - communication, sent, comm.seconds, parts, tried
        )

    def _begin(self, steps: int) -> None:
        if steps and self.ahead is not None:
            self.ahead.begin(steps)

    def _choose_parts(self, run: Run, tokens: int, ahead: int) -> int:
        """As the engine chooses, by rank 0's times; in one where each layer's time is wanted."""
        if self.wants_parts or self.comm.broadcast(self.model.most_parts(tokens)) == 1:
            return 1
        for _ in range(2 * (TRIES + 1)):
            parts = self.comm.broadcast(self.step_parts.choose(tokens))
            self.comm.barrier()
            self._begin(ahead)
            start = time.perf_counter()
            run(parts)
            self.step_parts.note(tokens, parts, time.perf_counter() - start)
        return self.comm.broadcast(self.step_parts.choose(tokens))

    def kv_bytes(self, sequences: int, context: int) -> int:
        """Bytes of keys, values and states that this rank reads in a step at position `context`."""
        config, part = self.model.config, self.model.part
        read = cache_read_bytes(config, part, context + 1, self.kv_type) * sequences
        return read + state_bytes(config, part, sequences)


def read_bandwidths(comm: Communicator, team: Team, repetitions: int = 7) -> list[float]:
    """Bytes per second that each rank reads from memory while all others read, too; medians of the repetitions."""
    seconds, size = _seconds_of_reading(comm, team, repetitions)
    return [size / float(np.median(own)) for own in comm.gather(seconds)]


def read_bandwidth(comm: Communicator, team: Team, repetitions: int = 7) -> float:
    """Bytes per second that all ranks together read from memory, all at the same time; median of the repetitions."""
    seconds, size = _seconds_of_reading(comm, team, repetitions)
    slowest = np.max(comm.gather(seconds), axis=0)
    return comm.size * size / float(np.median(slowest))


def _seconds_of_reading(comm: Communicator, team: Team, repetitions: int) -> tuple[list[float], int]:
    """This rank's seconds of each repetition, and the bytes that it read each time."""
    data, results = np.ones(BANDWIDTH_BYTES, np.uint8), np.zeros(team.threads, np.int64)
    seconds, size = [], 0
    for _ in range(repetitions + 1):
        comm.barrier()
        start = time.perf_counter()
        size = team.read_memory(data, results)
        seconds.append(time.perf_counter() - start)
    return seconds[1:], size


# -- Where the time of a step goes, part by part, on a rank's main thread: it takes part in everything ----------------


SUM, LATE, REST = "residual and sum over ranks", "waiting for other ranks", "Python and the rest"


@dataclass(frozen=True)
class Part:
    """One part of a step: seconds, and the bytes of weights that it reads on this rank."""

    name: str
    seconds: float
    bytes: int


def where_time_goes(
    watch: Stopwatch, run: Callable[[], Timing], tokens: int, host: str = ""
) -> tuple[list[Part], list[RankTimes]]:
    """The parts of a step of `tokens` tokens: means over the steps that `run` times. Every rank must call it.

    The parts are this rank's own, and add up to its step; the times are those of all ranks.
    """
    watch.wants_parts = True
    try:
        timing = run()
    finally:
        watch.wants_parts = False
    steps = len(timing.seconds)
    parts = dict(zip(PARTS, (watch.parts / steps).tolist(), strict=True))
    communication = timing.communication_seconds / steps
    outside = max(0.0, communication - parts[LATE])  # what is not in the kernels' regions
    reduction = min(outside, _sums_alone(watch, tokens))
    parts[SUM] += reduction
    parts[LATE] += outside - reduction
    parts[REST] = max(0.0, timing.own_seconds / steps + communication - sum(parts.values()))
    own = timing.own_seconds / steps
    layers, pipeline = watch.model.part.layers, watch.model.pipeline
    stage_wait = pipeline.seconds / steps if pipeline else 0.0
    mine = RankTimes(watch.comm.rank, host, own, parts, watch.sums, layers.start if layers else 0, stage_wait)
    wire = skew_of(watch.comm.gather(mine)).wire[watch.comm.rank]
    if watch.model.comm.shared_for(tokens * watch.model.config.padded_hidden_size) is None:
        wire = max(0.0, wire - reduction)
    wire = min(wire, parts[LATE])  # kernels that wait for a sum cannot tell late ranks from the network
    parts[LATE] -= wire
    parts[SUM] += wire
    sizes = _bytes(watch.model, tokens)
    found = [Part(name, seconds, sizes.get(name, 0)) for name, seconds in parts.items()]
    return found, watch.comm.gather(mine)


def _sums_alone(watch: Stopwatch, tokens: int) -> float:
    """Seconds of a step's sums outside the kernels, were all ranks to begin at the same time."""
    comm, config = watch.model.comm, watch.model.config
    if comm.size == 1:
        return 0.0
    message = sample_addends(tokens * config.padded_hidden_size)  # zeros would be sent in a few bytes
    before = comm.seconds, comm.calls
    alone = comm.median_seconds(message)
    comm.seconds, comm.calls = before
    embedding, halves = 1, 2 * len(watch.model.layers)
    return alone * (embedding if comm.shared_for(message.size) else embedding + halves)


def _bytes(model: Decoder, tokens: int) -> dict[str, int]:
    sizes = dict.fromkeys(PARTS, 0.0)
    for block, weights in zip(model.config.blocks, model.weights.layers, strict=True):
        for name, matrices in {**block.attention.products, **block.mlp.products}.items():
            sizes[name] += weights.bytes_read(matrices, tokens)
    return {name: int(size) for name, size in sizes.items()} | {"lm_head": model.weights.lm_head.bytes}
