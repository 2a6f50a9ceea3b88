"""Print what each rank sent in a decode step, by way between hosts, as JSON from rank 0: {way: [[messages, bytes], …]}.

Arguments: model, sync.
"""

import json
import sys

from mpillama.cli.display import load_progress
from mpillama.cli.options import RunOptions
from mpillama.engine.measure import Stopwatch
from mpillama.job.start import start_mpi
from mpillama.kernels.target import prepare, requested_isa
from mpillama.loading.load import load_model

STEPS = 4


def main(model: str, sync: str) -> None:
    """Count them."""
    with start_mpi(1) as world:
        target = world.comm.together(lambda: prepare(requested_isa(), 1, world.comm.yields))
        options = RunOptions(model=model, max_seq_len=64, sync=sync)
        loaded = load_model(options, world, target, load_progress(False, True))
        comm, watch, found = loaded.model.comm, Stopwatch(loaded.model, 64, 1, "f16", 16), {}
        assert comm.shared is not None
        comm.shared_limit = sys.maxsize
        watch.prefill(16, 1)
        for way in comm.shared.ways:
            comm.shared.use([(0, way)])
            sent = watch.decode(1, 16, STEPS).sent
            found[way] = comm.gather((sent.messages / STEPS, sent.bytes / STEPS))
        if world.comm.is_root:
            print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
