"""Print the token ids of some requests that run together, as one JSON list from rank 0.

Arguments: model, and what the error of the tail is taken for: a large one makes rank 0 look up whole rows. Pieces have
one row each, so that others are under way at that time.
"""

import json
import sys

from mpillama.cli.display import load_progress
from mpillama.cli.options import RunOptions
from mpillama.engine.engine import Engine
from mpillama.engine.executor import Executor
from mpillama.engine.sequence import Request
from mpillama.job.start import start_mpi
from mpillama.kernels.target import prepare, requested_isa
from mpillama.loading.load import load_model
from mpillama.loading.texts import make_tokenizer
from mpillama.text import sampler
from mpillama.text.sampling_params import SamplingParams

TOKENS = 12
PARAMS = (
    SamplingParams(temperature=0.0, max_tokens=TOKENS),
    SamplingParams(temperature=0.9, seed=1, max_tokens=TOKENS),
    SamplingParams(temperature=1.5, seed=2, top_p=0.9, max_tokens=TOKENS),
    SamplingParams(temperature=0.9, seed=3, presence_penalty=0.5, max_tokens=TOKENS),
    SamplingParams(temperature=1.0, seed=4, top_k=5, max_tokens=TOKENS),
)


def main(model: str, tail_error: float) -> None:
    """Run them."""
    sampler.HEAD, sampler.TAIL_ERROR = 16, tail_error
    with start_mpi(1) as world:
        target = world.comm.together(lambda: prepare(requested_isa(), 1, world.comm.yields))
        loaded = load_model(RunOptions(model=model, max_seq_len=64), world, target, load_progress(False, True))
        executor = Executor(loaded.model, 64, "f16", 16, slots=len(PARAMS), blocks=8)
        executor.piece = 1
        if not world.comm.is_root:
            executor.follow()
            return
        engine, whole_rows = Engine(executor, make_tokenizer(loaded.file)), []
        fetch = executor.whole_row
        executor.whole_row = lambda row: whole_rows.append(row) or fetch(row)  # type: ignore[func-returns-value,method-assign]
        sequences = [engine.submit(Request([5 + i, 9, 20], params)) for i, params in enumerate(PARAMS)]
        while not engine.idle:
            engine.step()
        executor.end(0)
        print(json.dumps({"tokens": [s.answer.token_ids for s in sequences], "whole_rows": len(whole_rows)}))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
