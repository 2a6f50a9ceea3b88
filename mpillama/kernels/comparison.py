"""Whether two libraries give the same bits: asked where an instruction set was never run by its makers."""

from ctypes import byref

import numpy as np

from mpillama.kernels import arguments
from mpillama.kernels.arguments import places
from mpillama.kernels.library import Library
from mpillama.quant.registry import WEIGHT_TYPES
from mpillama.quant.weight_type import LaneArray, WeightType

GROUPS, BLOCKS, PANELS, TOKENS = 8, 6, 3, 40
QUANTISED = [kind for kind in WEIGHT_TYPES.values() if kind.quantised]


def same_products(first: Library, second: Library) -> bool:
    """Whether column- and row-parallel products of each quantised type have the same bits."""
    return all(np.array_equal(_products(first, kind), _products(second, kind)) for kind in QUANTISED)


def _anything(random: np.random.Generator, lane: LaneArray, size: int) -> np.ndarray:
    """Integers of any bits; small floats or exponents where they are scales."""
    if not lane.suffix:
        return random.integers(0, 256, size).astype("u1")
    if np.dtype(lane.dtype).kind == "f":
        return random.integers(0x1C00, 0x2000, size).astype("u2")
    return random.integers(110, 124, size).astype("u1")


def _matrix(kind: WeightType, arrays: list[np.ndarray], panels: int, columns: int) -> arguments.Matrix:
    matrix = arguments.Matrix(type=kind.number, experts=1, panels=panels, groups=GROUPS, columns=columns)
    matrix.super_columns = kind.super_columns(columns)
    for lane, array in zip(kind.lanes, arrays, strict=True):
        setattr(matrix, lane.part, array.ctypes.data)
    return matrix


def _products(library: Library, kind: WeightType) -> np.ndarray:
    """Some products of one token and of many, with one thread: the bits as int32."""
    random = np.random.default_rng(0)
    blocks, rows = BLOCKS * PANELS, 16 * GROUPS
    sizes = [PANELS * GROUPS * lane.entries(32 * BLOCKS) * lane.entry for lane in kind.lanes]
    arrays = [_anything(random, lane, size) for lane, size in zip(kind.lanes, sizes, strict=True)]
    column = _matrix(kind, arrays, 1, 32 * blocks)
    row = _matrix(kind, arrays, PANELS, 32 * BLOCKS)
    team, found = library.team(1), []
    for tokens in (1, TOKENS):
        count = places(tokens, blocks)
        x = random.standard_normal((tokens, 32 * blocks)).astype(np.float32)
        room = np.empty((count, 32), np.int8), np.empty(count, np.float32), *np.empty((2, count), np.int32)
        h = arguments.Activations(x.ctypes.data, *(part.ctypes.data for part in room), x.shape[1])
        library.calls.quantise(byref(h), tokens)
        out, total = np.empty((tokens, rows), np.float32), np.empty((tokens, rows))
        team.column_parallel(column, h, out)
        team.row_parallel(row, h, total)
        found += [out.view(np.int32).reshape(-1), total.view(np.int32).reshape(-1)]
    team.close()
    return np.concatenate(found)
