"""What single families change in the halves of a layer, against float64 NumPy: as test_half_layers.py, everywhere."""

import math

import numpy as np
import pytest

from mpillama.kernels.arguments import Activation, HeadNorm
from tests.kernels.kernel_parts import everywhere, random_matrix, same_bits, teams
from tests.kernels.test_half_layers import (
    EPS,
    KV_TYPES,
    AttentionCase,
    MlpCase,
    expected_mixture,
    normalised,
    rotated,
)

SEQUENCES = [(1, 5), (17, 120), (1, 1600), (3, 62)]


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_scores_are_bent_to_within_a_cap(kv_type):
    case = AttentionCase(SEQUENCES, [0, 2, 3], kv_type, window=100)
    plain = case.everywhere()
    case.changes["soft_cap"] = 1.5
    found = case.everywhere()
    np.testing.assert_allclose(found.context, case.context(found.q), atol=4e-6)
    assert np.abs(found.context - plain.context).max() > 0.01


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("chunk", [1, 3, 64, 100, 1024, 1500])
def test_attention_within_a_chunk(chunk, kv_type):
    case = AttentionCase(SEQUENCES, [0, 2, 3], kv_type)
    case.changes["chunk"] = chunk
    found = case.everywhere()
    np.testing.assert_allclose(found.context, case.context(found.q), atol=4e-6)


def test_a_layer_that_turns_nothing_and_has_no_norm():
    case = AttentionCase([(7, 5)], [0, 2, 3])
    case.norm = None
    found = case.everywhere()
    assert np.array_equal(found.hidden, case.x)
    np.testing.assert_allclose(found.q.reshape(7, -1), case.x @ case.qkv_dense[0].T, atol=1e-5)
    np.testing.assert_allclose(found.context, case.context(found.q), atol=4e-6)


def test_queries_that_grow():
    case = AttentionCase([(7, 5)], [0, 2, 3])
    plain = case.everywhere().q.copy()
    case.query_factors = np.linspace(1, 2, 7, dtype=np.float32)
    assert np.array_equal(case.everywhere().q, plain * case.query_factors[:, None, None])


def heads_before_norms(case: AttentionCase, found, index: int) -> np.ndarray:
    """float64 queries or keys with their bias: [tokens, heads, 32]."""
    return (found.hidden @ case.qkv_dense[index].T + case.biases[index]).reshape(len(case.x), -1, 32)


@pytest.mark.parametrize("tokens", [1, 9])
def test_norms_of_heads_after_rope(tokens):
    case = AttentionCase([(tokens, 5)], [0, 2, 3], full=True)
    case.changes["head_norm"] = HeadNorm.AFTER_ROPE
    found = case.everywhere()
    for index, name in enumerate("qk"):
        expected = normalised(rotated(case, heads_before_norms(case, found, index)), case.head_norms[index], 20)
        np.testing.assert_allclose(getattr(found, name), expected, atol=2e-5)


def whole(tokens: int, first_counted: int = 0) -> AttentionCase:
    case = AttentionCase([(tokens, 5)], [0, 2, 3], full=True)
    case.head_norms = [np.tile(norm, n) for norm, n in zip(case.head_norms, (case.heads, case.kv_heads), strict=True)]
    case.changes |= {"head_norm": HeadNorm.WHOLE_PROJECTION, "q_width": 20 * 3, "k_width": 20 * 2}
    case.changes["first_counted"] = first_counted
    return case


@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_norms_of_whole_projections(tokens):
    case = whole(tokens)
    found = case.everywhere()
    for index, name in enumerate("qk"):
        plain = heads_before_norms(case, found, index)
        joint = normalised(plain.reshape(tokens, -1), case.head_norms[index], 20 * plain.shape[1]).reshape(plain.shape)
        np.testing.assert_allclose(getattr(found, name), rotated(case, joint), atol=2e-5)


def test_sums_of_squares_are_those_of_the_heads_in_any_order():
    """Multiples of 4 and of 2^-40 whose sum is right to 2^-41 a head; a head of the rank before is not counted."""
    counted, rest = whole(9), whole(9, first_counted=1)
    squares = everywhere(lambda team: counted.run(team).a.squares)
    of_rest = everywhere(lambda team: rest.run(team).a.squares)
    coarse, fine = squares[:, ::2], squares[:, 1::2]
    assert np.array_equal(np.rint(coarse / 4) * 4, coarse)
    assert np.array_equal(np.rint(fine * 2.0**40) / 2.0**40, fine)
    assert np.abs(fine).max() <= 2 * 3
    found = counted.everywhere()
    for index, pair in enumerate((slice(0, 2), slice(2, 4))):
        heads = heads_before_norms(counted, found, index)
        np.testing.assert_allclose(squares[:, pair].sum(axis=1), (heads**2).sum(axis=(1, 2)), rtol=1e-5)
    assert np.array_equal(squares[:, :2], of_rest[:, :2])
    assert np.all(of_rest[:, 2] + of_rest[:, 3] < squares[:, 2] + squares[:, 3])


# -- MLP, norms after a half, logits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 9])
def test_gelu(tokens, monkeypatch):
    case = MlpCase(tokens, 160)
    prepare = case.prepare

    def with_gelu(in_flight=1):
        layer, a = prepare(in_flight)
        layer.activation = Activation.GELU_TANH
        return layer, a

    monkeypatch.setattr(case, "prepare", with_gelu)
    found = case.everywhere()
    gate, up = (found.hidden.astype(np.float64) @ case.made[0][i][1].T for i in range(2))
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    np.testing.assert_allclose(found.gate, 0.5 * gate * (1 + np.tanh(inner)) * up, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("tokens", [1, 200])
def test_a_norm_after_a_half(tokens):
    x, addend = random_matrix(tokens, 96), random_matrix(tokens, 96, seed=1)
    addend[:, 70:] = 0
    weight = np.concatenate([np.linspace(0.5, 2, 70), np.zeros(26)]).astype(np.float32)

    def run(team):
        out = x.copy()
        team.add_normalised(out, addend.copy(), weight, 70, EPS, 0.5)
        return out

    found = everywhere(run)
    np.testing.assert_allclose(found, x + 0.5 * normalised(addend, weight, 70), rtol=2e-6, atol=1e-6)
    assert same_bits(found[:, 70:], x[:, 70:])


def test_factors_of_sums():
    total, x, bias = np.random.default_rng(4).standard_normal((3, 32)), random_matrix(3, 32), random_matrix(1, 32)[0]

    def run(team):
        out, embedding = x.copy(), np.empty_like(x)
        team.add_rounded(out, total, bias, 0.22)
        team.round_to_float(total, embedding, 6.0)
        return out, embedding

    out, embedding = everywhere(run)
    factor = np.float32(0.22)
    assert same_bits(out, x + total.astype(np.float32) * factor + bias * factor)
    assert same_bits(embedding, total.astype(np.float32) * np.float32(6))


def test_logits_are_divided_and_bent():
    tiny = np.float32(10.0) ** np.arange(-40, 0)
    x = np.concatenate([np.linspace(-400, 400, 60_000), tiny, -tiny, [0.0, -0.0, 1e30, -1e30]]).astype(np.float32)
    x = np.concatenate([x, np.zeros(-len(x) % 16, np.float32)])

    def run(team, divisor=3.0, cap=9.0):
        out = x.copy()
        team.scale_logits(out, divisor, cap)
        return out

    divided = x / np.float32(3)
    np.testing.assert_allclose(everywhere(run), 9 * np.tanh(divided.astype(np.float64) / 9), rtol=4e-7, atol=1e-44)
    assert same_bits(everywhere(lambda team: run(team, cap=0.0)), divided)
    bad = np.full(16, np.nan, np.float32)
    teams()[0].scale_logits(bad, 1.0, 5.0)
    assert np.isnan(bad).all()


@pytest.mark.parametrize("tokens", [1, 9])
def test_shares_may_weigh_what_experts_see(tokens, monkeypatch):
    case = MlpCase(tokens, 96, experts=5, chosen=2)
    prepare, plain = case.prepare, case.everywhere().partial

    def with_weighed_inputs(in_flight=1):
        layer, a = prepare(in_flight)
        layer.weighs_inputs = 1
        return layer, a

    monkeypatch.setattr(case, "prepare", with_weighed_inputs)
    found = case.everywhere()
    monkeypatch.setattr(case, "swiglu", lambda h, expert, share: MlpCase.swiglu(case, h * share, expert))
    np.testing.assert_allclose(found.partial, expected_mixture(case, found.hidden), atol=1e-5)
    assert np.abs(found.partial - plain).max() > 1e-3
