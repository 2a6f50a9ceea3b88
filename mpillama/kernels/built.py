"""The libraries of kernels beside this package: which there are, and whether they are made of its sources."""

import ctypes
import hashlib
from pathlib import Path

from mpillama.errors import UserError

HERE = Path(__file__).parent
LIBRARIES, SOURCES = HERE / "lib", HERE / "src"
REMEDY = "run `make kernels` in a checkout, or install mpillama anew"


def library_path(isa_name: str) -> Path:
    """Where the library of an instruction set is, or would be."""
    return LIBRARIES / f"libmpillama_{isa_name}.so"


def is_built(isa_name: str) -> bool:
    """Whether the compiler that built this package knew the instruction set."""
    return library_path(isa_name).exists()


def open_library(isa_name: str) -> ctypes.CDLL:
    """Load the library of an instruction set; UserError if it cannot be loaded or was made of other sources."""
    path = library_path(isa_name)
    try:
        library = ctypes.CDLL(str(path))
        digest = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "mpillama_sources_digest")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be loaded ({error}): {REMEDY}.") from error
    if SOURCES.is_dir() and digest.decode() != sources_digest(SOURCES):
        raise UserError(f"{path}: was made of other sources than those beside it: {REMEDY}.")
    return library


def sources_digest(folder: Path) -> str:
    """The digest that CMakeLists.txt writes into every library: SHA-256 of the lines `SHA-256 path` of all sources."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in (".cpp", ".h"))
    listing = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()} {name}\n" for name in names)
    return hashlib.sha256(listing.encode()).hexdigest()
