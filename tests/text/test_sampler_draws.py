"""Sampler against a plain float64 definition, draw by draw and in distribution."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpillama.text.sampler import HEAD, Sampler
from mpillama.text.sampling_params import SamplingParams

LOGITS = np.array([1.0, 3.0, 2.5, -1.0, 2.5, 0.0, -math.inf, 2.0], np.float32)
PLAIN = SamplingParams(temperature=1.0, top_p=1.0, seed=7)


def probabilities(logits, options, prompt=(), output=()):
    """Probability of every token, and the tokens in the order in which a draw walks them."""
    x = [float(value) for value in logits]
    for token, bias in options.logit_bias.items():
        x[token] += bias
    for token in {*prompt, *output}:
        factor = options.repetition_penalty
        x[token] = x[token] * factor if x[token] < 0 else x[token] / factor
    for token in set(output):
        x[token] -= options.presence_penalty + options.frequency_penalty * list(output).count(token)
    x = (np.array(x) - max(x)) / options.temperature
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    kept = order[: options.top_k or None]
    p = np.exp(x)
    mass = math.fsum(p[kept])
    before = np.concatenate([[0.0], np.cumsum(p[kept])[:-1]])
    if options.top_p < 1:
        kept = [token for token, sum_before in zip(kept, before, strict=True) if sum_before < options.top_p * mass]
    kept = [token for token in kept if p[token] >= options.min_p]
    if options.top_p == 1 and options.min_p == 0 and len(kept) == len(x):
        kept = order[:HEAD] + sorted(order[HEAD:])
    result = np.zeros(len(x))
    result[kept] = p[kept] / math.fsum(p[kept])
    return result, kept


def draws(logits, options, count, prompt=()):
    """Tokens of `count` independent draws, without memory of one another."""
    sampler = Sampler(replace(options, presence_penalty=0, frequency_penalty=0), len(logits), prompt)
    return [sampler.sample(logits) for _ in range(count)]


option_sets = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.8, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 300, 10**6]),
    top_p=st.sampled_from([1.0, 1.0, 0.2, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    logit_bias=st.dictionaries(st.integers(0, 6), st.integers(-20, 20).map(lambda n: n / 4), max_size=3),
    seed=st.integers(0, 2**53),
)


@given(
    options=option_sets,
    size=st.sampled_from([7, 50, HEAD, HEAD + 1, 9001]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 8.0]),
    ties=st.booleans(),
    prompt=st.lists(st.integers(0, 6), max_size=4),
)
@settings(max_examples=80, deadline=None)
def test_each_draw_is_the_definition(options, size, spread, ties, prompt):
    rng = np.random.default_rng(options.seed)
    sampler, uniforms = Sampler(options, size, prompt), np.random.Generator(np.random.PCG64(options.seed))
    output = []
    for _ in range(4):
        logits = (rng.normal(size=size) * spread).astype(np.float32)
        logits = np.round(logits) if ties else logits
        expected, order = probabilities(logits, options, prompt, output)
        cumulative, uniform = np.cumsum(expected[order]), uniforms.random()
        assume(np.abs(cumulative - uniform).min() > 1e-11)
        output.append(sampler.sample(logits))
        assert output[-1] == order[np.searchsorted(cumulative, uniform)]


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_p": 0.5},
        {"top_p": 0.97},
        {"min_p": 0.01},
        {"min_p": 0.05, "top_p": 0.9},
        {"min_p": 0.3, "top_p": 0.99},
    ],
)
def test_draws_beyond_the_head_are_the_definition(changes, spread):
    for seed in range(3):
        options = replace(PLAIN, seed=seed, **changes)
        logits = (np.random.default_rng(seed).normal(size=9 * HEAD) * spread).astype(np.float32)
        expected, order = probabilities(logits, options)
        uniforms, sampler = np.random.Generator(np.random.PCG64(seed)), Sampler(options, len(logits), [])
        at = np.searchsorted(np.cumsum(expected[order]), [uniforms.random() for _ in range(20)])
        assert [sampler.sample(logits) for _ in at] == [order[index] for index in at]


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.5, 2), (1 - 2**-53, 2)])
def test_ends_of_the_random_numbers(monkeypatch, uniform, token):
    class Fixed:
        random = staticmethod(lambda: uniform)

    sampler = Sampler(PLAIN, 4, [])
    monkeypatch.setattr(sampler, "_rng", Fixed)
    assert sampler.sample(np.array([-math.inf, 5, 5, -math.inf], np.float32)) == token


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}, {"repetition_penalty": 2.0}],
)
def test_distribution(changes):
    options, count = replace(PLAIN, **changes), 4000
    prompt = (1, 3)
    # The sampler remembers what it drew, so a repetition penalty is checked on first tokens only.
    if options.repetition_penalty == 1:
        tokens = draws(LOGITS, options, count, prompt)
    else:
        tokens = [draws(LOGITS, replace(options, seed=seed), 1, prompt)[0] for seed in range(count)]
    observed = np.bincount(tokens, minlength=len(LOGITS))
    expected = count * probabilities(LOGITS, options, prompt)[0]
    possible = expected > 0
    assert observed[~possible].sum() == 0
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 27  # 6 degrees of freedom or fewer: a right sampler fails once in 7,000 seeds
