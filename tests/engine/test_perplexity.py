"""Scoring a long text: which tokens count, and the arithmetic of the losses."""

import math

import numpy as np
import pytest


@pytest.fixture(scope="module")
def perplexity(target):
    from mpillama.engine import perplexity

    return perplexity


def test_windows_of_llama_cpp(perplexity):
    """Windows side by side, the second half of each counts, an unfinished one is left out."""
    assert list(perplexity.windows(40, 16, 16)) == [(0, 8), (16, 8)]
    assert list(perplexity.windows(15, 16, 16)) == []


def test_windows_with_a_stride_count_each_token_once(perplexity):
    counted = [start + i for start, first in perplexity.windows(64, 16, 4) for i in range(first + 1, 16)]
    assert len(counted) == len(set(counted))
    assert min(counted) == 9


def test_losses_are_those_of_a_softmax(perplexity):
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((5, 40)).astype(np.float32) * 30, rng.integers(0, 40, 5)
    exact = [
        math.log(math.fsum(math.exp(x - float(row[t])) for x in row.tolist()))
        for row, t in zip(logits, targets, strict=True)
    ]
    np.testing.assert_allclose(perplexity.losses(logits, targets), exact, rtol=1e-9, atol=1e-9)


def test_a_score_adds_up(perplexity):
    score = perplexity.Score()
    score.add(np.array([1.0, 2.0]))
    score.add(np.array([3.0]))
    assert (score.tokens, score.mean) == (3, 2.0)
    assert score.perplexity == pytest.approx(math.exp(2))
    assert score.standard_error == pytest.approx(math.exp(2) * math.sqrt(2 / 3 / 2))
