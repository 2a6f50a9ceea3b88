"""GGML's IQ4_NL: nibbles that choose from 16 integers, and a float16 scale for every 32.

Format and quantiser: https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c
"""

from dataclasses import dataclass

import numpy as np

from mpillama.quant.nibbles import NIBBLE_BYTES, nibbles_of, pack_nibbles, unpack_nibbles
from mpillama.quant.scaled_blocks import SCALES, ScaledBlocks, as_float16, inverse, largest_of
from mpillama.quant.weight_type import BLOCK, Blocks, Float32, LaneArray

CODEBOOK = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
TRIES = range(-7, 8)
"""The largest element becomes the first number of the codebook, -127, a bit more or a bit less."""
LEAST = np.float32(1e-15)
"""Blocks whose largest magnitude is below are zeros."""


@dataclass(frozen=True)
class IQ4NL(ScaledBlocks):
    """value = codebook[nibble] * scale."""

    lanes = (LaneArray("", "|u1", NIBBLE_BYTES), SCALES)
    weighs = True

    def values_of(self, packed: np.ndarray) -> np.ndarray:
        return nibbles_of(packed)

    def quantise(self, x: Float32) -> Blocks:
        return self.quantise_within(x, x.shape[1])

    def quantise_within(self, x: Float32, width: int, importance: Float32 | None = None) -> Blocks:
        """Of some scales the one with the least weighted error, as llama.cpp's."""
        blocks = x.reshape(len(x), -1, BLOCK)
        scale = searched_scales(blocks, importance)
        with np.errstate(all="ignore"):  # blocks of zeros, and of what is no number
            return nearest(blocks * inverse(scale)[:, :, None]), as_float16(scale)

    def integers(self, values: np.ndarray) -> np.ndarray:
        chosen: np.ndarray = CODEBOOK[values]
        return chosen

    def pack_steps(self, steps: np.ndarray) -> np.ndarray:
        return pack_nibbles(steps)

    def unpack_steps(self, steps: np.ndarray) -> np.ndarray:
        return unpack_nibbles(steps)


BORDERS = CODEBOOK[:-1] + np.diff(CODEBOOK.astype(np.int32)) / 2
HALVES = np.searchsorted(BORDERS, np.arange(-256, 256) / 2, "right").astype(np.uint8)
"""The nearest number of the codebook, the larger of two, for the halves from -128 on: no border lies between halves."""


def nearest(x: Float32) -> np.ndarray:
    """Return nibbles; what is no number gives any."""
    halves = np.clip(np.floor(x * 2), -256, 255)
    nibbles: np.ndarray = HALVES[np.nan_to_num(halves).astype(np.int32) + 256]
    return nibbles


def searched_scales(blocks: Float32, importance: Float32 | None = None) -> Float32:
    """Of some scales of each block the one with the least weighted error; NaN where something is no number.

    Weights are the squares, or follow from the `importance` of columns.
    """
    largest = largest_of(blocks)
    with np.errstate(all="ignore"):
        weights = _weights(blocks, importance)
        scale, best = _fitted(blocks, weights, inverse(largest / np.float32(127)))
        for more in TRIES:
            products, squares = _sums(blocks, weights, np.float32(more - 127) / largest)
            better = (squares > 0) & (products * products > best * squares)
            scale = np.where(better, products / squares, scale)
            best = np.where(better, scale * products, best)
        scale = np.where(np.abs(largest) < LEAST, np.float32(0), scale)
        found: Float32 = np.where(np.isfinite(largest), scale, np.float32(np.nan))
    return found


def _weights(blocks: Float32, importance: Float32 | None) -> Float32:
    squares: Float32 = blocks * blocks
    if importance is None:
        return squares
    mean = _in_order(squares) * np.float32(2 / BLOCK)
    weights: Float32 = importance.reshape(-1, BLOCK) * np.sqrt(mean[:, :, None] + squares)
    return weights


def _in_order(numbers: Float32) -> Float32:
    """Each block's sum; the elements are added in their order, so that it does not depend on the block's company."""
    total = np.zeros(numbers.shape[:2], np.float32)
    for i in range(BLOCK):
        total = total + numbers[:, :, i]
    return total


def _sums(blocks: Float32, weights: Float32, factor: Float32) -> tuple[Float32, Float32]:
    """Return each block's weighted sums of x q and q^2 for the integers q that are nearest to x times the factor."""
    numbers = CODEBOOK.astype(np.float32)[nearest(blocks * factor[:, :, None])]
    weighted = weights * numbers
    return _in_order(weighted * blocks), _in_order(weighted * numbers)


def _fitted(blocks: Float32, weights: Float32, factor: Float32) -> tuple[Float32, Float32]:
    """Return the scale with the least error for those integers, and how good it is."""
    products, squares = _sums(blocks, weights, factor)
    scale = np.where(squares > 0, products / squares, np.float32(0))
    return scale, scale * products


IQ4_NL = IQ4NL("iq4_nl", BLOCK, 18, ggml=20, number=6)
