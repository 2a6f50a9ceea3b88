"""The search for scales: as good as llama.cpp's, the same in any company, and safe with odd numbers."""

import numpy as np
import pytest

from mpillama.quant.scale_search import (
    SuperBlocks,
    WithMinimums,
    quantise_symmetric,
    quantise_with_minimums,
)

Q4, Q5, Q6 = SuperBlocks(32, 15, 63), SuperBlocks(32, 31, 63), SuperBlocks(16, 31, 127)


def weights_like(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Numbers with some outliers."""
    return (np.random.default_rng(seed).standard_t(5, (rows, columns)) * 0.02).astype(np.float32)


def values_of(found, form: SuperBlocks, width: int = 256) -> np.ndarray:
    """What the integers stand for, float64 [rows, k]."""
    count = form.count(width)
    rows = len(found.values)
    values = found.values * (found.scales * np.repeat(found.d.astype(np.float64), count, axis=1))[:, :, None]
    if isinstance(found, WithMinimums):
        values -= (found.minimums * np.repeat(found.least.astype(np.float64), count, axis=1))[:, :, None]
    return values.reshape(rows, -1)


def quantise(x: np.ndarray, form: SuperBlocks, width: int = 256, importance: np.ndarray | None = None):
    """By the kind of the form."""
    return (quantise_symmetric if form.group == 16 else quantise_with_minimums)(x, form, width, importance)


# -- llama.cpp's search, step by step for one sub-block in float64 ----------------------------------------------------


def plain_with_minimum(x: np.ndarray, most: int) -> tuple[float, float]:
    weights = np.sqrt((x * x).mean()) + np.abs(x)
    low, span = min(x.min(), 0), x.max() - min(x.min(), 0)
    scale, best = span / most, np.inf
    for turn, more in enumerate([0, *((-1 + 0.1 * np.arange(21)) if most == 15 else (-0.5 + 0.1 * np.arange(16)))]):
        q = np.clip(np.rint((most + more) / span * (x - low)), 0, most)
        step, least = scale, low
        if turn:
            matrix = np.array([[(weights * q * q).sum(), (weights * q).sum()], [(weights * q).sum(), weights.sum()]])
            if np.linalg.matrix_rank(matrix) < 2:
                continue
            step, least = np.linalg.solve(matrix, [(weights * q * x).sum(), (weights * x).sum()])
            if least > 0:
                step, least = (weights * q * x).sum() / (weights * q * q).sum(), 0
        error = (weights * (step * q + least - x) ** 2).sum()
        if error < best:
            scale, low, best = step, least, error
    return scale, -low


def plain_symmetric(x: np.ndarray, most: int) -> float:
    largest, scale, best = x[np.abs(x).argmax()], 0.0, 0.0
    for turn, more in enumerate([0, *(0.1 * i for i in range(-9, 10) if i)]):
        q = np.clip(np.rint(-(most + more) / largest * x), -most, most - 1)
        products, squares = (x * x * x * q).sum(), (x * x * q * q).sum()
        if squares and (not turn or products**2 > best * squares):
            scale, best = products / squares, products**2 / squares
    return scale


def plain_values(row: np.ndarray, form: SuperBlocks) -> np.ndarray:
    """A row of one super-block through all of it."""
    blocks = row.astype(np.float64).reshape(-1, form.group)
    if form.group == 16:
        scales = np.array([plain_symmetric(block, form.most + 1) for block in blocks])
        largest = scales[np.abs(scales).argmax()]
        d = float(np.float16(-largest / (form.most_scale + 1)))
        steps = d * np.clip(np.rint(-scales * (form.most_scale + 1) / largest), -form.most_scale - 1, form.most_scale)
        q = np.clip(np.rint(blocks / steps[:, None]), -form.most - 1, form.most)
        return (q * steps[:, None]).reshape(-1)
    pairs = np.array([plain_with_minimum(block, form.most) for block in blocks])
    d = np.float16(pairs.max(axis=0) / form.most_scale).astype(np.float64)
    steps, lows = (d * np.rint(pairs * form.most_scale / pairs.max(axis=0))).T[:, :, None]
    return (np.clip(np.rint((blocks + lows) / steps), 0, form.most) * steps - lows).reshape(-1)


@pytest.mark.parametrize("form", [Q4, Q5, Q6], ids=["q4_k", "q5_k", "q6_k"])
def test_errors_are_those_of_llama_cpps_search(form):
    """Not value for value: where two scales are as good as each other, the last bit decides."""
    x = weights_like(48, 256)
    expected = np.array([plain_values(row, form) for row in x])
    found = values_of(quantise(x, form), form)
    assert np.isclose(found, expected, rtol=0, atol=1e-9).mean() > 0.8
    ours, theirs = (((values - x) ** 2).sum() for values in (found, expected))
    assert ours < 1.003 * theirs


@pytest.mark.parametrize("width", [256, 96, 64])
@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("form", [Q4, Q5, Q6], ids=["q4_k", "q5_k", "q6_k"])
def test_a_super_block_does_not_depend_on_its_company(form, important, width):
    x = weights_like(70, 768)
    importance = np.random.default_rng(1).random(768).astype(np.float32) if important else None
    whole = quantise(x, form, width, importance)
    step = 32 * (form.count(width) * form.group // 32)
    for start in (0, step, 768 - step):
        part = importance[start : start + step] if importance is not None else None
        alone = quantise(x[5:6, start : start + step], form, width, part)
        blocks = slice(start // form.group, (start + step) // form.group)
        assert np.array_equal(alone.values[0], whole.values[5, blocks])
        assert np.array_equal(alone.scales[0], whole.scales[5, blocks])
        assert alone.d[0, 0] == whole.d[5, start // step]


@pytest.mark.parametrize("form", [Q4, Q5, Q6], ids=["q4_k", "q5_k", "q6_k"])
def test_importance_moves_the_error_to_where_it_counts_less(form):
    x = weights_like(64, 512)
    importance = np.where(np.arange(512) % 4 == 0, 100, 1).astype(np.float32)
    errors = [
        (importance * (values_of(quantise(x, form, 256, given), form) - x) ** 2).sum() for given in (None, importance)
    ]
    assert errors[1] < 0.9 * errors[0]
    even = np.full(512, 3, np.float32)
    for shown in (None, even):
        error = np.sqrt(((values_of(quantise(x, form, 256, shown), form) - x) ** 2).mean()) / x.std()
        assert error < {Q4: 0.09, Q5: 0.045, Q6: 0.025}[form]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", [Q4, Q5, Q6], ids=["q4_k", "q5_k", "q6_k"])
def test_odd_numbers(form):
    """Zeros, numbers too tiny for float16 scales, all alike, beyond float16, and what is no number."""
    x = np.zeros((8, 512), np.float32)
    x[1], x[2, ::3], x[3], x[4] = 1e-42, -1e-30, 0.5, -0.25
    x[5, 300], x[6, 10], x[7] = np.nan, np.inf, 1e37
    for importance in (None, np.ones(512, np.float32)):
        found = quantise(x, form, 256, importance)
        with np.errstate(invalid="ignore"):
            values = values_of(found, form)
        assert not values[:2].any()
        assert np.abs(values[2]).max() < 1e-7
        assert np.isnan(values[5, 256:]).all()
        assert np.isnan(values[6, :256]).all()
        assert not values[5, :256].any()
        assert not np.isfinite(values[7]).any()
    for row, value in ((3, 0.5), (4, -0.25)):
        assert np.allclose(values_of(quantise(x[row : row + 1], form), form), value, rtol=0.001)


def test_what_is_on_the_grid_stays_there():
    """Whole numbers with a scale that float16 has: nothing is lost."""
    rng = np.random.default_rng(3)
    scales, integers = rng.integers(32, 64, (4, 8, 1)), rng.integers(0, 16, (4, 8, 32))
    scales[:, 0], integers[..., 0], integers[..., 1] = 63, 0, 15
    x = (integers * scales * 2.0**-12).astype(np.float32).reshape(4, 256)
    assert np.array_equal(values_of(quantise(x, Q4), Q4), x)
