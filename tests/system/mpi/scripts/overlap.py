"""Run a step whole and in parts: print as JSON from rank 0, for each model, {parts: [same bits, sums a layer]}.

Arguments: threads, and the models. The step has a prompt, the end of another one, and a token of a third.
"""

import json
import sys
from typing import Any

import numpy as np

from mpillama.cli.display import load_progress
from mpillama.cli.options import RunOptions
from mpillama.job.start import start_mpi
from mpillama.kernels.target import prepare, requested_isa
from mpillama.loading.load import load_model
from mpillama.models.cache import KVCache, Step, joint_step
from mpillama.models.decoder import Decoder

PARTS = (2, 3, 5)


def main(threads: int, models: list[str]) -> None:
    """Run all of them in this process."""
    with start_mpi(threads) as world:
        target = world.comm.together(lambda: prepare(requested_isa(), threads, world.comm.yields))
        found = {}
        for path in models:
            options = RunOptions(model=path, threads=threads, max_seq_len=64)
            model = load_model(options, world, target, load_progress(False, True)).model
            assert model.comm.shared is not None
            assert model.comm.shared.overlaps
            assert model.most_parts(24) == 2
            expected, _ = run(model, 1)
            found[path] = {parts: compare(run(model, parts), expected) for parts in PARTS}
            found[path] = {parts: world.comm.gather(each) for parts, each in found[path].items()}
        if world.comm.is_root:
            print(json.dumps(found))


def run(model: Decoder, parts: int) -> tuple[np.ndarray, float]:
    """The residual stream after a step, as bits, and how many sums its layers took."""
    cache = KVCache(model.config, model.part, 3, "f16", 4)
    model.advance(step((4, 7, 5), (0, 0, 0)), cache)
    model.forget_costs()
    later = step((20, 3, 1), (4, 7, 5))
    model.advance(later, cache, parts)
    sums = (model.comm.calls - 1) / len(model.layers)
    return model.workspace.residual(0, len(later.token_ids)).copy().view(np.int32), sums


def step(counts: tuple[int, ...], starts: tuple[int, ...]) -> Step:
    """So many tokens of each sequence."""
    ids = 2 + np.arange(sum(counts), dtype=np.int64) * 5 % 50
    sequences, tables = len(counts), np.arange(len(counts), dtype=np.int64).reshape(-1, 1)
    return joint_step(ids, np.array(starts), np.array(counts), np.ones(sequences, np.int64), tables)


def compare(found: tuple[np.ndarray, float], expected: np.ndarray) -> list[Any]:
    return [bool(np.array_equal(found[0], expected)), found[1]]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
