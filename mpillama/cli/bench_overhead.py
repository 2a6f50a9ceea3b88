"""What a decode step takes beside reading weights and the network's latency: the work of Python, MPI and small kernels.

`plan` adds it to what it computes from bandwidths and latencies.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean

from mpillama.comm.communicator import Communicator
from mpillama.comm.hosts import one_way_seconds
from mpillama.engine.measure import Stopwatch, Timing
from mpillama.engine.step_parts import StepParts
from mpillama.loading.plan import GOOD_EFFICIENCY
from mpillama.loading.traffic import Layout, sum_sent
from mpillama.models.decoder import Decoder, DecoderLayer


@dataclass(frozen=True)
class Overhead:
    """Seconds of a step, of each layer, and of each message between hosts beyond the `latency` of a bare one.

    The last two are None on a single host. Where it was measured what ranks wait for each other, that is in none of
    them; otherwise they are the slowest rank's, and a message has the waiting in it.
    """

    step: float
    layer: float
    message: float | None
    latency: float | None


@contextmanager
def only_layers(watch: Stopwatch, kept: Sequence[DecoderLayer]) -> Iterator[None]:
    """Let the model have some of its layers only; what steps take in parts is then another matter."""
    layers, caches, step_parts = watch.model.layers, watch.cache.arguments, watch.step_parts
    watch.step_parts = StepParts(watch.model.most_parts)
    watch.model.layers = [*kept]
    watch.cache.arguments = [cache for layer, cache in zip(layers, caches, strict=True) if layer in kept]
    try:
        yield
    finally:
        watch.model.layers, watch.cache.arguments, watch.step_parts = layers, caches, step_parts


def measure_overhead(
    watch: Stopwatch, whole: Timing, sequences: int, context: int, bandwidth: float, wire_share: float | None
) -> Overhead:
    """Compare decode steps (`whole`) and steps without layers with what reading takes.

    `bandwidth`: bytes per second that all ranks read together; `wire_share`: what of this rank's time in sums is not
    waiting for late ranks, None if that was not measured. Every rank must call it.
    """
    model, comm, at_once = watch.model, watch.comm, watch.at_once(sequences)
    with only_layers(watch, []):
        rest = watch.decode(sequences, context, len(whole.seconds))
    steps, sequences = at_once * len(whole.seconds), -(-sequences // at_once)  # of each step under way
    speed = GOOD_EFFICIENCY * bandwidth / comm.size
    head = model.weights.lm_head.bytes / speed
    reading = (model.weights.bytes_per_step(sequences) + watch.kv_bytes(sequences, context)) / speed - head
    own, without = whole.own_seconds / steps, rest.own_seconds / steps
    beside = max(0.0, without - head), max(0.0, own - without - reading) / max(1, len(model.layers))
    found = [waits for waits in comm.gather(_waits(model, whole, sequences, wire_share)) if waits]
    latency = max(waits.latency for waits in found) if found else None
    message = max(0.0, min((w.seconds / w.rounds - w.latency for w in found if w.seconds), default=0.0))
    # For whoever works longer the others wait: with the waiting told apart the mean counts, or it would count twice.
    of_all = max if wire_share is None else mean
    step, layer = (of_all(column) for column in zip(*comm.gather(beside), strict=True))
    return Overhead(step, layer, message if found else None, latency)


@dataclass(frozen=True)
class _Waits:
    """Of a rank that adds up with other hosts: seconds of a sum over ranks, without waiting if that is known, the
    messages one after the other in it, and the seconds of a bare one.
    """

    seconds: float
    rounds: int
    latency: float


def _waits(model: Decoder, whole: Timing, sequences: int, wire_share: float | None) -> _Waits | None:
    """None on a single host; stages of a pipeline may differ in that."""
    latency = _latency(model.comm)
    if latency is None:
        return None
    rounds = _rounds(model.comm, sequences * model.config.padded_hidden_size)
    share = 1.0 if wire_share is None else wire_share
    return _Waits(share * whole.all_reduce_microseconds / 1e6, rounds, latency)


def _latency(comm: Communicator) -> float | None:
    """Seconds of a small message between two hosts, None if these ranks are on one host or add up through MPI alone."""
    shared = comm.shared
    if shared is None or shared.hosts == 1:
        return None
    exchange, watch = shared.exchange, comm.watch
    watch.enter("the measuring of latency", comm.is_of_all)
    measured = one_way_seconds(exchange.mpi, exchange.pause, watch.poll) if exchange else 0.0
    watch.leave()
    return comm.broadcast(measured)


def _rounds(comm: Communicator, count: int) -> int:
    """Messages one after the other in a sum of so many numbers, as rank 0's host exchanges them."""
    shared = comm.shared
    assert shared is not None
    way = comm.broadcast(shared.exchange.way_for(count) if shared.exchange else "")
    return sum_sent(Layout(shared.hosts, 1), count, 1)[way].rounds if comm.shared_for(count) else 1
