"""Print the digest of each case's logits, as one JSON list from rank 0.

Arguments: threads, number of tokens to generate, and the cases as a JSON list of {model, weights, kv_type,
prefill_chunk, prompt, banned, way, sync}; tokens are chosen greedily, never the banned one. `way` replaces what is
otherwise chosen by timing, which is left out: 0 takes MPI's reduction, 1 that in shared memory, 2 and more its ways
between hosts in turn; one or two row groups are in flight on ranks in turn.
"""

import json
import sys
from typing import Any
from unittest.mock import patch

from mpillama.cli.display import load_progress
from mpillama.cli.options import RunOptions
from mpillama.comm.communicator import Communicator
from mpillama.job.start import start_mpi
from mpillama.kernels.target import prepare, requested_isa
from mpillama.loading.load import LoadedModel, load_model, open_executor
from tests.engine.one_sequence import OneSequence


def main(threads: int, tokens: int, cases: list[dict[str, Any]]) -> None:
    """Run all cases in this process."""
    with start_mpi(threads) as world:
        target = world.comm.together(lambda: prepare(requested_isa(), threads, world.comm.yields))
        digests, loaded, previous = [], None, None
        for case in cases:
            options = RunOptions(
                model=case["model"],
                weights=case["weights"],
                kv_type=case["kv_type"],
                prefill_chunk=case["prefill_chunk"],
                sync=case["sync"],
                threads=threads,
                max_seq_len=len(case["prompt"]) + tokens,
            )
            if loaded is None or previous != kind_of(options):
                with patch.object(Communicator, "median_seconds", return_value=0.0):
                    loaded = load_model(options, world, target, load_progress(False, True))
                previous = kind_of(options)
            choose(loaded, case["way"])
            executor = open_executor(options, loaded)
            if world.comm.is_root:
                digests.append(OneSequence(executor).greedy_digest(case["prompt"], tokens, case["banned"]))
                executor.end(0)
            else:
                executor.follow()
        if world.comm.is_root:
            print(json.dumps(digests))


def kind_of(options: RunOptions) -> tuple[str | None, ...]:
    """What a loaded model is for."""
    return options.model, options.kv_type, options.weights, options.sync


def choose(loaded: LoadedModel, way: int) -> None:
    """Fix what timing would choose."""
    comm, model = loaded.model.comm, loaded.model
    assert model.in_flight in (1, 2)
    assert (comm.shared is not None) == (comm.size > 1)
    model.in_flight = 1 + (comm.rank + way) % 2
    comm.shared_limit = sys.maxsize if way else 0
    if comm.shared:
        comm.shared.use([(0, comm.shared.ways[max(0, way - 2) % len(comm.shared.ways)])])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
