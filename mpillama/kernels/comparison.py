"""Whether two libraries give the same bits: asked where an instruction set was never run by its makers."""

from ctypes import byref

import numpy as np

from mpillama.kernels import arguments
from mpillama.kernels.activations import places
from mpillama.kernels.library import Library

GROUPS, BLOCKS, PANELS, TOKENS = 8, 6, 3, 40
BLOCK_BYTES = {"q8_0": 512, "q4_0": 256}


def same_products(first: Library, second: Library) -> bool:
    """Whether column- and row-parallel products of each quantised type have the same bits."""
    return all(np.array_equal(_products(first, kind), _products(second, kind)) for kind in BLOCK_BYTES)


def _products(library: Library, kind: str) -> np.ndarray:
    """Some products of one token and of many, with one thread: the bits as int32."""
    random = np.random.default_rng(0)
    blocks, rows = BLOCKS * PANELS, 16 * GROUPS
    values = random.integers(0, 256, (PANELS, GROUPS, BLOCKS, BLOCK_BYTES[kind]), dtype=np.uint8)
    scales = random.integers(0x1C00, 0x2000, (PANELS, GROUPS, BLOCKS, 16), dtype=np.uint16)
    number, at = arguments.WEIGHT_TYPES[kind], (values.ctypes.data, scales.ctypes.data)
    column = arguments.Matrix(*at, number, 1, 1, GROUPS, 32 * blocks)
    row = arguments.Matrix(*at, number, 1, PANELS, GROUPS, 32 * BLOCKS)
    team, found = library.team(1), []
    for tokens in (1, TOKENS):
        count = places(tokens, blocks)
        x = random.standard_normal((tokens, 32 * blocks)).astype(np.float32)
        room = np.empty((count, 32), np.int8), np.empty(count, np.float32), np.empty(count, np.int32)
        h = arguments.Activations(x.ctypes.data, *(part.ctypes.data for part in room), x.shape[1])
        library.calls.quantise(byref(h), tokens)
        out, total = np.empty((tokens, rows), np.float32), np.empty((tokens, rows))
        team.column_parallel(column, h, out)
        team.row_parallel(row, h, total)
        found += [out.view(np.int32).reshape(-1), total.view(np.int32).reshape(-1)]
    team.close()
    return np.concatenate(found)
