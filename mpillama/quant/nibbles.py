"""Integers of 2 to 6 bits: how they stand in GGML's blocks, and in the steps of row lanes.

In a block byte i holds elements i (low nibble) and i + 16; in row lanes steps j and j + 4 share the bytes of a step.
The fifth bits stand before the nibbles of a block, element by element; in row lanes they are one more step behind the
nibbles', where bit j belongs to step j. Pairs of bits take two steps, of which the first has steps 0 to 3 and the other
steps 4 to 7, two bits each from the lowest on. Of three bits, bytes have two steps in their lower six bits, of six bits
one; their upper two bits have the last two steps (kernels/src/types/nibbles.h).
"""

import numpy as np

from mpillama.quant.weight_type import BLOCK, LANES

NIBBLE_BYTES = LANES * BLOCK // 2
FIVE_BIT_BYTES = NIBBLE_BYTES + LANES * BLOCK // 8
PAIR_BYTES = LANES * BLOCK // 4
THREE_BIT_BYTES = PAIR_BYTES + LANES * BLOCK // 8
SIX_BIT_BYTES = NIBBLE_BYTES + PAIR_BYTES
PLACES = np.arange(0, 8, 2, dtype=np.uint8)


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


def pairs_of(packed: np.ndarray) -> np.ndarray:
    """Return values [..., runs, 4, bytes] from uint8 [..., runs, bytes] whose pairs of bits lie that far apart."""
    values: np.ndarray = packed[..., None, :] >> PLACES[:, None] & 3
    return values


def pack_pairs(steps: np.ndarray) -> np.ndarray:
    """Return [groups, blocks, 2, 16, 4] from eight steps of values."""
    groups, blocks, _, *rest = steps.shape
    fours = steps.reshape(groups, blocks, 2, 4, *rest) << PLACES[:, None, None]
    shared: np.ndarray = np.bitwise_or.reduce(fours, axis=3)
    return shared


def unpack_pairs(steps: np.ndarray) -> np.ndarray:
    """Undo pack_pairs."""
    groups, blocks, _, *rest = steps.shape
    return (steps[:, :, :, None] >> PLACES[:, None, None] & 3).reshape(groups, blocks, 8, *rest)


def pack_three_bits(steps: np.ndarray) -> np.ndarray:
    """Return [groups, blocks, 3, 16, 4] from eight steps of values."""
    sixth, seventh = steps[:, :, 6], steps[:, :, 7]
    upper = np.stack([sixth & 3, seventh & 3, sixth >> 2 | seventh >> 2 << 1], axis=2)
    packed: np.ndarray = steps[:, :, 0:6:2] | steps[:, :, 1:6:2] << 3 | upper << 6
    return packed


def unpack_three_bits(steps: np.ndarray) -> np.ndarray:
    """Undo pack_three_bits."""
    pairs = np.stack([steps & 7, steps >> 3 & 7], axis=3)
    groups, blocks, _, _, *rest = pairs.shape
    first, second, third = (steps[:, :, i] >> 6 for i in range(3))
    last = np.stack([first | (third & 1) << 2, second | third >> 1 << 2], axis=2)
    return np.concatenate([pairs.reshape(groups, blocks, 6, *rest), last], axis=2)


def pack_six_bit_values(steps: np.ndarray) -> np.ndarray:
    """Return [groups, blocks, 6, 16, 4] from eight steps of values."""
    places = np.arange(0, 6, 2, dtype=np.uint8)[:, None, None]
    upper = [steps[:, :, i, None] >> places & 3 for i in (6, 7)]
    packed: np.ndarray = steps[:, :, :6] | np.concatenate(upper, axis=2) << 6
    return packed


def unpack_six_bit_values(steps: np.ndarray) -> np.ndarray:
    """Undo pack_six_bit_values."""
    upper = steps >> 6
    last = [upper[:, :, i] | upper[:, :, i + 1] << 2 | upper[:, :, i + 2] << 4 for i in (0, 3)]
    return np.concatenate([steps & 63, np.stack(last, axis=2)], axis=2)
