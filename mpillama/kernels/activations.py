"""How much memory quantised activations take; kernels/src/activations.h says how they lie."""

TILE_WIDTH = 16
"""Tokens of a full tile."""


def places(tokens: int, blocks: int) -> int:
    """Blocks of memory that a step of this many tokens takes."""
    width = min(tokens, TILE_WIDTH)
    return -(-tokens // max(width, 1)) * width * blocks
