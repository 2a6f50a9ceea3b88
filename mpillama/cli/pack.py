"""`pack`: this Python environment as one file, for Slurm's sbcast; needs no MPI."""

import os
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import mpillama
from mpillama.cli.display import in_units, print_sentence, stages
from mpillama.cli.options import PackOptions
from mpillama.cli.values import output_file, refuse_unwritable
from mpillama.errors import UserError

TOP = "mpillama-env"
"""The folder that all files of an archive lie in."""


def pack(options: PackOptions) -> int:
    """Write the archive and say how to use it; returns the exit status."""
    refuse_unwritable("FILE", options.file)
    if sys.prefix == sys.base_prefix:
        raise UserError(
            f"{sys.executable} is no virtual environment: pack takes one (python -m venv, then pip install there)."
        )
    with stages(is_root=True, quiet=False)("packing the environment"):
        count = write_archive(Path(options.file))
    name = Path(options.file).name
    print_sentence(
        f"{options.file}: {count:,} files, {in_units(Path(options.file).stat().st_size)}. In a job: "
        f"sbcast {options.file} /tmp/{name}; srun --ntasks-per-node=1 tar -xf /tmp/{name} -C /tmp; "
        f"VENV=/tmp/{TOP}. The Python that it was made from, {sys.base_prefix}, must be there on every node."
    )
    return 0


def write_archive(path: Path) -> int:
    """Write this environment to a tar file, and return how many files it has."""
    count = 0
    with output_file("FILE", str(path)) as file, tarfile.open(fileobj=file, mode="w") as archive:
        for source, name in files_to_pack(path.resolve()):
            archive.add(source, f"{TOP}/{name}", recursive=False)
            count += 1
    return count


def files_to_pack(leave_out: Path) -> Iterator[tuple[Path, str]]:
    """All files of this environment and their names in it; an mpillama that lies elsewhere comes into it."""
    prefix = Path(sys.prefix)
    for source in _files_below(prefix):
        if source != leave_out:
            yield source, str(source.relative_to(prefix))
    package = Path(mpillama.__file__).parent
    if not package.is_relative_to(prefix):
        inside = Path(sysconfig.get_path("purelib")).relative_to(prefix) / "mpillama"
        for source in _files_below(package):
            yield source, str(inside / source.relative_to(package))


def _files_below(folder: Path) -> Iterator[Path]:
    """Files and links, in order of name."""
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        folders.sort()
        yield from (Path(parent) / name for name in sorted([*files, *links]))
