"""What each sampling option does, and what the sampler promises besides."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from mpillama.text.sampler import NonFiniteLogits, Sampler
from mpillama.text.sampling_params import SamplingParams

from .test_sampler_draws import LOGITS, PLAIN, draws


def test_greedy_takes_the_lowest_of_the_best():
    greedy = SamplingParams(temperature=0.0)
    assert draws(np.array([0, 5, 5, 1], np.float32), greedy, 3) == [1, 1, 1]
    assert Sampler(greedy, 4, []).sample(np.array([-math.inf, -3, -math.inf, -3], np.float32)) == 1


def test_temperature_matters():
    assert set(draws(LOGITS, replace(PLAIN, temperature=1e-300), 50)) == {1}
    assert set(draws(LOGITS, replace(PLAIN, temperature=50.0), 500)) == {0, 1, 2, 3, 4, 5, 7}


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, {0, 1, 2, 3, 4, 5, 7}),
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 2}),  # 2 and 4 are equal: the lower id stays
        ({"top_k": 100}, {0, 1, 2, 3, 4, 5, 7}),
        ({"top_p": 0.3}, {1}),
        ({"top_p": 0.5}, {1, 2}),
        ({"min_p": 0.6}, {1, 2, 4}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 2, "min_p": 0.1, "logit_bias": {7: 100.0}}, {7}),
        ({"logit_bias": {1: -100.0, 2: -100.0, 4: -100.0, 7: -100.0, 0: -100.0}}, {3, 5}),
    ],
)
def test_filters_keep(changes, tokens):
    assert set(draws(LOGITS, replace(PLAIN, **changes), 1500)) == tokens


def test_repetition_penalty_looks_at_prompt_and_output():
    options = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    logits = np.array([4.0, 3.0, 2.5, -1.0], np.float32)
    assert Sampler(options, 4, []).sample(logits) == 0
    assert Sampler(options, 4, [0]).sample(logits) == 1
    assert draws(logits, options, 3) == [0, 1, 2]
    negative = np.array([-1.0, -1.5], np.float32)
    assert Sampler(options, 2, [0]).sample(negative) == 1  # a negative logit is multiplied


def test_presence_and_frequency_penalties_look_at_output_only():
    logits = np.array([4.0, 2.5], np.float32)
    for options, expected in [
        (SamplingParams(temperature=0.0, presence_penalty=2.0), [0, 1, 0, 0]),
        (SamplingParams(temperature=0.0, presence_penalty=1.0), [0, 0, 0, 0]),
        (SamplingParams(temperature=0.0, frequency_penalty=1.0), [0, 0, 1, 0]),
    ]:
        sampler = Sampler(options, 2, [0, 0, 0])
        assert [sampler.sample(logits) for _ in range(4)] == expected


def test_bias_comes_before_the_repetition_penalty():
    options = SamplingParams(temperature=0.0, logit_bias={0: 4.0}, repetition_penalty=4.0)
    # (1 + 4) / 4 = 1.25 is below 2; penalising first would give 1 / 4 + 4 = 4.25.
    assert Sampler(options, 2, [0]).sample(np.array([1.0, 2.0], np.float32)) == 1


def test_same_seed_same_tokens_everywhere():
    logits = (((np.arange(5000) * 2654435761) % 1000) / 100).astype(np.float32)
    assert draws(logits, SamplingParams(seed=11, top_p=1.0), 4) == [908, 1904, 3766, 1477]
    assert draws(logits, SamplingParams(seed=12, top_p=1.0), 4) != [908, 1904, 3766, 1477]


def test_seed_is_reported_and_reproduces():
    first = Sampler(SamplingParams(), 8, [])
    again = Sampler(SamplingParams(seed=first.seed), 8, [])
    assert [first.sample(LOGITS) for _ in range(20)] == [again.sample(LOGITS) for _ in range(20)]
    assert Sampler(SamplingParams(), 8, []).seed != first.seed


def test_input_is_left_alone():
    logits = LOGITS.copy()
    logits.flags.writeable = False
    options = replace(PLAIN, logit_bias={0: 1.0}, repetition_penalty=2.0, presence_penalty=1.0, top_p=0.9)
    sampler = Sampler(options, 8, [1])
    assert len([sampler.sample(logits) for _ in range(3)]) == 3
    np.testing.assert_array_equal(logits, LOGITS)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits(bad, temperature):
    sampler = Sampler(SamplingParams(temperature=temperature), 8, [])
    logits = LOGITS.copy()
    logits[3] = bad
    with pytest.raises(NonFiniteLogits, match=r"damaged|overflowed"):
        sampler.sample(logits)
    with pytest.raises(NonFiniteLogits):
        sampler.sample(np.full(8, -math.inf, np.float32))


def test_wrong_shape():
    with pytest.raises(ValueError, match="shape"):
        Sampler(PLAIN, 8, []).sample(LOGITS[:7])


@pytest.mark.parametrize(
    "options", [SamplingParams(top_p=1.0), SamplingParams(top_p=1.0, top_k=40), SamplingParams(top_p=0.9)]
)
def test_large_vocabulary_is_not_sorted_whole(options):
    logits = (np.random.default_rng(0).normal(size=(15, 256_000)) * 5).astype(np.float32)
    sampler = Sampler(replace(options, seed=1), 256_000, [])
    seconds = []
    for row in logits:
        start = time.perf_counter()
        sampler.sample(row)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    np.argsort(-logits[0].astype(np.float64), kind="stable")
    assert min(seconds) < (time.perf_counter() - start) / 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.5, seed=4, top_p=1),
        SamplingParams(temperature=0, presence_penalty=2, repetition_penalty=3),
        SamplingParams(temperature=2, seed=4, frequency_penalty=2),
    ],
)
def test_a_sampler_ahead_chooses_what_will_be_chosen(params: SamplingParams) -> None:
    sampler, rows = Sampler(params, 50, [1, 2]), np.random.default_rng(2).normal(size=(40, 50)).astype(np.float32)
    for first in range(0, 40, 4):
        ahead = sampler.ahead()
        guessed = [ahead.sample(row) for row in rows[first : first + 4]]
        assert [sampler.sample(row) for row in rows[first : first + 4]] == guessed
