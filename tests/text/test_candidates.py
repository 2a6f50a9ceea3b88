"""A token sampled from what ranks tell of their logits is the one sampled from the whole row."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mpillama.models.candidates import (
    WHOLE,
    Candidates,
    Wanted,
    message_numbers,
    read_candidates,
    write_candidates,
)
from mpillama.text import sampler
from mpillama.text.sampler import NonFiniteLogits, Sampler, wanted_of
from mpillama.text.sampling_params import SamplingParams

VOCABULARY = 5000
BORDERS = [0, 1700, 1700, 1703, 5000]
"""Four ranks: one has no part of the vocabulary, one three tokens."""
PLAIN = SamplingParams(temperature=0.9, top_p=1.0)


def told(logits: np.ndarray, wanted: Wanted) -> Candidates:
    messages = []
    for first, last in pairwise(BORDERS):
        message = np.full(message_numbers(wanted.count, last - first), np.nan, np.float32)
        if len(message):
            write_candidates(logits[first:last], wanted, message)
        messages.append(message)
    return read_candidates(messages, BORDERS[:-1], 7)


def rows(count: int, seed: int, steps: float = 0.0) -> list[np.ndarray]:
    """Logits, some of them equal if they are multiples of `steps`."""
    found = np.random.default_rng(seed).normal(0, 3, (count, VOCABULARY))
    return list((np.round(found / steps) * steps if steps else found).astype(np.float32))


@pytest.mark.parametrize("steps", [0.0, 0.5], ids=["all differ", "many are equal"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 1e-3},
        {"temperature": 1e-300},
        {"temperature": 5.0},
        {"top_k": 1},
        {"top_k": 40},
        {"top_p": 0.95},
        {"top_p": 0.5, "top_k": 50},
        {"min_p": 0.05},
        {"min_p": 0.001, "top_p": 0.999, "temperature": 2.0},
    ],
    ids=str,
)
def test_the_same_token_as_from_the_whole_row(changes: dict, steps: float) -> None:
    params = replace(PLAIN, seed=11, **changes)
    wanted = wanted_of(params, VOCABULARY)
    assert wanted.count in (1, 40, 50, sampler.HEAD)
    one, other, fetched = Sampler(params, VOCABULARY, []), Sampler(params, VOCABULARY, []), []
    for row in rows(60, 5, steps):
        whole = lambda row=row: fetched.append(1) or row  # noqa: E731
        assert other.sample_among(told(row, wanted), whole) == one.sample(row)
    if params.temperature < 2:
        assert len(fetched) <= 12  # beyond the largest 1024 the row itself must be looked at


def test_what_leaves_doubt_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "TAIL_ERROR", 0.9)
    params, fetched = replace(PLAIN, seed=3), []
    one, other = Sampler(params, VOCABULARY, []), Sampler(params, VOCABULARY, [])
    for row in rows(30, 6):
        whole = lambda row=row: fetched.append(1) or row  # noqa: E731
        assert other.sample_among(told(row, wanted_of(params, VOCABULARY)), whole) == one.sample(row)
    assert fetched


@pytest.mark.parametrize("place", [0, 1701, 4999])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_are_seen(bad: float, place: int) -> None:
    row = rows(1, 7)[0]
    row[place] = bad
    for params in (PLAIN, replace(PLAIN, temperature=0.0)):
        with pytest.raises(NonFiniteLogits):
            Sampler(params, VOCABULARY, []).sample_among(told(row, wanted_of(params, VOCABULARY)), lambda row=row: row)


def test_a_rank_whose_tokens_cannot_come_next() -> None:
    row = rows(1, 8)[0]
    row[1703:] = -np.inf
    for params in (replace(PLAIN, seed=1), replace(PLAIN, temperature=0.0), replace(PLAIN, seed=1, top_k=30)):
        expected = Sampler(params, VOCABULARY, []).sample(row)
        candidates = told(row, wanted_of(params, VOCABULARY))
        assert Sampler(params, VOCABULARY, []).sample_among(candidates, lambda: row) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_bias": {3: 1.0}},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"top_k": 4000},
    ],
    ids=str,
)
def test_what_changes_single_scores_looks_at_whole_rows(changes: dict) -> None:
    assert wanted_of(replace(PLAIN, **changes), VOCABULARY) == WHOLE
    assert wanted_of(PLAIN, 2000) == WHOLE
