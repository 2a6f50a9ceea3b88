"""The parts of gpt-oss against float64: scores without a value, the clamped activation, biases of experts."""

import numpy as np
import pytest

from mpillama.kernels import arguments
from mpillama.kernels.arguments import Activation
from mpillama.models.linear import Matrix
from mpillama.quant.types.f32 import F32
from tests.kernels.kernel_parts import everywhere, same_bits, seen_by
from tests.kernels.test_half_layers import HIDDEN, KV_TYPES, AttentionCase, MlpCase

ALPHA, LIMIT = 1.702, 0.7


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("window", [0, 5, 100])
@pytest.mark.parametrize("segments", [[(1, 0)], [(1, 2100)], [(9, 60)], [(3, 5), (7, 1020), (1, 1)]])
def test_a_sink_takes_part_in_the_softmax(segments, window, kv_type):
    """Far below the other scores, where it changes nothing, among them, and far above."""
    case = AttentionCase(segments, [0, 2, 3], kv_type, window=window)
    plain = case.everywhere().context.reshape(case.tokens, 3, -1)
    for sinks in ([-200.0, -1.0, 0.5], [1.0, 3.0, 60.0]):
        case.sinks = np.float32(sinks)
        found = case.everywhere()
        np.testing.assert_allclose(found.context, case.context(found.q), atol=4e-6)
        if sinks[0] == -200:
            assert same_bits(found.context.reshape(plain.shape)[:, 0], plain[:, 0])


# -- experts -----------------------------------------------------------------------------------------------------------


class BiasedExperts(MlpCase):
    """Experts with biases and the clamped activation; a rank that is not the first adds no biases of down."""

    def __init__(self, tokens: int, weights: str = "f32", is_first: bool = True):
        super().__init__(tokens, 96, weights, experts=7, chosen=3, renormalise=True)
        rng = np.random.default_rng(3)
        self.of_gate, self.of_up = (rng.standard_normal((7, 96)).astype(np.float32) for _ in range(2))
        self.of_down = rng.standard_normal((7, HIDDEN)).astype(np.float32)
        self.is_first = is_first

    def prepare(self, in_flight: int = 1):
        layer, a = super().prepare(in_flight)
        layer.gate_bias, layer.up_bias = map(arguments.address, (self.of_gate, self.of_up))
        layer.down_bias = arguments.address(self.of_down if self.is_first else None)
        layer.activation, layer.alpha, layer.limit = Activation.CLAMPED_SILU, ALPHA, LIMIT
        return layer, a

    def expected(self, hidden: np.ndarray) -> np.ndarray:
        logits = hidden.astype(np.float64) @ self.router_dense[:7].T
        out, seen = np.zeros((len(hidden), HIDDEN)), seen_by(self.kind, hidden)
        for t in range(len(hidden)):
            chosen = np.argsort(-logits[t])[:3]
            shares = np.exp(logits[t, chosen] - logits[t].max())
            for e, share in zip(chosen, shares / shares.sum(), strict=True):
                gate, up = (seen[t] @ self.made[e][i][1].T + b[e] for i, b in enumerate((self.of_gate, self.of_up)))
                inner = clamped(gate, up) * share
                out[t] += seen_by(self.down_kind, inner[None].astype(np.float32))[0] @ self.made[e][2][1].T
                out[t] += share * self.of_down[e] * self.is_first
        return out


def clamped(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate = np.minimum(gate, LIMIT)
    return (np.clip(up, -LIMIT, LIMIT) + 1) * gate / (1 + np.exp(-ALPHA * gate))


@pytest.mark.parametrize("tokens", [1, 2, 19])
@pytest.mark.parametrize("weights", ["f32", "q8_0"])
@pytest.mark.parametrize("is_first", [True, False])
def test_experts_with_biases(tokens, weights, is_first):
    case = BiasedExperts(tokens, weights, is_first)
    found = case.everywhere()
    expected = case.expected(found.hidden)
    tolerance = 1e-2 * np.abs(expected).max() if case.kind.quantised else 1e-5
    np.testing.assert_allclose(found.partial, expected, atol=tolerance)
    case.x = case.x[-1:]
    assert np.array_equal(case.everywhere().partial[0], found.partial[-1])


def test_the_clamped_activation_over_its_range():
    """Below, at and above the limits, and a number that is none stays."""
    x = np.concatenate([np.linspace(-60, 60, 959), [np.nan]]).astype(np.float32)
    case = MlpCase(1, 32)
    gate, up = np.tile(x, 2), np.concatenate([x[::-1], np.full(960, 0.25)]).astype(np.float32)
    case.inner = len(gate)

    blank = Matrix(F32, np.zeros((len(gate) // 16, HIDDEN, 16), np.float32))
    down = Matrix(F32, np.zeros((len(gate) // 32, HIDDEN // 16, 32, 16), np.float32))

    def run(team):
        layer, a = case.prepare()
        for name, values in (("gate", gate), ("up", up)):
            setattr(layer, name, blank.column_parallel())
            setattr(layer, f"{name}_bias", arguments.address(values))
        layer.down = down.row_parallel()
        layer.activation, layer.alpha, layer.limit = Activation.CLAMPED_SILU, ALPHA, LIMIT
        team.mlp_half(layer, a.argument)
        return a.gate.x

    found = everywhere(run)[0]
    with np.errstate(over="ignore"):
        expected = clamped(gate.astype(np.float64), up.astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=5e-6, atol=1e-30)  # alpha x is rounded before e to it
    assert np.isnan(found).sum() == 3
