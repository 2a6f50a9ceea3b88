"""How quantised activations lie in memory: tiles of up to 16 tokens, so that a product reads them in one run.

Within a tile blocks advance, and a block's tokens lie side by side: [tile, block, token in tile, 32]. Values are int8
[n, 32], scales float32 [n] and starts int32 [n], n = tiles * blocks * width. A start is -8 times the sum of the values.
"""

from numba import njit

TILE_WIDTH = 16
"""Tokens of a full tile."""


@njit(nogil=True, cache=True, inline="always")
def tile_width(tokens):
    """Tokens side by side in a step of this many tokens."""
    return min(tokens, TILE_WIDTH)


@njit(nogil=True, cache=True, inline="always")
def block_place(tokens, blocks, token, block):
    """Where a block of a token lies, counted in blocks."""
    width = tile_width(tokens)
    return (token // width * blocks + block) * width + token % width


def places(tokens: int, blocks: int) -> int:
    """Blocks of memory that a step of this many tokens takes."""
    width = min(tokens, TILE_WIDTH)
    return -(-tokens // max(width, 1)) * width * blocks


places_of = njit(nogil=True, cache=True)(places)
"""The same for kernels."""
