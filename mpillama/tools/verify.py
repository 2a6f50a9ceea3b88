"""`verify`: compare a model file with its checksums, all ranks together."""

import json
import sys
from dataclasses import asdict

from mpillama.comm.start import start_mpi
from mpillama.options import VerifyOptions
from mpillama.tools.display import bytes_progress, in_units
from mpillama.tools.logs import logged

DAMAGED = 1
"""The exit status for a file that differs."""


def verify(options: VerifyOptions) -> int:
    """Run the command; returns the exit status."""
    with start_mpi(None) as world, logged(world, quiet=False):
        from mpillama.engine.verification import verify_file
        from mpillama.files.native import read_table

        comm = world.comm
        model = comm.on_root(lambda: read_table(options.file))
        size = sum(entry.bytes for entry in model.entries.values())
        with bytes_progress(comm.is_root, options.json, "checking rank 0's part")(size // comm.size) as on_bytes:
            found = verify_file(model, comm, on_bytes)
        if comm.is_root and options.json:
            sys.stdout.write(json.dumps({"bytes": size, "differences": [asdict(d) for d in found]}) + "\n")
        elif comm.is_root:
            for d in found:
                sys.stdout.write(f"{d.tensor}: bytes {d.first_byte} to {d.last_byte} differ\n")
            verdict = f"{len(found)} places differ: copy or convert it again" if found else "all checksums agree"
            sys.stdout.write(f"{options.file}: {in_units(size)} checked, {verdict}\n")
    return DAMAGED if found else 0
