"""What the tests of kernels share: teams of threads of every instruction set here, matrices, activations."""

import os
from collections.abc import Callable
from ctypes import CDLL, byref
from functools import cache
from typing import TypeVar
from unittest.mock import patch

import numpy as np

from mpillama.kernels.isa import host_features, sets_of
from mpillama.kernels.library import Library, Team, is_built, load
from mpillama.kernels.shared_sum import SharedWindow, window_bytes
from mpillama.models.linear import Matrix
from mpillama.models.workspace import Activations
from mpillama.quant.registry import WEIGHT_TYPES
from mpillama.quant.weight_type import BLOCK, LANES, WeightType

Array = np.ndarray
Result = TypeVar("Result")

ISAS = [isa.name for isa in sets_of(host_features()) if is_built(isa.name)]
"""The best first."""
THREADS = (1, 2, 3)
TYPES = list(WEIGHT_TYPES)
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 70)
"""At and around the widths of tiles."""
GRID = 2.0**-30


LIBRARY_TOO = "TEST_LIBRARY_TOO"
"""An environment variable: the path of a library that is compared with the best one instead of the others."""


@cache
def libraries() -> list[Library]:
    """One for each instruction set."""
    if not (path := os.environ.get(LIBRARY_TOO)):
        return [load(name) for name in ISAS]
    best = load(ISAS[0])
    with patch("mpillama.kernels.library.open_library", lambda name: CDLL(name)):
        return [best, Library(path)]


@cache
def teams() -> list[Team]:
    """Each library with each number of threads; three of them give their cores away at once."""
    return [library.team(threads, yields=threads > 2) for library in libraries() for threads in THREADS]


def everywhere(run: Callable[[Team], Result]) -> Result:
    """What `run` computes (an array, or a tuple of them): the same bits with every team."""
    first, *others = teams()
    expected = run(first)
    for team in others:
        assert same_bits(run(team), expected), f"{team.library.isa} with {team.threads} threads"
    return expected


def same_bits(found: Result, expected: Result) -> bool:
    """Whether two results are equal, the sign of zeros included; one NaN is like another."""
    if isinstance(found, tuple):
        return len(found) == len(expected) and all(map(same_bits, found, expected))
    if found.dtype.kind != "f" or not found.size:
        return found.shape == expected.shape and np.array_equal(found, expected)
    nan = np.isnan(expected)
    return np.array_equal(np.isnan(found), nan) and found[~nan].tobytes() == expected[~nan].tobytes()


def random_matrix(rows: int, columns: int, seed: int = 0) -> Array:
    """Standard normal, float32."""
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def packed(x: Array, weight_type: WeightType | str, panel: int | None = None) -> tuple[Matrix, Array]:
    """The matrix as the kernels take it, and the float64 values that it holds."""
    kind = WEIGHT_TYPES[weight_type] if isinstance(weight_type, str) else weight_type
    arrays = kind.pack(x, panel)
    return Matrix.of(kind, arrays), kind.unpack(arrays).astype(np.float64)


def matrix(kind: WeightType, *arrays: Array) -> Matrix:
    """From arrays in row lanes."""
    return Matrix.of(kind, arrays)


def part(of: Matrix, index: slice | Array) -> Matrix:
    """Some groups of a column-parallel matrix, or some panels of a row-parallel one."""
    return Matrix.of(of.weight_type, [np.ascontiguousarray(a[index]) for a in of.arrays])


def stacked(matrices: list[Matrix]) -> Matrix:
    """Experts."""
    return Matrix.of(matrices[0].weight_type, [np.stack(a) for a in zip(*(m.arrays for m in matrices), strict=True)])


def blank_activations(tokens: int, columns: int) -> Activations:
    """NaN where floats are to be written, zeros where blocks are."""
    h = Activations.empty(tokens, columns)
    h.x[:] = np.nan
    for array in (h.values, h.scales, h.starts, h.halves):
        array[:] = 0
    return h


def activations(library: Library, x: Array) -> Activations:
    """Float32 [tokens, columns] with its blocks."""
    h = blank_activations(*x.shape)
    h.x[:] = x
    library.calls.quantise(byref(h.argument), len(x))
    return h


def blocks_of(h: Activations) -> tuple[Array, Array, Array, Array]:
    """Its blocks, scales, starts and halves in memory's order."""
    return h.values.copy(), h.scales.copy(), h.starts.copy(), h.halves.copy()


def by_token(h: Activations, array: Array) -> Array:
    """[tokens, blocks, …] from tiles of 16 tokens, or of all if there are fewer: [tile, block, token, …]."""
    tokens, blocks = len(h.x), h.x.shape[1] // BLOCK
    width = min(tokens, 16)
    tiles = array.reshape(-1, blocks, width, *array.shape[1:])
    return tiles.swapaxes(1, 2).reshape(-1, blocks, *array.shape[1:])[:tokens]


def quantised(x: Array) -> tuple[Array, Array]:
    """int8 blocks [..., n, 32] and float32 scales [..., n] of finite numbers, as they are defined."""
    blocks = np.ascontiguousarray(x, np.float32).reshape(*x.shape[:-1], -1, BLOCK)
    largest = np.abs(blocks).max(axis=-1, initial=0)
    largest[largest < 1e-30] = 0
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(blocks * inverse[..., None]).astype(np.int8), largest / np.float32(127)


def hadamard(x: Array, factor: float) -> Array:
    """The Hadamard transform of blocks of 32 of the last axis, times a factor; in the type of x."""
    half = BLOCK // 2
    while half:
        pairs = x.reshape(*x.shape[:-1], -1, 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([first + second, first - second], axis=-2).reshape(x.shape)
        half //= 2
    return x * x.dtype.type(factor)


def nibbles(x: Array) -> tuple[Array, Array]:
    """What a q4 cache makes of finite numbers: int8 blocks [..., n, 32] from -8 to 7 and float32 scales [..., n]."""
    blocks = hadamard(np.ascontiguousarray(x, np.float32), 0.25).reshape(*x.shape[:-1], -1, BLOCK)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)
    usable = np.abs(extreme) >= 1e-30
    inverse = np.divide(np.float32(-8), extreme, out=np.zeros_like(extreme), where=usable)
    numbers = np.minimum(np.rint(blocks * inverse), 7).astype(np.int8)
    return numbers, np.where(usable, extreme * np.float32(-0.125), np.float32(0))[..., 0]


def cached_blocks(x: Array, kv_type: str) -> tuple[Array, Array]:
    """Of a q8 or q4 cache, the stored blocks of float32 [..., channels] and their scales in float32."""
    if kv_type == "q8":
        return quantised(x)
    numbers, scales = nibbles(x)
    low, high = np.split((numbers + 8).astype(np.uint8), 2, axis=-1)
    return low | high << 4, scales


def from_cached_blocks(blocks: Array, scales: Array, kv_type: str) -> Array:
    """What stored blocks [..., n, 32 or 16] and float16 scales [..., n] stand for: float64 [..., n * 32]."""
    if kv_type == "q4":
        blocks = np.concatenate([blocks & 15, blocks >> 4], axis=-1).astype(np.int8) - 8
    values = blocks * scales.astype(np.float64)[..., None]
    values = values.reshape(*values.shape[:-2], -1)
    return hadamard(values, 0.125) if kv_type == "q4" else values


def seen_by(weight_type: WeightType, x: Array) -> Array:
    """What a matrix of this type multiplies, in float64."""
    if not weight_type.quantised:
        return x.astype(np.float64)
    values, scales = quantised(x)
    return (values * scales[..., None].astype(np.float64)).reshape(x.shape)


def column_parallel(team: Team, w: Matrix, x: Array, in_flight: int = 1) -> Array:
    """Rows times x."""
    h, out = activations(team.library, x), np.full((len(x), w.rows), np.nan, np.float32)
    team.column_parallel(w.column_parallel(), h.argument, out, in_flight)
    return out


def row_parallel(team: Team, w: Matrix, x: Array, in_flight: int = 1) -> Array:
    """Panels times x, on the grid."""
    h, out = activations(team.library, x), np.full((len(x), w.values.shape[-3] * LANES), np.nan)
    team.row_parallel(w.row_parallel(), h.argument, out, in_flight)
    return out


def windows_of(teams: list[Team], capacity: int) -> list[SharedWindow]:
    """The window in which ranks add up, as each of them sees it; a rank has one of the teams."""
    memory = np.zeros(window_bytes(len(teams), capacity) + 64, np.uint8)
    aligned = memory[-memory.ctypes.data % 64 :]
    found = [SharedWindow(team, aligned, len(teams), rank, capacity) for rank, team in enumerate(teams)]
    for window in found:
        window.clear()
    return found
