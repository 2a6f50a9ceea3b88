"""Which experts tokens take: every kind of router against its definition in float64, with the same bits everywhere."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from mpillama.kernels import arguments
from mpillama.models.linear import Matrix
from mpillama.models.router import SCORES
from mpillama.quant.types.f32 import F32
from mpillama.quant.weight_type import LANES, round_up
from tests.kernels.kernel_parts import everywhere, packed, random_matrix, seen_by
from tests.kernels.test_half_layers import HIDDEN, MlpCase, expected_mixture

KINDS = list(SCORES)


@dataclass
class Router:
    """What the kernels are told, and logits of some tokens."""

    logits: np.ndarray
    kind: str = "sigmoid"
    chosen: int = 3
    renormalise: bool = True
    epsilon: float = 1e-20
    scaling: float = 2.5
    groups: int = 1
    chosen_groups: int = 1
    bias: np.ndarray | None = None
    correction: np.ndarray | None = None

    def choose(self, team) -> tuple[np.ndarray, np.ndarray]:
        experts = self.logits.shape[1]
        width = round_up(experts, LANES)
        matrix = Matrix(F32, np.zeros((width // LANES, 32, LANES), np.float32))
        argument = arguments.Router(
            matrix=matrix.column_parallel(), bias=arguments.address(self.bias),
            correction=arguments.address(self.correction), epsilon=self.epsilon, scaling=self.scaling,
            scores=SCORES[self.kind], chosen=self.chosen, renormalise=self.renormalise, groups=self.groups,
            chosen_groups=self.chosen_groups,
        )  # fmt: skip
        padded = np.pad(self.logits, ((0, 0), (0, width - experts)), constant_values=np.nan)
        return team.choose_experts(argument, experts, padded)

    def expected(self) -> SimpleNamespace:
        """float64, by the definition."""
        logits = self.logits.astype(np.float64) + (0 if self.bias is None else self.bias)
        scores = {
            "softmax": lambda x: np.exp(x) / np.exp(x).sum(axis=1, keepdims=True),
            "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
            "sqrt_softplus": lambda x: np.sqrt(np.logaddexp(0, x)),
            "logits": lambda x: x,
            "logits_to_sigmoid": lambda x: x,
        }[self.kind](logits)
        by = scores + (0 if self.correction is None else self.correction)
        if self.groups > 1:
            grouped = by.reshape(len(by), self.groups, -1)
            best = np.argsort(-np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2), axis=1, kind="stable")
            for t, order in enumerate(best):
                grouped[t, order[self.chosen_groups :]] = -np.inf
            by = grouped.reshape(by.shape)
        chosen = np.argsort(-by, axis=1, kind="stable")[:, : self.chosen]
        shares = np.take_along_axis(scores, chosen, axis=1)
        shares = np.exp(shares) if self.kind == "logits" else shares
        shares = 1 / (1 + np.exp(-shares)) if self.kind == "logits_to_sigmoid" else shares
        if self.renormalise:
            shares = shares / (shares.sum(axis=1, keepdims=True) + self.epsilon)
        return SimpleNamespace(chosen=chosen, shares=shares * self.scaling)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("with_vectors", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_router_chooses_by_its_definition(kind, with_vectors, groups):
    """Also where a correction turns the order round, and for shares that need not add up to one."""
    rng = np.random.default_rng(KINDS.index(kind))
    for experts, renormalise in ((20, True), (32, False), (100, True)):
        logits = (3 * rng.standard_normal((200, experts))).astype(np.float32)
        vectors = [rng.uniform(-1, 1, experts).astype(np.float32) if with_vectors else None for _ in range(2)]
        router = Router(
            logits, kind, renormalise=renormalise or kind == "logits", groups=groups, chosen_groups=min(groups, 2),
            bias=vectors[0], correction=vectors[1],
        )  # fmt: skip
        chosen, shares = everywhere(router.choose)
        expected = router.expected()
        assert np.array_equal(chosen, expected.chosen)
        np.testing.assert_allclose(shares, expected.shares, rtol=2e-6)
        assert not with_vectors or not np.array_equal(chosen, np.argsort(-logits, axis=1)[:, :3])


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_ties_go_to_the_lower_number(kind, groups):
    router = Router(np.zeros((1, 12), np.float32), kind, chosen=4, groups=groups, chosen_groups=min(groups, 2))
    chosen, shares = everywhere(router.choose)
    assert chosen.tolist() == [[0, 1, 2, 3]]
    np.testing.assert_allclose(shares, 2.5 / 4, rtol=1e-6)


def test_scores_that_saturate_are_ties():
    """From 17 on the sigmoid is 1 in float32."""
    router = Router(np.float32([[1, 40, 0, 90, 60]]), chosen=2)
    assert everywhere(router.choose)[0].tolist() == [[1, 3]]


def test_a_correction_decides_but_has_no_share():
    router = Router(np.float32([[0, 1, 2, 3]]), chosen=1, scaling=1.0, renormalise=False)
    router.correction = np.float32([9, 0, 0, 0])
    chosen, shares = everywhere(router.choose)
    assert chosen.tolist() == [[0]]
    assert shares.tolist() == [[0.5]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_bad_logit_shows_in_the_shares(kind, groups):
    logits = np.zeros((2, 8), np.float32)
    logits[1, 5] = np.nan
    router = Router(logits, kind, chosen=2, groups=groups, chosen_groups=1)
    chosen, shares = everywhere(router.choose)
    assert np.isfinite(shares[0]).all()
    assert np.isnan(shares[1]).any()
    assert ((chosen >= 0) & (chosen < 8)).all()


@pytest.mark.parametrize("x", [-200.0, -88.0, -20.0, -1e-3, 0.0, 1e-3, 1.0, 30.0, 1e6, np.inf])
def test_the_root_of_softplus_over_its_range(x):
    router = Router(np.float32([[x]]), "sqrt_softplus", chosen=1, renormalise=False, scaling=1.0)
    shares = everywhere(router.choose)[1]
    np.testing.assert_allclose(shares[0, 0], np.sqrt(np.logaddexp(0, x)), rtol=1e-6, atol=1e-19)


# -- an expert that all tokens share ----------------------------------------------------------------------------------


class SharedCase(MlpCase):
    """Experts, and one of `shared` channels for all tokens, of another type than theirs."""

    def __init__(self, tokens: int, weights: str, shared: int, shared_type: str, gated: bool):
        super().__init__(tokens, 96, weights, experts=6, chosen=2)
        self.shared_type, self.width = shared_type, shared
        self.shared = [
            packed(random_matrix(shared, HIDDEN, seed=91) / 8, shared_type),
            packed(random_matrix(shared, HIDDEN, seed=92) / 8, shared_type),
            packed(random_matrix(HIDDEN, shared, seed=93) / 8, shared_type, 32),
        ]
        row = np.zeros((LANES, HIDDEN), np.float32)
        row[0] = random_matrix(1, HIDDEN, seed=94)[0] / 4
        self.gate_row = packed(row, "f32") if gated else None

    def prepare(self, in_flight: int = 1):
        self.inner = self.width
        layer, a = super().prepare(in_flight)
        gate, up, down = (m for m, _ in self.shared)
        layer.shared_gate, layer.shared_up = gate.column_parallel(), up.column_parallel()
        layer.shared_down = down.row_parallel()
        if self.gate_row:
            layer.shared_router = self.gate_row[0].column_parallel()
        return layer, a

    def expected(self, hidden: np.ndarray) -> np.ndarray:
        seen = seen_by(self.shared[0][0].weight_type, hidden)
        gate, up, down = (dense for _, dense in self.shared)
        x = seen @ gate.T
        inner = x / (1 + np.exp(-x)) * (seen @ up.T)
        if self.gate_row:
            inner = inner / (1 + np.exp(-(hidden.astype(np.float64) @ self.gate_row[1][0])))[:, None]
        shared = seen_by(self.shared[2][0].weight_type, inner.astype(np.float32)) @ down.T
        return expected_mixture(self, hidden) + shared


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("weights", "shared_type"), [("f32", "f32"), ("q4_0", "bf16"), ("f16", "q8_0")])
def test_a_shared_expert(weights, shared_type, gated, tokens):
    """Narrower and wider than the others; the same bits in any company."""
    for width in (64, 160):
        case = SharedCase(tokens, weights, width, shared_type, gated)
        found = case.everywhere()
        expected = case.expected(found.hidden)
        quantised = case.kind.quantised or case.shared[0][0].weight_type.quantised
        tolerance = 1e-2 * np.abs(expected).max() if quantised else 1e-5
        np.testing.assert_allclose(found.partial, expected, atol=tolerance)
        case.x = case.x[-1:]
        assert np.array_equal(case.everywhere().partial[0], found.partial[-1])
