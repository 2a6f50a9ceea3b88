"""Load a model and print, as JSON from rank 0, what each rank read of it: load.py MODEL.

Only rank 0 may as much as import HDF5.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillama.cli.display import load_progress
from mpillama.cli.options import RunOptions
from mpillama.job.start import start_mpi
from mpillama.kernels.target import prepare, requested_isa

if TYPE_CHECKING:
    from mpillama.models.decoder import Decoder


def system_bytes() -> int:
    """Bytes that this process has read so far, by the system's own count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def vectors(model: "Decoder") -> list[np.ndarray]:
    """What every rank holds whole, but for routers."""
    tensors = [tensor for layer in model.weights.layers for tensor in layer._tensors.values()]
    return [model.weights.norm, *(v for v in tensors if isinstance(v, np.ndarray) and v.size)]


def main(model: str) -> None:
    with start_mpi(1) as world:
        target = world.comm.together(lambda: prepare(requested_isa(), 1, world.comm.yields))
        from mpillama.loading import load as loading
        from mpillama.models.weights import slice_bytes

        load_weights, measured = loading.load_weights, []

        def measure(*arguments: Any) -> Any:
            before = system_bytes()
            weights = load_weights(*arguments)
            measured.append(system_bytes() - before)
            return weights

        loading.load_weights = measure
        loaded = loading.load_model(RunOptions(model=model), world, target, load_progress(False, True))
        part = loaded.file.config.partition(world.comm.size)[world.comm.rank]
        replicated = [spec for spec in loaded.file.specs if spec.split is None]
        facts = {
            "hdf5": "h5py" in sys.modules,
            "replicated": slice_bytes(replicated, part),
            "digest": hashlib.sha256(b"".join(v.tobytes() for v in vectors(loaded.model))).hexdigest(),
            "slices": slice_bytes(loaded.file.specs, part),
            "reader": loaded.bytes_read,
            "system": sum(measured),
        }
        ranks = world.comm.gather(facts)
        if world.comm.is_root:
            print(json.dumps(ranks))


if __name__ == "__main__":
    main(sys.argv[1])
