"""The compiled kernels (kernels/src/kernels.cpp), typed: structs and arrays in, arrays out.

A call gives up the interpreter's lock while it runs. Arrays are contiguous and of the type that is named; nothing is
copied and nothing is checked here.
"""

import ctypes
import hashlib
import os
import re
from collections.abc import Mapping
from ctypes import POINTER, byref, c_double, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mpillama.errors import UserError
from mpillama.kernels import arguments

PLACE = re.compile(r"\{(\d+)[^}]*\}(?::(\d+))?(?::(\d+))?")
"""A place by its first processor, how many of its kind follow, and how far apart."""
ANYWHERE = -1


def thread_places(threads: int, environment: Mapping[str, str] = os.environ) -> list[int]:
    """The processor of each thread, ANYWHERE where the system may choose among those that this rank may use.

    Threads are bound by an explicit OMP_PLACES ("{0},{2}", "{0}:4:2"), or to the rank's own processors one by one if
    OMP_PLACES names threads or cores or OMP_PROC_BIND is true, close or spread. Thread 0 is the program's own.
    """
    allowed = sorted(os.sched_getaffinity(0))
    places = environment.get("OMP_PLACES", "").strip().lower()
    binds = environment.get("OMP_PROC_BIND", "").strip().lower().split(",")[0]
    if binds == "false" or not (places or binds):
        return [ANYWHERE] * threads
    listed = [cpu for cpu in _listed(places) if cpu in allowed] or allowed
    return [ANYWHERE, *(listed[i] for i in range(1, threads))] if len(listed) >= threads else [ANYWHERE] * threads


def _listed(places: str) -> list[int]:
    """The first processor of each explicit place."""
    found = []
    for first, count, stride in PLACE.findall(places):
        found += [int(first) + i * int(stride or 1) for i in range(int(count or 1))]
    return found


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


Array = np.ndarray
SPINS = 4000
"""How often a thread polls for its next work before it gives its core away: some 50 us, longer than a step's gaps."""

DONE = 1
"""What the halves of a layer return when nothing is left to do."""
PARTS = (
    "norms and quantisation", "q/k/v", "RoPE and cache", "attention", "o_proj", "router", "gate/up", "down", "lm_head",
    "residual and sum over ranks", "waiting for other ranks", "barriers",
)  # fmt: skip
"""What threads' time goes to, in the order of kernels/src/team.h."""

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "start_team": (c_void_p, [c_int64, c_int64, POINTER(c_int32)]),
    "end_team": (None, [c_void_p]),
    "attention_half": (
        c_int64,
        [c_void_p, POINTER(arguments.AttentionLayer), POINTER(arguments.Step), POINTER(arguments.Sum)],
    ),
    "block_sparse_half": (
        c_int64,
        [c_void_p, POINTER(arguments.BlockSparseLayer), POINTER(arguments.Step), POINTER(arguments.Sum)],
    ),
    "latent_half": (
        c_int64,
        [c_void_p, POINTER(arguments.LatentLayer), POINTER(arguments.Step), POINTER(arguments.Sum)],
    ),
    "delta_half": (
        c_int64,
        [c_void_p, POINTER(arguments.DeltaLayer), POINTER(arguments.Step), POINTER(arguments.Sum)],
    ),
    "mlp_half": (
        c_int64,
        [c_void_p, POINTER(arguments.MlpLayer), POINTER(arguments.Step), POINTER(arguments.Sum)],
    ),
    "choose_experts": (
        c_int64,
        [c_void_p, POINTER(arguments.Router), c_int64, c_void_p, c_int64, c_void_p, c_void_p],
    ),
    "project_and_sum": (c_int64, [c_void_p, POINTER(arguments.AttentionLayer), POINTER(arguments.Step)]),
    "attend_projected": (
        c_int64,
        [c_void_p, POINTER(arguments.AttentionLayer), POINTER(arguments.Step), POINTER(arguments.Sum)],
    ),
    "project": (c_int64, [c_void_p, POINTER(arguments.AttentionLayer), POINTER(arguments.Step)]),
    "rotate": (
        c_int64,
        [c_void_p, POINTER(arguments.AttentionLayer), POINTER(arguments.Step), c_int64, c_int64, c_void_p],
    ),
    "attend_pieces": (
        c_int64,
        [c_void_p, POINTER(arguments.AttentionLayer), POINTER(arguments.Step), POINTER(arguments.Pieces)],
    ),
    "combine_pieces": (
        c_int64,
        [c_void_p, POINTER(arguments.AttentionLayer), POINTER(arguments.Step), POINTER(arguments.Pieces)],
    ),
    "project_attended": (
        c_int64,
        [c_void_p, POINTER(arguments.AttentionLayer), POINTER(arguments.Step), POINTER(arguments.Sum)],
    ),
    "project_latents": (c_int64, [c_void_p, POINTER(arguments.LatentLayer), POINTER(arguments.Step), c_void_p]),
    "attend_latent_pieces": (
        c_int64,
        [c_void_p, POINTER(arguments.LatentLayer), POINTER(arguments.Step), POINTER(arguments.Pieces)],
    ),
    "combine_latent_pieces": (
        c_int64,
        [c_void_p, POINTER(arguments.LatentLayer), POINTER(arguments.Step), POINTER(arguments.Pieces)],
    ),
    "project_attended_latents": (
        c_int64,
        [c_void_p, POINTER(arguments.LatentLayer), POINTER(arguments.Step), POINTER(arguments.Sum)],
    ),
    "finish_sum": (c_int64, [c_void_p, POINTER(arguments.Step), POINTER(arguments.Sum)]),
    "add_rounded": (None, [c_void_p, c_void_p, c_void_p, c_void_p, c_double, c_int64, c_int64]),
    "add_normalised": (
        None,
        [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_double, c_double],
    ),
    "round_to_float": (None, [c_void_p, c_void_p, c_void_p, c_double, c_int64, c_int64]),
    "scale_logits": (None, [c_void_p, c_void_p, c_int64, c_double, c_double]),
    "rope_angles": (None, [c_void_p, c_int64, c_void_p, c_int64, c_double, c_void_p, c_void_p]),
    "embed": (None, [POINTER(arguments.Matrix), c_void_p, c_int64, c_void_p]),
    "normalise": (
        None,
        [c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_double, c_int64, POINTER(arguments.Activations)],
    ),
    "column_parallel": (
        c_int64,
        [c_void_p, POINTER(arguments.Matrix), POINTER(arguments.Activations), c_int64, c_void_p, c_int64],
    ),
    "row_parallel": (
        c_int64,
        [c_void_p, POINTER(arguments.Matrix), POINTER(arguments.Activations), c_int64, c_void_p, c_int64],
    ),
    "quantise": (None, [POINTER(arguments.Activations), c_int64]),
    "sum_shared": (c_int64, [POINTER(arguments.Window), c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64]),
    "sum_host": (c_int64, [POINTER(arguments.Window), c_int64, c_int64, c_int64, c_int64]),
    "publish": (None, [POINTER(arguments.Window), c_int64]),
    "pack": (c_int64, [c_void_p, c_int64, c_void_p]),
    "unpack": (c_int64, [c_void_p, c_int64, c_int64, c_void_p, c_int64]),
    "touch_pages": (None, [c_void_p, c_void_p, c_int64]),
    "read_memory": (None, [c_void_p, c_void_p, c_int64, c_void_p]),
    "watch": (c_int64, [c_void_p, c_int64]),
    "times": (None, [c_void_p, c_void_p]),
    "barriers": (None, [c_void_p, c_int64]),
    "offset": (c_int64, [c_int64]),
}


class Library:
    """The kernels for one instruction set."""

    def __init__(self, isa: str):
        self.isa = isa
        self.calls: Any = SimpleNamespace()
        library = open_library(isa)
        for name, (result, parameters) in _SIGNATURES.items():
            function = getattr(library, f"mpillama_{name}")
            function.restype, function.argtypes = result, parameters
            setattr(self.calls, name, function)

    def team(self, threads: int, yields: bool = False) -> "Team":
        """Start the threads of a rank; `yields` if a host has more of them than cores."""
        return Team(self, threads, yields)

    def offsets(self) -> list[int]:
        """Sizes and offsets of the structs of arguments.STRUCTS, as the compiler sees them."""
        found: list[int] = []
        while (offset := self.calls.offset(len(found))) >= 0:
            found.append(offset)
        return found

    def embed_rows(self, matrix: arguments.Matrix, rows: Array, out: Array) -> None:
        """out[t] = row rows[t] of a matrix, zeros where it is negative; int64 [tokens], float64 [tokens, columns]."""
        self.calls.embed(byref(matrix), rows.ctypes.data, len(rows), out.ctypes.data)

    def angles(self, positions: Array, inverse_frequencies: Array, factor: float, cosines: Array, sines: Array) -> None:
        """cos and sin of position * frequency, times a factor; int32 [tokens], float32 [half], [tokens, half]."""
        self.calls.rope_angles(
            positions.ctypes.data, len(positions), inverse_frequencies.ctypes.data, len(inverse_frequencies), factor,
            cosines.ctypes.data, sines.ctypes.data,
        )  # fmt: skip


@cache
def load(isa: str) -> Library:
    """The library for an instruction set; UserError if it was made of other sources."""
    return Library(isa)


class Team:
    """The threads of a rank, and what they compute together."""

    def __init__(self, library: Library, threads: int, yields: bool = False):
        self.library = library
        self._calls = library.calls
        self.threads = threads
        cpus = (c_int32 * threads)(*thread_places(threads))
        self._handle = self._calls.start_team(threads, 0 if yields else SPINS, cpus)
        if self._handle is None:
            raise MemoryError(f"can't start new thread: {threads} are wanted")

    def close(self) -> None:
        """End the threads; the caller's own stays."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._calls.end_team(handle)

    def attention_half(
        self, layer: arguments.AttentionLayer, step: arguments.Step, total: arguments.Sum | None = None
    ) -> bool:
        """Norm, q/k/v, RoPE and cache, attention, o_proj; then `total` adds up over ranks and to step.x.

        Returns whether that is done: False if other ranks are late. Without `total` the result stays in step.partial.
        """
        return self._done(self._calls.attention_half(self._handle, byref(layer), byref(step), _optional(total)))

    def project_and_sum(self, layer: arguments.AttentionLayer, step: arguments.Step) -> None:
        """Norm, q/k/v; this rank's addends of the sums of squares go to step.squares. attend_projected goes on."""
        self._enough(self._calls.project_and_sum(self._handle, byref(layer), byref(step)))

    def attend_projected(
        self, layer: arguments.AttentionLayer, step: arguments.Step, total: arguments.Sum | None = None
    ) -> bool:
        """The rest of attention_half, when step.squares holds the sums over ranks."""
        return self._done(self._calls.attend_projected(self._handle, byref(layer), byref(step), _optional(total)))

    def block_sparse_half(
        self, layer: arguments.BlockSparseLayer, step: arguments.Step, total: arguments.Sum | None = None
    ) -> bool:
        """As attention_half, for attention to blocks that an index chooses."""
        return self._done(self._calls.block_sparse_half(self._handle, byref(layer), byref(step), _optional(total)))

    def latent_half(
        self, layer: arguments.LatentLayer, step: arguments.Step, total: arguments.Sum | None = None
    ) -> bool:
        """As attention_half, for multi-head latent attention."""
        return self._done(self._calls.latent_half(self._handle, byref(layer), byref(step), _optional(total)))

    def delta_half(self, layer: arguments.DeltaLayer, step: arguments.Step, total: arguments.Sum | None = None) -> bool:
        """As attention_half, for a gated delta net: projections, convolution, delta rule, gated norm, o_proj."""
        return self._done(self._calls.delta_half(self._handle, byref(layer), byref(step), _optional(total)))

    def mlp_half(self, layer: arguments.MlpLayer, step: arguments.Step, total: arguments.Sum | None = None) -> bool:
        """Norm, SwiGLU or experts; `total` and the result are those of attention_half."""
        return self._done(self._calls.mlp_half(self._handle, byref(layer), byref(step), _optional(total)))

    # A first half in pieces, where ranks hold parts of the positions (kernels/src/context_parallel.h).

    def project(self, layer: arguments.AttentionLayer, step: arguments.Step) -> None:
        """Norm, q/k/v."""
        self._enough(self._calls.project(self._handle, byref(layer), byref(step)))

    def rotate(
        self, layer: arguments.AttentionLayer, step: arguments.Step, first_kv: int, kv_count: int, out: Array
    ) -> None:
        """RoPE; queries, and keys and values of some KV heads, go to float32 `out` [tokens, their channels]."""
        address = out.ctypes.data
        self._enough(self._calls.rotate(self._handle, byref(layer), byref(step), first_kv, kv_count, address))

    def attend_pieces(self, whole: arguments.AttentionLayer, step: arguments.Step, pieces: arguments.Pieces) -> None:
        """Keys and values into the cache, and pieces.sent; `whole` has the heads of all ranks."""
        self._enough(self._calls.attend_pieces(self._handle, byref(whole), byref(step), byref(pieces)))

    def combine_pieces(self, layer: arguments.AttentionLayer, step: arguments.Step, pieces: arguments.Pieces) -> None:
        """What project_attended goes on with, from pieces.received."""
        self._enough(self._calls.combine_pieces(self._handle, byref(layer), byref(step), byref(pieces)))

    def project_attended(
        self, layer: arguments.AttentionLayer, step: arguments.Step, total: arguments.Sum | None = None
    ) -> bool:
        """o_proj, and the sum as in attention_half."""
        return self._done(self._calls.project_attended(self._handle, byref(layer), byref(step), _optional(total)))

    def project_latents(self, layer: arguments.LatentLayer, step: arguments.Step, out: Array) -> None:
        """Norm, latents into the cache; queries go to float32 `out` [tokens, heads, channels of the cache]."""
        self._enough(self._calls.project_latents(self._handle, byref(layer), byref(step), out.ctypes.data))

    def attend_latent_pieces(
        self, whole: arguments.LatentLayer, step: arguments.Step, pieces: arguments.Pieces
    ) -> None:
        """As attend_pieces; the cache is written already."""
        self._enough(self._calls.attend_latent_pieces(self._handle, byref(whole), byref(step), byref(pieces)))

    def combine_latent_pieces(
        self, layer: arguments.LatentLayer, step: arguments.Step, pieces: arguments.Pieces
    ) -> None:
        """As combine_pieces."""
        self._enough(self._calls.combine_latent_pieces(self._handle, byref(layer), byref(step), byref(pieces)))

    def project_attended_latents(
        self, layer: arguments.LatentLayer, step: arguments.Step, total: arguments.Sum | None = None
    ) -> bool:
        """v_b and o_proj, and the sum as in attention_half."""
        done = self._calls.project_attended_latents(self._handle, byref(layer), byref(step), _optional(total))
        return self._done(done)

    def choose_experts(self, router: arguments.Router, experts: int, logits: Array) -> tuple[Array, Array]:
        """Which experts tokens take by their logits, and the shares, the best first: int64, float32 [tokens, chosen].

        `logits` float32 [tokens, width] are overwritten.
        """
        chosen, shares = (np.empty((len(logits), router.chosen), kind) for kind in (np.int64, np.float32))
        addresses = logits.ctypes.data, len(logits), chosen.ctypes.data, shares.ctypes.data
        self._enough(self._calls.choose_experts(self._handle, byref(router), experts, *addresses))
        return chosen, shares

    def finish_sum(self, step: arguments.Step, total: arguments.Sum) -> bool:
        """Go on to add up with ranks that were late; returns whether it is done."""
        return self._done(self._calls.finish_sum(self._handle, byref(step), byref(total)))

    def add_rounded(self, x: Array, total: Array, bias: Array | None = None, factor: float = 1.0) -> None:
        """x += factor * (total rounded to float32, then the bias); x float32, total float64 [tokens, width]."""
        self._calls.add_rounded(
            self._handle, x.ctypes.data, total.ctypes.data, arguments.address(bias), factor, len(x), x.shape[1]
        )

    def add_normalised(
        self, x: Array, addend: Array, weight: Array, size: int, eps: float, factor: float = 1.0
    ) -> None:
        """x += factor * RMSNorm(addend), which is overwritten; float32 [tokens, width], `size` of it no padding."""
        self._calls.add_normalised(
            self._handle, x.ctypes.data, addend.ctypes.data, len(x), x.shape[1], weight.ctypes.data, size, eps, factor
        )

    def round_to_float(self, total: Array, out: Array, factor: float = 1.0) -> None:
        """out = total rounded to float32, times a factor; [tokens, width]."""
        self._calls.round_to_float(self._handle, total.ctypes.data, out.ctypes.data, factor, len(out), out.shape[1])

    def scale_logits(self, logits: Array, divisor: float, cap: float) -> None:
        """logits / divisor, bent to +-cap unless that is 0, in place; float32 [tokens, rows], rows in groups of 16."""
        self._calls.scale_logits(self._handle, logits.ctypes.data, logits.size, divisor, cap)

    def normalise(
        self, x: Array, weight: Array, size: int, eps: float, quantised: bool, h: arguments.Activations
    ) -> None:
        """h = RMSNorm(x), with its int8 blocks if `quantised`; `size` is the width without the padding."""
        self._calls.normalise(
            self._handle, x.ctypes.data, len(x), weight.ctypes.data, size, eps, int(quantised), byref(h)
        )

    def column_parallel(
        self, matrix: arguments.Matrix, h: arguments.Activations, out: Array, in_flight: int = 1
    ) -> None:
        """out = this rank's rows of a matrix times h; float32 [tokens, rows]."""
        enough = self._calls.column_parallel(
            self._handle, byref(matrix), byref(h), len(out), out.ctypes.data, in_flight
        )
        self._enough(enough)

    def row_parallel(self, matrix: arguments.Matrix, h: arguments.Activations, out: Array, in_flight: int = 1) -> None:
        """out = this rank's panels of a matrix times h, on the grid; float64 [tokens, rows]."""
        enough = self._calls.row_parallel(self._handle, byref(matrix), byref(h), len(out), out.ctypes.data, in_flight)
        self._enough(enough)

    def touch_pages(self, memory: Array) -> None:
        """Write to every page of fresh memory (uint8), so that it lies near the thread that will read it."""
        self._calls.touch_pages(self._handle, memory.ctypes.data, memory.size)

    def read_memory(self, memory: Array, results: Array) -> int:
        """Read memory (uint8) once, all threads at the same time; results int64 [threads]. Returns the bytes read."""
        self._calls.read_memory(self._handle, memory.ctypes.data, memory.size, results.ctypes.data)
        return memory.size // self.threads // 512 * 512 * self.threads

    def watch(self, wanted: bool) -> None:
        """Begin to count what the threads' time goes to, or end it."""
        self._enough(self._calls.watch(self._handle, int(wanted)))

    def times(self) -> Array:
        """Seconds since the watch began: float64 [threads, PARTS]."""
        nanoseconds = np.zeros((self.threads, len(PARTS)), np.int64)
        self._calls.times(self._handle, nanoseconds.ctypes.data)
        return nanoseconds * 1e-9

    def barriers(self, count: int) -> None:
        """Let the threads meet so many times."""
        self._calls.barriers(self._handle, count)

    @classmethod
    def _done(cls, status: int) -> bool:
        cls._enough(status)
        return status == DONE

    @staticmethod
    def _enough(enough: int) -> None:
        if not enough:
            raise MemoryError("no memory is left for the kernels' scratch")


def _optional(struct: ctypes.Structure | None) -> object:
    return None if struct is None else byref(struct)
