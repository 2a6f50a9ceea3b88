"""Integers packed into words by hand, element by element, as the formats of quantised checkpoints describe it."""

from collections.abc import Sequence

import numpy as np


def pack_words(values: np.ndarray, order: Sequence[int], axis: str, word: type[np.unsignedinteger]) -> np.ndarray:
    """Elements that follow each other along an axis ("rows" or "columns") share a word; `order` has their places.

    A place is counted from the lowest bits, in elements; the last word may be filled with zeros.
    """
    if axis == "rows":
        return pack_words(values.T, order, "columns", word).T.copy()
    per = max(1, len(order))
    bits = 8 * np.dtype(word).itemsize // per
    packed = np.zeros((values.shape[0], -(-values.shape[1] // per)), word)
    for column in range(values.shape[1]):
        place = order[column % per] if order else 0
        packed[:, column // per] |= (values[:, column].astype(np.uint64) << np.uint64(bits * place)).astype(word)
    return packed
