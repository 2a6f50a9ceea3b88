"""Rows of weights as foreign checkpoints store them: their sizes, and their values.

A row is a whole number of blocks; a block holds some values in some bytes (1 value for the float types).
GGML's blocks: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from collections.abc import Sequence
from math import prod

import numpy as np

from mpillama.errors import UserError
from mpillama.layout.blocks import Blocks, Float32, dequantise_q4_0, dequantise_q8_0
from mpillama.layout.weight_types import BLOCK

BLOCKS = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}
"""Values and bytes of a block, by stored type."""


def row_bytes(stored: str, columns: int) -> int:
    """Bytes of a row of `columns` values; ValueError if they are no whole number of blocks."""
    values, count = BLOCKS[stored]
    if columns % values:
        raise ValueError(f"rows of {columns} values are no whole number of {stored} blocks of {values}")
    return columns // values * count


def stored_bytes(stored: str, shape: Sequence[int]) -> int:
    """Bytes of a whole tensor; ValueError if a length is not positive or rows are no whole number of blocks."""
    if any(length < 1 for length in shape):
        raise ValueError(f"its shape is {tuple(shape)}")
    return prod(shape[:-1]) * row_bytes(stored, shape[-1]) if shape else row_bytes(stored, 1)


def decode_rows(stored: str, raw: np.ndarray) -> Float32:
    """Return float32 [rows, columns] from the bytes of rows, uint8 [rows, row_bytes]."""
    raw = np.ascontiguousarray(raw)
    with np.errstate(invalid="ignore", over="ignore"):  # infinite scales are the file's own
        if stored == "f32":
            return raw.view("<f4").astype(np.float32)
        if stored == "f16":
            return raw.view("<f2").astype(np.float32)
        if stored == "bf16":
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        if stored == "q8_0":
            return dequantise_q8_0(*blocks_of(stored, raw))
        if stored == "q4_0":
            return dequantise_q4_0(*blocks_of(stored, raw))
        return _dequantise_with_gguf(stored, raw)


def blocks_of(stored: str, raw: np.ndarray) -> Blocks:
    """Return the values [rows, k/32, 32] and float16 scales [rows, k/32] that rows of q8_0 or q4_0 are made of.

    Values are int8 for q8_0 and nibbles in uint8 for q4_0, both in the order of the row's elements, as
    mpillama.layout.lanes.pack_blocks takes them.
    """
    if stored not in ("q8_0", "q4_0"):
        raise ValueError(f"{stored} has no blocks of {BLOCK} values with one scale")
    blocks = np.ascontiguousarray(raw).reshape(len(raw), -1, BLOCKS[stored][1])
    scales = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0]
    values = blocks[:, :, 2:]
    if stored == "q8_0":
        return np.ascontiguousarray(values).view(np.int8), scales
    return np.concatenate([values & 15, values >> 4], axis=2), scales


def _dequantise_with_gguf(stored: str, raw: np.ndarray) -> Float32:
    """Leave the rarer types to the gguf package."""
    try:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise UserError(
            f"Weights stored as {stored} are read with the package gguf, which is not installed: "
            "pip install 'mpillama[convert]'."
        ) from error
    return dequantize(raw, GGMLQuantizationType[stored.upper()])
