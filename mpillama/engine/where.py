"""Where the time of a step goes, part by part, on a rank's main thread: it takes part in everything."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpillama.engine.measure import Stopwatch, Timing
from mpillama.kernels.library import PARTS
from mpillama.models.decoder import Decoder

SUM, LATE, REST = "residual and sum over ranks", "waiting for other ranks", "Python and the rest"


@dataclass(frozen=True)
class Part:
    """One part of a step: seconds, and the bytes of weights that it reads on this rank."""

    name: str
    seconds: float
    bytes: int


def where_time_goes(watch: Stopwatch, run: Callable[[], Timing], tokens: int) -> list[Part]:
    """The parts of a step of `tokens` tokens: means over the steps that `run` times.

    Every rank must call it; the parts are this rank's own, and add up to its step.
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
    sizes = _bytes(watch.model, tokens)
    return [Part(name, seconds, sizes.get(name, 0)) for name, seconds in parts.items()]


def _sums_alone(watch: Stopwatch, tokens: int) -> float:
    """Seconds of a step's sums outside the kernels, were all ranks to begin at the same time."""
    comm, config = watch.comm, watch.model.config
    if comm.size == 1:
        return 0.0
    message = np.zeros(tokens * config.padded_hidden_size)
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
