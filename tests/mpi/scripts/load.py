"""Load a model and print, as JSON from rank 0, what each rank read of it: load.py MODEL.

Only rank 0 may open the file with HDF5.
"""

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from mpillama.comm.start import start_mpi
from mpillama.files import native
from mpillama.kernels.target import prepare, requested_isa
from mpillama.model.partition import partition
from mpillama.options import RunOptions
from mpillama.tools.display import load_progress


def system_bytes() -> int:
    """Bytes that this process has read so far, by the system's own count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def refuse_hdf5(*arguments: object, **options: object) -> NoReturn:
    raise AssertionError("a rank other than 0 opens HDF5")


def main(model: str) -> None:
    with start_mpi(1) as world:
        target = world.comm.together(lambda: prepare(requested_isa(), 1, world.comm.yields))
        from mpillama.engine import loading
        from mpillama.model.weights import slice_bytes

        if not world.comm.is_root:
            native.h5py.File = refuse_hdf5
        load_weights, measured = loading.load_weights, []

        def measure(*arguments: Any) -> Any:
            before = system_bytes()
            weights = load_weights(*arguments)
            measured.append(system_bytes() - before)
            return weights

        loading.load_weights = measure
        loaded = loading.load_model(RunOptions(model=model), world, target, load_progress(False, True))
        part = partition(loaded.file.config, world.comm.size)[world.comm.rank]
        facts = {
            "slices": slice_bytes(loaded.file.specs, part),
            "reader": loaded.bytes_read,
            "system": sum(measured),
        }
        ranks = world.comm.gather(facts)
        if world.comm.is_root:
            print(json.dumps(ranks))


if __name__ == "__main__":
    main(sys.argv[1])
