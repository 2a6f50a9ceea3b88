"""`verify`: check the bytes of a model, all ranks together."""

import json
import sys
from dataclasses import asdict

from mpillama.cli.display import bytes_progress, in_units, stages
from mpillama.cli.logs import logged
from mpillama.cli.options import VerifyOptions
from mpillama.job.start import World
from mpillama.loading.model_file import open_model
from mpillama.loading.verify import Check, checked_bytes, verify_file

DAMAGED = 1
"""The exit status for a file that differs."""


def verify(options: VerifyOptions, world: World) -> int:
    comm = world.comm
    with logged(world, quiet=False):
        comm.watch.display = stages(comm.is_root, options.json)
        open_file = lambda: open_model(options.file, tokenizer=options.tokenizer)  # noqa: E731
        model = comm.on_root(lambda: comm.busy(open_file, "reading the model's table"))
        size = checked_bytes(model)
        with bytes_progress(comm.is_root, options.json, "checking rank 0's part")(size // comm.size) as on_bytes:
            check = verify_file(model, comm, on_bytes)
        if comm.is_root and options.json:
            sys.stdout.write(json.dumps(asdict(check)) + "\n")
        elif comm.is_root:
            _report(model.path, check, several=len(model.files) > 1)
    return DAMAGED if check.differences else 0


def _report(path: str, check: Check, several: bool) -> None:
    """Say what differs, or what was found right, and what could not be checked."""
    has_checksums = "checksums" in check.checked
    for d in check.differences:
        where = f"{d.file}: " if several else ""
        what = "differ" if has_checksums else "hold numbers that are not finite"
        sys.stdout.write(f"{where}{d.tensor}: bytes {d.first_byte} to {d.last_byte} {what}\n")
    if check.differences and has_checksums:
        verdict = f"{len(check.differences)} places differ: copy or convert it again"
    elif check.differences:
        verdict = f"{len(check.differences)} rows hold NaN or infinity: copy or download it again"
    elif has_checksums:
        verdict = "all checksums agree"
    else:
        verdict = "sizes, table and finite values are right; this format has no checksums to tell other changes by"
    sys.stdout.write(f"{path}: {in_units(check.bytes)} checked, {verdict}\n")
