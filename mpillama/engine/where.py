"""Where the time of a step goes, part by part, on a rank's main thread: it takes part in everything."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpillama.engine.measure import Stopwatch, Timing
from mpillama.kernels.library import PARTS
from mpillama.model.llama import LlamaModel
from mpillama.model.weights import LayerWeights

SUM, LATE, REST = "residual and sum over ranks", "waiting for other ranks", "Python and the rest"
PRODUCTS: dict[str, Callable[[LayerWeights], int]] = {
    "q/k/v": lambda w: w.q_proj.bytes + w.k_proj.bytes + w.v_proj.bytes,
    "o_proj": lambda w: w.o_proj.bytes,
    "router": lambda w: w.router.bytes if w.router else 0,
}
EXPERTS: dict[str, Callable[[LayerWeights], int]] = {
    "gate/up": lambda w: w.gate_proj.bytes + w.up_proj.bytes,
    "down": lambda w: w.down_proj.bytes,
}


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


def _bytes(model: LlamaModel, tokens: int) -> dict[str, int]:
    weights = model.weights
    used = 1.0 - weights.idle_expert_share**tokens
    sizes = {name: sum(size(layer) for layer in weights.layers) for name, size in PRODUCTS.items()}
    sizes |= {name: int(used * sum(size(layer) for layer in weights.layers)) for name, size in EXPERTS.items()}
    return sizes | {"lm_head": weights.lm_head.bytes}
