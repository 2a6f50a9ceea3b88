"""Rotary position embedding.

Half-split convention: channel i turns with channel i + head_dim / 2 (https://arxiv.org/abs/2104.09864, in the
arrangement of Hugging Face's Llama).
"""

import numpy as np
from numba import njit

HALF_PI_HIGH = float.fromhex("0x1.921fb544p+0")
HALF_PI_MIDDLE = float.fromhex("0x1.0b4611a6p-34")
HALF_PI_LOW = float.fromhex("0x1.3198a2e037073p-69")
"""pi/2 in three parts; the first two have 33 bits, so that their products with a quadrant count are exact."""


@njit(nogil=True, cache=True)
def sine_cosine(angle):
    """sin and cos of a float64 angle below 2^20 in magnitude, the same bits on every processor.

    Taylor series after reduction to [-pi/4, pi/4]; absolute error below 1e-15, rounded to float32 by the caller.
    The C library's functions differ between versions and processors, these do not: only +, - and * in fixed order.
    """
    quadrant = np.floor(angle * 0.63661977236758138 + 0.5)
    r = ((angle - quadrant * HALF_PI_HIGH) - quadrant * HALF_PI_MIDDLE) - quadrant * HALF_PI_LOW
    r2 = r * r
    sine, cosine, sine_term, cosine_term = r, 1.0, r, 1.0
    for n in range(1, 10):
        cosine_term = cosine_term * -r2 / ((2 * n - 1) * (2 * n))
        sine_term = sine_term * -r2 / ((2 * n) * (2 * n + 1))
        cosine += cosine_term
        sine += sine_term
    turn = int(quadrant) & 3
    if turn == 0:
        return sine, cosine
    if turn == 1:
        return cosine, -sine
    if turn == 2:
        return -sine, -cosine
    return -cosine, sine


@njit(nogil=True, cache=True)
def rope_angles(positions, inverse_frequencies, factor, cosines, sines):
    """cos and sin of position * frequency, times a factor.

    positions int32 [tokens], inverse_frequencies float32 [head_dim/2], cosines, sines float32 [tokens, head_dim/2].
    The angle is a float32 product, as in the reference implementation.
    """
    for t in range(positions.shape[0]):
        for i in range(inverse_frequencies.shape[0]):
            angle = np.float32(positions[t]) * inverse_frequencies[i]
            sine, cosine = sine_cosine(np.float64(angle))
            cosines[t, i] = np.float32(cosine) * np.float32(factor)
            sines[t, i] = np.float32(sine) * np.float32(factor)


@njit(nogil=True, cache=True)
def _rotate(head, cosine, sine):
    """Turn the channels of one head in place; channels past the true head_dim stay zero."""
    half = cosine.shape[0]
    for i in range(half):
        low, high = head[i], head[i + half]
        head[i] = low * cosine[i] - high * sine[i]
        head[i + half] = high * cosine[i] + low * sine[i]


@njit(nogil=True, cache=True)
def rotate(heads, cosine, sine):
    """Rotate one token's heads float32 [heads, head_dim] in place; cosine, sine float32 [true head_dim / 2]."""
    for h in range(heads.shape[0]):
        _rotate(heads[h], cosine, sine)
