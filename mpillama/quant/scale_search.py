"""Quantising to super-blocks whose sub-blocks have small integers as scales: GGML's K-types.

As llama.cpp does: each sub-block tries some scales near the obvious one and keeps the one with the least weighted
square error; then the scales of a super-block become integers, and the values are rounded once more to what these say.
Reference: https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c

Elements come first in the arrays here, [elements, rows, sub-blocks], and sums add halves to halves: only whole arrays
are added, so that a block gets the same bits in any company and on any processor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import numpy as np

from mpillama.quant.weight_type import Float32

SUPER_BLOCK = 256
"""Elements of a super-block, fewer where it would reach over a border."""
AT_A_TIME = 1 << 15
"""Weights that are worked on at a time: few enough for a core's own cache."""
LEAST = np.float32(1e-15)
"""Sub-blocks whose largest magnitude is below are zeros."""

LARGEST = np.float32(1e18)
"""Squares of what is beyond are no float32, and its scale is no float16 by far."""

Importance = np.ndarray
"""float32 [k]: how much the squared error of each column counts."""


@dataclass(frozen=True)
class SuperBlocks:
    """A K-type: values in a sub-block, the largest integer of a value, and the largest of a scale.

    Without a minimum integers of n bits reach from -most - 1 to most.
    """

    group: int
    most: int
    most_scale: int

    def count(self, width: int) -> int:
        """Sub-blocks of a super-block, none of which reaches over a border between `width` columns."""
        return gcd(SUPER_BLOCK, width) // self.group


@dataclass(frozen=True)
class WithMinimums:
    """value = d * scale * integer - least * minimum.

    values uint8 [rows, sub-blocks, group]; scales and minimums uint8 [rows, sub-blocks]; d and least float16
    [rows, super-blocks].
    """

    values: np.ndarray
    scales: np.ndarray
    minimums: np.ndarray
    d: np.ndarray
    least: np.ndarray


@dataclass(frozen=True)
class Symmetric:
    """value = d * scale * integer.

    values int8 [rows, sub-blocks, group], scales int8 [rows, sub-blocks], d float16 [rows, super-blocks].
    """

    values: np.ndarray
    scales: np.ndarray
    d: np.ndarray


def quantise_with_minimums(
    x: Float32, form: SuperBlocks, width: int = SUPER_BLOCK, importance: Importance | None = None
) -> WithMinimums:
    """Quantise float32 [rows, k]; no super-block reaches over a border between `width` columns.

    Super-blocks with what is no number, or above 1e18, get NaN as d.
    """
    with np.errstate(all="ignore"):
        parts = [_with_minimums(part, form, form.count(width), importance) for part in _in_parts(x)]
    return WithMinimums(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def quantise_symmetric(
    x: Float32, form: SuperBlocks, width: int = SUPER_BLOCK, importance: Importance | None = None
) -> Symmetric:
    """As quantise_with_minimums."""
    with np.errstate(all="ignore"):
        parts = [_symmetric(part, form, form.count(width), importance) for part in _in_parts(x)]
    return Symmetric(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _in_parts(x: Float32) -> Iterator[Float32]:
    rows = max(1, AT_A_TIME // max(1, x.shape[1]))
    return (x[start : start + rows] for start in range(0, max(1, len(x)), rows))


def _with_minimums(x: Float32, form: SuperBlocks, count: int, importance: Importance | None) -> tuple[np.ndarray, ...]:
    groups = _by_element(x, form.group)
    weights = _weights(groups, count, importance)
    scales, minimums = fitted_with_minimum(groups, weights, form.most, importance is not None)
    if importance is None:
        d, of_scales = _shared_step(_by_element(scales, count), form.most_scale)
        least, of_minimums = _shared_step(_by_element(minimums, count), form.most_scale)
    else:
        counting = _by_element(_total(weights), count)
        d, of_scales = _fitted_positive(_by_element(scales, count), counting, form.most_scale)
        least, of_minimums = _fitted_positive(_by_element(minimums, count), counting, form.most_scale)
    d, least = _half(d, groups), _half(least, groups)
    step = _by_row(of_scales * d.astype(np.float32)).reshape(scales.shape)
    lowest = _by_row(of_minimums * least.astype(np.float32)).reshape(scales.shape)
    values = np.clip(np.rint((groups + lowest) / step), 0, form.most)
    return _integers(values, np.uint8), *(_flat(_integers(a, np.uint8)) for a in (of_scales, of_minimums)), d, least


def _symmetric(x: Float32, form: SuperBlocks, count: int, importance: Importance | None) -> tuple[np.ndarray, ...]:
    groups = _by_element(x, form.group)
    weights = groups * groups if importance is None else _by_element(importance[None], form.group)
    scales = fitted_symmetric(groups, weights, form.most + 1)
    by_block = _by_element(scales, count)
    largest = _of_largest_magnitude(by_block)
    factor = np.float32(-form.most_scale - 1) / largest
    d = _half(np.where(np.abs(largest) < LEAST, np.float32(0), 1 / factor), groups)
    of_scales = np.clip(np.rint(factor * by_block), -form.most_scale - 1, form.most_scale)
    step = _by_row(of_scales * d.astype(np.float32)).reshape(scales.shape)
    values = np.clip(np.rint(groups / step), -form.most - 1, form.most)
    return _integers(values, np.int8), _flat(_integers(of_scales, np.int8)), d


# -- the search in a sub-block ----------------------------------------------------------------------------------------


def fitted_with_minimum(x: Float32, weights: Float32, most: int, finely: bool) -> tuple[Float32, Float32]:
    """Return each sub-block's scale and what is subtracted, not negative, for integers of 0 to `most`.

    x and weights are [elements, …]. `finely` takes smaller steps from one scale to the next.
    """
    lowest = np.minimum(x.min(axis=0), 0)
    above, span = x - lowest, x.max(axis=0) - lowest
    of_x, whole, best = _total(weights * above), _total(weights), np.full(span.shape, np.inf)
    scale, minimum = np.where(span > 0, span / np.float32(most), np.float32(0)), lowest
    work, weighted = np.empty_like(above), np.empty_like(above)
    for turn, more in enumerate([0.0, *_tries(most, finely)]):
        np.subtract(x, minimum, out=work)  # the best minimum so far, so that each better one leads to others
        _round_into(work, np.float32(most + more) / span, 0, most)
        np.multiply(weights, work, out=weighted)
        of_q = _total(weighted)
        of_qq = _total(np.multiply(weighted, work, out=work))
        of_qx = _total(np.multiply(weighted, above, out=weighted))
        if turn:
            step, low = _least_squares(of_x, of_q, of_qq, of_qx, whole, lowest)
        else:
            step, low = scale, lowest
        wide, raised = step.astype(np.float64), (low - lowest).astype(np.float64)
        linear = 2 * raised * of_q - 2.0 * of_qx.astype(np.float64)
        error = (wide * of_qq + linear) * wide + (raised * whole - 2.0 * of_x) * raised
        better = error < best
        best = np.where(better, error, best)
        scale, minimum = np.where(better, step, scale), np.where(better, low, minimum)
    return scale, -minimum


def _tries(most: int, finely: bool) -> np.ndarray:
    """What is added to the number of steps in a sub-block's span."""
    if finely:
        return -0.9 + 0.05 * np.arange(37)
    return -1.0 + 0.1 * np.arange(21) if most < 16 else -0.5 + 0.1 * np.arange(16)


def _least_squares(
    of_x: Float32, of_q: Float32, of_qq: Float32, of_qx: Float32, whole: Float32, lowest: Float32
) -> tuple[Float32, Float32]:
    """Return the scale and the minimum, not positive, with the least error for given integers; NaN if there is none."""
    q, qq, qx = (sums.astype(np.float64) for sums in (of_q, of_qq, of_qx))
    divisor = whole * qq - q * q
    step = np.where(divisor > 0, (whole * qx - of_x * q) / divisor, np.nan)
    low = (qq * of_x - q * qx) / divisor + lowest
    step = np.where(low > 0, (qx + lowest * q) / qq, step)
    return step.astype(np.float32), np.minimum(low, 0).astype(np.float32)


def fitted_symmetric(x: Float32, weights: Float32, most: int) -> Float32:
    """Return each sub-block's scale for integers of -most to most - 1."""
    largest = _of_largest_magnitude(x)
    weighted, work = weights * x, np.empty_like(x)
    scale = best = np.zeros(largest.shape, np.float32)
    for turn, more in enumerate([0.0, *(0.1 * i for i in range(-9, 10) if i)]):
        np.copyto(work, x)
        _round_into(work, np.float32(-most - more) / largest, -most, most - 1)
        of_qx = _total(weighted * work)
        np.multiply(work, work, out=work)
        of_qq = _total(np.multiply(work, weights, out=work))
        better = (of_qq > 0) & ((of_qx * of_qx > best * of_qq) | (turn == 0))
        scale = np.where(better, of_qx / of_qq, scale)
        best = np.where(better, scale * of_qx, best)
    return np.where(np.abs(largest) < LEAST, np.float32(0), scale)


def _round_into(x: Float32, factor: Float32, least: int, most: int) -> None:
    """Multiply x in place and make whole numbers of it, within limits."""
    np.multiply(x, factor, out=x)
    np.rint(x, out=x)
    np.minimum(x, np.float32(most), out=x)
    np.maximum(x, np.float32(least), out=x)


# -- the scales of a super-block --------------------------------------------------------------------------------------


def _shared_step(numbers: Float32, most: int) -> tuple[Float32, Float32]:
    """Return one step for [sub-blocks, …] numbers that are not negative, and the numbers as integers up to `most`."""
    largest = numbers.max(axis=0)
    factor = np.where(largest > 0, np.float32(most) / largest, np.float32(0))
    return largest / np.float32(most), np.minimum(np.rint(factor * numbers), np.float32(most))


def _fitted_positive(numbers: Float32, weights: Float32, most: int) -> tuple[Float32, Float32]:
    """As _shared_step, with the least weighted error: some steps are tried, then each integer by itself."""
    largest = numbers.max(axis=0)
    best, factor = np.full(largest.shape, np.inf, np.float32), np.zeros_like(largest)
    for more in (0.0, *(0.1 * i for i in range(-4, 5) if i)):
        tried = np.float32(most + more) / largest
        q = np.minimum(np.rint(tried * numbers), np.float32(most))
        error = _total(weights * (numbers - q / tried) ** 2)
        factor, best = np.where(error < best, tried, factor), np.minimum(error, best)
    q = np.minimum(np.rint(factor * numbers), np.float32(most))
    of_qx, of_qq = _total(weights * q * numbers), _total(weights * q * q)
    for i in [*range(len(numbers))] * 5:
        x, weight = numbers[i], weights[i]
        others_qx, others_qq = of_qx - weight * x * q[i], of_qq - weight * q[i] * q[i]
        other = np.minimum(np.rint(x * others_qq / others_qx), np.float32(most))
        new_qx, new_qq = others_qx + weight * x * other, others_qq + weight * other * other
        better = (others_qx > 0) & (others_qq > 0) & (new_qx * new_qx * of_qq > of_qx * of_qx * new_qq)
        q[i] = np.where(better, other, q[i])
        of_qx, of_qq = np.where(better, new_qx, of_qx), np.where(better, new_qq, of_qq)
    used = of_qq > 0
    return np.where(used, of_qx / of_qq, np.float32(0)), np.where(used, q, np.float32(0))


# -- layout and sums --------------------------------------------------------------------------------------------------


def _weights(groups: Float32, count: int, importance: Importance | None) -> Float32:
    """How much each element's squared error counts: larger elements more, and by importance."""
    squares = groups * groups
    sums, group = _total(squares), len(groups)
    weights: Float32
    if importance is None:
        weights = np.sqrt(sums / np.float32(group)) + np.abs(groups)
        return weights
    mean = _total(_by_element(sums, count)) * np.float32(2 / (count * group))
    weights = np.sqrt(squares + np.repeat(mean, count, axis=-1)) * _by_element(importance[None], group)
    return weights


def _by_element(x: Float32, group: int) -> Float32:
    """[rows, k] as [group, rows, k / group]."""
    return np.ascontiguousarray(x.reshape(len(x), -1, group).transpose(2, 0, 1))


def _by_row(values: np.ndarray) -> np.ndarray:
    """Undo _by_element, but for the last axis: [rows, k / group, group]."""
    return np.ascontiguousarray(values.transpose(1, 2, 0))


def _integers(numbers: Float32, dtype: type) -> np.ndarray:
    """As _by_row; what is no number becomes 0."""
    return _by_row(np.nan_to_num(numbers).astype(dtype))


def _flat(numbers: np.ndarray) -> np.ndarray:
    """[rows, super-blocks, sub-blocks of each] as [rows, sub-blocks]."""
    return numbers.reshape(len(numbers), -1)


def _half(d: Float32, groups: Float32) -> np.ndarray:
    """Round to float16; NaN for super-blocks that have something that is no number, or far too large."""
    usable = (np.abs(groups) < LARGEST).all(axis=0).reshape(*d.shape, -1).all(axis=2)
    return np.where(usable, d, np.float32(np.nan)).astype(np.float16)


def _of_largest_magnitude(numbers: Float32) -> Float32:
    """Of the first axis the element of largest magnitude, the first of them."""
    places = np.abs(numbers).argmax(axis=0)[None]
    largest: Float32 = np.take_along_axis(numbers, places, axis=0)[0]
    return largest


def _total(numbers: Float32) -> Float32:
    """Return the sum over the first axis, a power of two long."""
    while len(numbers) > 1:
        half = len(numbers) // 2
        numbers = numbers[:half] + numbers[half:]
    total: Float32 = numbers[0]
    return total
