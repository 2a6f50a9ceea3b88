"""Integers of 4 and 5 bits: how they stand in GGML's blocks, and in the steps of row lanes.

In a block byte i holds elements i (low nibble) and i + 16; in row lanes steps j and j + 4 share the bytes of a step.
The fifth bits stand before the nibbles of a block, element by element; in row lanes they are one more step behind the
nibbles', where bit j belongs to step j.
"""

import numpy as np

from mpillama.quant.weight_type import BLOCK, LANES

NIBBLE_BYTES = LANES * BLOCK // 2
FIVE_BIT_BYTES = NIBBLE_BYTES + LANES * BLOCK // 8


def nibbles_of(packed: np.ndarray) -> np.ndarray:
    """Return values [rows, blocks, 32] from uint8 [rows, blocks, 16]."""
    return np.concatenate([packed & 15, packed >> 4], axis=2)


def pack_nibbles(steps: np.ndarray) -> np.ndarray:
    """Return [groups, blocks, 4, 16, 4] from eight steps of values."""
    shared: np.ndarray = steps[:, :, :4] | steps[:, :, 4:] << 4
    return shared


def unpack_nibbles(steps: np.ndarray) -> np.ndarray:
    """Undo pack_nibbles."""
    return np.concatenate([steps & 15, steps >> 4], axis=2)


def five_bits_of(packed: np.ndarray) -> np.ndarray:
    """Return values [rows, blocks, 32] from uint8 [rows, blocks, 20]."""
    fifth = np.unpackbits(packed[:, :, :4], axis=2, bitorder="little")
    values: np.ndarray = nibbles_of(packed[:, :, 4:]) | fifth << 4
    return values


def pack_five_bits(steps: np.ndarray) -> np.ndarray:
    """Return [groups, blocks, 5, 16, 4] from eight steps of values."""
    fifth = np.packbits(steps >> 4, axis=2, bitorder="little")
    return np.concatenate([pack_nibbles(steps & 15), fifth], axis=2)


def unpack_five_bits(steps: np.ndarray) -> np.ndarray:
    """Undo pack_five_bits."""
    fifth = np.unpackbits(steps[:, :, 4:], axis=2, bitorder="little")
    values: np.ndarray = unpack_nibbles(steps[:, :, :4]) | fifth << 4
    return values
