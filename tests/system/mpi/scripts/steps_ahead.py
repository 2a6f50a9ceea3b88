"""Print, from rank 0, what came of requests that share an engine, as one JSON object.

Arguments: model, stages, and what the error of the tail is taken for: a large one makes rank 0 look up whole rows.
With stages several steps are under way whenever something else happens: requests come and are cancelled, blocks run
out, ranks report their memory, and at last the end comes.
"""

import hashlib
import json
import sys

import numpy as np

from mpillama.cli.display import load_progress
from mpillama.cli.options import RunOptions
from mpillama.engine.engine import Engine
from mpillama.engine.executor import Executor
from mpillama.engine.scheduler import ScheduledSequence
from mpillama.engine.sequence import EngineSequence, Request
from mpillama.job.start import start_mpi
from mpillama.kernels.target import prepare, requested_isa
from mpillama.loading.load import load_model
from mpillama.loading.texts import make_tokenizer
from mpillama.text import sampler
from mpillama.text.sampling_params import SamplingParams

SLOTS, BLOCKS, LONGEST = 12, 14, 256
GREEDY = SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.2, seed=2, max_tokens=40, ignore_eos=True)
NOTHING = SamplingParams(max_tokens=0)


class Rows:
    """A digest of the rows that it is told of, and their number."""

    def __init__(self) -> None:
        self.count, self.digest = 0, hashlib.sha256()

    def __call__(self, row: np.ndarray, token: int) -> None:
        self.count += 1
        self.digest.update(row.tobytes() + bytes([token % 256]))


def result(sequence: EngineSequence) -> list[object]:
    """What came of a request."""
    told = sequence.request.on_prompt_logits
    rows = (told.count, told.digest.hexdigest()) if isinstance(told, Rows) else None
    pooled = None if sequence.pooled is None else hashlib.sha256(sequence.pooled.tobytes()).hexdigest()
    return [sequence.answer.token_ids, sequence.error, rows, pooled]


def serve(engine: Engine) -> dict[str, object]:
    """Run the requests; counts beside the results say what happened."""
    executor, counts = engine.executor, {"ahead": 0, "whole_rows": 0, "under_way_when_cancelled": 0, "dropped": 0}
    fetch, is_done = executor.whole_row, engine.scheduler.is_done

    def whole_row(row: int) -> np.ndarray:
        counts["whole_rows"] += 1
        return fetch(row)

    def is_wanted(share: ScheduledSequence) -> bool:
        wanted = is_done(share)
        counts["dropped"] += not wanted
        return wanted

    executor.whole_row = whole_row  # type: ignore[method-assign]
    engine.scheduler.is_done = is_wanted  # type: ignore[method-assign]
    prompts = [[5 + i, 9, 20] * (1 + 7 * (i % 3)) for i in range(16)]
    sequences = [engine.submit(Request(ids, GREEDY if i % 2 else DRAWN)) for i, ids in enumerate(prompts)]
    doomed = [engine.submit(Request([40 + i, 3], GREEDY)) for i in range(2)]
    step = 0
    while not engine.idle:
        engine.step()
        counts["ahead"] = max(counts["ahead"], len(engine._flights))
        step += 1
        if step == 9:
            sequences.append(engine.submit(Request([8, 9] * 30, NOTHING, pooling="mean")))
            sequences.append(engine.submit(Request([8, 9] * 40, NOTHING, on_prompt_logits=Rows())))
        for sequence in doomed:
            under_way = any(share.sequence is sequence for flight in engine._flights for share in flight.shares)
            if len(sequence.answer.token_ids) > 2 and under_way == (executor.ahead > 1) and not sequence.finished:
                counts["under_way_when_cancelled"] += under_way
                engine.cancel(sequence)
        if step % 10 == 0:
            assert len(executor.memory_per_rank()) == executor.comm.size
    assert engine.pool.used == 0
    assert all(sequence.answer.finish_reason == "cancelled" for sequence in doomed)
    return {"results": [result(s) for s in sequences], "preemptions": engine.scheduler.preemptions, **counts}


def main(model: str, stages: int, tail_error: float) -> None:
    """Run them, and end while a step is under way."""
    sampler.HEAD, sampler.TAIL_ERROR = 16, tail_error
    with start_mpi(1) as world:
        target = world.comm.together(lambda: prepare(requested_isa(), 1, world.comm.yields))
        options = RunOptions(model=model, max_seq_len=LONGEST, pipeline=stages)
        loaded = load_model(options, world, target, load_progress(False, True))
        executor = Executor(loaded.model, LONGEST, "f16", 24, slots=SLOTS, blocks=BLOCKS)
        if not world.comm.is_root:
            executor.follow()
            return
        engine = Engine(executor, make_tokenizer(loaded.file))
        found = serve(engine)
        for i in range(8):
            engine.submit(Request([5, i], GREEDY))
        for _ in range(3):
            engine.step()
        found["left_under_way"] = len(engine._flights)
        executor.end(0)
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
