"""`convert`: write a model of any format into a native file, all ranks together."""

import json
import sys
from functools import partial
from pathlib import Path

import psutil

from mpillama.cli.display import bytes_progress, in_units, stages
from mpillama.cli.logs import logged
from mpillama.cli.options import ConvertOptions
from mpillama.cli.running import warn_of_requantised
from mpillama.job.start import World
from mpillama.loading.convert import convert_model, refuse_target, target_bytes, with_importance
from mpillama.loading.model_file import ModelFile, open_model, open_mtp
from mpillama.loading.texts import make_tokenizer


def convert(options: ConvertOptions, world: World) -> int:
    comm = world.comm
    with logged(world, quiet=False):
        comm.watch.display = stages(comm.is_root, options.json)
        comm.on_root(lambda: refuse_target(options.target, options.force))
        model = comm.on_root(lambda: comm.busy(partial(_open_source, options), "reading the model's table"))
        comm.on_root_only(lambda: make_tokenizer(model))  # without one that can be used nothing would run the new file
        if comm.is_root:
            warn_of_requantised(model)
            _advise(options.target)
        size = target_bytes(model)
        progress = bytes_progress(comm.is_root, options.json, "writing rank 0's part")
        with progress(size // comm.size) as on_bytes:
            seconds = convert_model(model, options.target, options.force, comm, on_bytes, world.threads)
        if comm.is_root:
            _report(options, size, seconds, comm.size)
    return 0


def _open_source(options: ConvertOptions) -> ModelFile:
    if options.mtp:
        model = open_mtp(options.source, options.weights)
    else:
        model = open_model(options.source, options.weights, options.tokenizer)
    return with_importance(model, options.importance) if options.importance else model


def _advise(target: str) -> None:
    folder = Path(target).absolute().parent
    if file_system(folder) == "lustre":
        sys.stderr.write(
            f"mpillama: {folder} is on Lustre: `lfs setstripe -c -1 -S 16M {folder}` before converting spreads the "
            "file over all servers, so that many ranks read it faster.\n"
        )


def file_system(folder: Path) -> str:
    """The type of the file system that a folder lies on, "" if it cannot be told."""
    mounts = [p for p in psutil.disk_partitions(all=True) if folder.is_relative_to(p.mountpoint)]
    return max(mounts, key=lambda p: len(p.mountpoint)).fstype if mounts else ""


def _report(options: ConvertOptions, size: int, seconds: float, ranks: int) -> None:
    facts = {"target": options.target, "bytes": size, "seconds": seconds, "bytes_per_second": size / seconds}
    if options.json:
        sys.stdout.write(json.dumps({**facts, "ranks": ranks}) + "\n")
    else:
        sys.stdout.write(
            f"{options.target}: {in_units(size)} in {seconds:.1f} s ({in_units(size / seconds)}/s), {ranks} rank"
            f"{'' if ranks == 1 else 's'}\n"
        )
