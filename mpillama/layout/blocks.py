"""Quantisation in blocks of 32, value for value and rounding for rounding that of GGML's Q8_0 and Q4_0.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and the reference quantiser of the gguf package.
"""

import numpy as np

from mpillama.layout.weight_types import BLOCK

Float32 = np.ndarray
Blocks = tuple[np.ndarray, np.ndarray]


def _round_half_away(x: Float32) -> Float32:
    """Round to the nearest integer, halves away from zero, as C's roundf."""
    magnitude = np.abs(x)
    whole = np.floor(magnitude)
    rounded: Float32 = np.copysign(whole + (magnitude - whole >= 0.5), x)
    return rounded


def _inverse(scale: np.ndarray) -> np.ndarray:
    """Return 1 / scale, 0 where that is not finite (a block of zeros, or of numbers too tiny for float16 scales)."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def quantise_q8_0(x: Float32) -> Blocks:
    """Quantise float32 [rows, k] to int8 [rows, k/32, 32] and float16 scales [rows, k/32]: value = q * scale."""
    blocks = x.reshape(len(x), -1, BLOCK)
    scale = np.abs(blocks).max(axis=2) / np.float32(127)
    values = _round_half_away(blocks * _inverse(scale)[:, :, None])
    return values.astype(np.int8), _as_float16(scale)


def quantise_q4_0(x: Float32) -> Blocks:
    """Quantise float32 [rows, k] to nibbles uint8 [rows, k/32, 32] and float16 scales: value = (nibble - 8) * scale.

    The element of largest magnitude becomes -8. Product and sum are rounded to float32 one after the other, as in the
    gguf package; weights that were bfloat16 often lie just on a border, where more precision would decide otherwise.
    """
    blocks = x.reshape(len(x), -1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
    scale = largest / np.float32(-8)
    shifted = blocks * _inverse(scale)[:, :, None] + np.float32(8.5)
    return np.clip(np.trunc(shifted), 0, 15).astype(np.uint8), _as_float16(scale)


def _as_float16(scale: np.ndarray) -> np.ndarray:
    """Round scales to float16; a scale beyond its range becomes infinity, as in the reference."""
    with np.errstate(over="ignore"):
        return scale.astype(np.float16)


def dequantise_q8_0(values: np.ndarray, scales: np.ndarray) -> Float32:
    """Return float32 [rows, k] from what quantise_q8_0 gave."""
    return (values.astype(np.float32) * scales.astype(np.float32)[:, :, None]).reshape(len(values), -1)


def dequantise_q4_0(nibbles: np.ndarray, scales: np.ndarray) -> Float32:
    """Return float32 [rows, k] from what quantise_q4_0 gave."""
    return dequantise_q8_0(nibbles.astype(np.int8) - np.int8(8), scales)
