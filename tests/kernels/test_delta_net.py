"""The half layer of gated delta nets against float64 NumPy, and against itself in other company.

As in test_kernels.py, everything is computed with every instruction set that this processor has and on 1, 2 and 3
threads, and the bits must be the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mpillama.formats.native.writer import pack_tensor
from mpillama.models.attention import KV_TYPES
from mpillama.models.cache import joint_step
from mpillama.models.delta_net import PREFIX, TAPS, GatedDeltaNet
from mpillama.models.linear import LayerWeights, Matrix
from mpillama.models.partition import Partition, partitions
from mpillama.models.tensors import TensorSpec, WeightTypes
from mpillama.models.workspace import Angles, StepArrays
from mpillama.quant.registry import WEIGHT_TYPES
from tests.kernels.kernel_parts import blank_activations, everywhere, same_bits

HIDDEN, EPS = 64, 1e-5
NET = GatedDeltaNet(key_heads=3, value_heads=6, key_dim=12, value_dim=20)
NORM = "input_layernorm.weight"
Tensors = dict[str, np.ndarray]


def random_tensors(net: GatedDeltaNet) -> Tensors:
    """By name within the layer, in a checkpoint's shapes."""
    found = {NORM: np.random.default_rng(99).uniform(0.6, 1.4, HIDDEN).astype(np.float32)}
    for seed, spec in enumerate(net.specs("", HIDDEN, WeightTypes(WEIGHT_TYPES["f32"]))):
        rng = np.random.default_rng(seed)
        if spec.name.endswith(".A"):  # from heads that hardly forget to those that forget at once
            values = np.exp(rng.uniform(-6, 3, spec.source_shape))
        elif "conv1d" in spec.name:
            values = rng.standard_normal(spec.source_shape)
        elif spec.vector:
            values = rng.uniform(0.5, 1.5, spec.source_shape)
        else:
            scale = 2.0 if "proj_a" in spec.name else 1.0
            values = scale * rng.standard_normal(spec.source_shape) / np.sqrt(spec.source_shape[1])
        found[spec.name] = values.astype(np.float32)
    return found


@dataclass
class Rank:
    """What a rank has of a layer, and states of sequences in slots."""

    net: GatedDeltaNet
    part: Partition
    weights: LayerWeights
    states: list[np.ndarray]

    def run(self, team: Any, x: np.ndarray, step: Any) -> np.ndarray:
        """The rank's part of the sum; states are written in their place."""
        sizes = self.net.step_widths(self.part)
        nan = lambda width, dtype=np.float32: np.full((len(x), width), np.nan, dtype)  # noqa: E731
        a = StepArrays(
            x=x.copy(), hidden=blank_activations(len(x), HIDDEN), q=nan(sizes["q"]), k=nan(sizes["k"]),
            v=nan(sizes["v"]), context=blank_activations(len(x), sizes["context"]), gate=blank_activations(len(x), 0),
            latent=blank_activations(len(x), sizes["latent"]), up=nan(0), gates=nan(sizes["gates"]),
            partial=nan(HIDDEN, np.float64), addend=nan(0), squares=nan(4, np.float64),
            shifts=np.full(len(x), np.nan), chosen=np.empty((len(x), 0), np.int32),
            angles=(Angles(nan(0), nan(0)),),
        )  # fmt: skip
        step.describe(a.argument)
        a.argument.in_flight = 1
        layer = self.net.layer(self.weights, self.part, HIDDEN, NORM, EPS)
        self.net.run(team, layer, self.net.cache_argument(self.states, KV_TYPES["f32"]), a.argument, None)
        return a.partial


def rank_of(
    net: GatedDeltaNet, tensors: Tensors, slots: int, weights: str = "f32", ranks: int = 1, rank: int = 0
) -> Rank:
    """One rank of several; its states hold NaN until something is written."""
    part = partitions(net.splits, ranks)[rank]
    loaded: dict[str, Any] = {NORM: tensors[NORM]}
    for spec in net.specs("", HIDDEN, WeightTypes(WEIGHT_TYPES[weights])):
        arrays = [
            cut(spec, part, *pair) for pair in zip(spec.arrays(), pack_tensor(spec, tensors[spec.name]), strict=True)
        ]
        loaded[spec.name] = arrays[0] if spec.vector else Matrix.of(spec.weight_type, arrays)
    states = [np.full((slots, *shape), np.nan, dtype) for shape, dtype in net.state_arrays(part)]
    return Rank(net, part, LayerWeights(loaded), states)


def cut(spec: TensorSpec, part: Partition, stored: Any, whole: np.ndarray) -> np.ndarray:
    units = spec.units_of(part)
    return np.ascontiguousarray(whole[units.start * stored.entries : units.stop * stored.entries])


def step_of(
    segments: Sequence[tuple[int, int]], states: Sequence[tuple[int, int]] | None = None,
    snapshots: Sequence[tuple[int, int]] = (),
) -> Any:  # fmt: skip
    """Of each sequence (tokens, first position), the slots of its state, and (token, slot) of snapshots."""
    counts, starts = (np.array(numbers) for numbers in zip(*segments, strict=True))
    tables = np.zeros((len(segments), 100), np.int64)
    of_states = None if states is None else np.array(states)
    return joint_step(
        np.zeros(counts.sum(), np.int32), starts, counts, counts, tables, of_states,
        np.array(snapshots).reshape(-1, 2),
    )  # fmt: skip


class Reference:
    """The layer in float64, one token after the other; `dense` holds the values that matrices have."""

    def __init__(self, net: GatedDeltaNet, tensors: Tensors, weights: str = "f32"):
        self.net = net
        kind = WEIGHT_TYPES[weights]
        self.dense = {name: values.astype(np.float64) for name, values in tensors.items()}
        for spec in net.specs("", HIDDEN, WeightTypes(kind)):
            if not spec.vector and weights != "f32":
                rows, columns = spec.source_shape
                whole = kind.unpack(pack_tensor(spec, tensors[spec.name])).reshape(spec.rows, spec.columns)
                by_head = whole.reshape(spec.row_chunks, -1, spec.column_chunks, spec.columns // spec.column_chunks)
                true = by_head[:, : rows // spec.row_chunks, :, : columns // spec.column_chunks]
                self.dense[spec.name] = true.reshape(rows, columns).astype(np.float64)

    def of(self, name: str) -> np.ndarray:
        return self.dense[PREFIX + name]

    def start(self) -> tuple[np.ndarray, np.ndarray]:
        """No tokens before, and states [value_heads, key_dim, value_dim] of zeros."""
        net = self.net
        width = 2 * net.key_heads * net.key_dim + net.value_heads * net.value_dim
        return np.zeros((TAPS - 1, width)), np.zeros((net.value_heads, net.key_dim, net.value_dim))

    def token(self, x: np.ndarray, state: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, Any]:
        """The output [hidden] of one token, and the state behind it."""
        net, (tail, memory) = self.net, state
        h = x / np.sqrt((x.astype(np.float64) ** 2).mean() + EPS) * self.dense[NORM]
        window = np.vstack([tail, np.concatenate([self.of(f"in_proj_{part}.weight") @ h for part in "qkv"])])
        taps = np.concatenate([self.of(f"conv1d_{part}.weight").reshape(-1, TAPS) for part in "qkv"])
        mixed = (window * taps.T).sum(axis=0)
        mixed = mixed / (1 + np.exp(-mixed))
        keys = net.key_heads * net.key_dim
        q, k, v = mixed[:keys], mixed[keys : 2 * keys], mixed[2 * keys :].reshape(net.value_heads, -1)
        q, k = (unit(part.reshape(net.key_heads, -1)).repeat(net.group, axis=0) for part in (q, k))
        q = q / np.sqrt(net.key_dim)
        a, b, z = (self.of(f"in_proj_{part}.weight") @ h for part in "abz")
        decay = np.exp(-self.of("A") * np.log1p(np.exp(a + self.of("dt_bias"))))
        memory = memory * decay[:, None, None]
        u = (v - np.einsum("hkv,hk->hv", memory, k)) / (1 + np.exp(-b))[:, None]
        memory = memory + k[:, :, None] * u[:, None, :]
        out = np.einsum("hkv,hk->hv", memory, q)
        out = out / np.sqrt((out**2).mean(axis=1, keepdims=True) + EPS) * self.of("norm.weight")
        out = out.reshape(-1) * (z / (1 + np.exp(-z)))
        return self.of("out_proj.weight") @ out, (window[1:], memory)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(axis=1, keepdims=True) + 1e-6)


def held(rank: Rank, slot: int) -> tuple[np.ndarray, np.ndarray]:
    """The state in a slot of the only rank, as Reference has it."""
    net, (tails, sums) = rank.net, rank.states
    keys, values = 32 * net.key_heads, 32 * net.value_heads
    parts = np.split(tails[slot], [keys, 2 * keys], axis=1)
    assert parts[2].shape[1] == values
    dims = (net.key_dim, net.key_dim, net.value_dim)
    true = [p.reshape(TAPS - 1, -1, 32)[:, :, :dim].reshape(TAPS - 1, -1) for p, dim in zip(parts, dims, strict=True)]
    memory = sums[slot].transpose(0, 2, 1, 3).reshape(net.value_heads, 32, 32)
    return np.concatenate(true, axis=1), memory[:, : net.key_dim, : net.value_dim]


def near(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


TENSORS = random_tensors(NET)
X = np.random.default_rng(5).standard_normal((40, HIDDEN)).astype(np.float32)


def test_a_prompt_and_the_tokens_behind_it():
    """In chunks, with snapshots; read from one slot and written to another, or in its place."""
    reference, state, outputs, states = Reference(NET, TENSORS), None, [], []
    for x in X:
        out, state = reference.token(x, state or reference.start())
        outputs.append(out)
        states.append(state)
    rank = rank_of(NET, TENSORS, 7)

    def run(team: Any) -> tuple[np.ndarray, ...]:
        for array in rank.states:
            array[:] = np.nan
        steps = [
            (0, step_of([(17, 0)], [(-1, 3)], [(0, 0), (9, 1), (16, 2)])),
            (17, step_of([(22, 17)], [(3, 4)], [(4, 3)])),
            (39, step_of([(1, 39)], [(4, 4)])),
        ]
        found = [rank.run(team, X[start : start + len(step.token_ids)], step) for start, step in steps]
        return (np.concatenate(found), *(array.copy() for array in rank.states))

    partial, *stored = everywhere(run)
    rank.states = list(stored)
    np.testing.assert_allclose(partial, outputs, atol=2e-5)
    for slot, token in {0: 0, 1: 9, 2: 16, 3: 21, 4: 39}.items():
        near(held(rank, slot), states[token])
    assert np.isnan(held(rank, 5)[1]).all()


@pytest.mark.parametrize("size", [1, 2, 7, 39])
def test_nothing_depends_on_chunks_slots_and_company(size):
    """Tokens one by one have the bits of a prompt, with two other sequences in the same steps."""
    rank = rank_of(NET, TENSORS, 9)

    def whole(team: Any) -> tuple[np.ndarray, ...]:
        partial = rank.run(team, X, step_of([(40, 0)], [(-1, 0)]))
        return (partial, *(array[0].copy() for array in rank.states))

    def in_chunks(team: Any) -> tuple[np.ndarray, ...]:
        found, slot = [], 5
        for start in range(0, len(X), size):
            count = min(size, len(X) - start)
            others = np.concatenate([X[::-1], X])[: 3 + count]
            x = np.concatenate([others[:3], X[start : start + count], others[3:]])
            segments = [(3, start), (count, start), (count, 0)]
            to = 6 if slot == 5 else 5
            states = [(1 if start else -1, 1), (slot if start else -1, to), (-1, 2)]
            found.append(rank.run(team, x, step_of(segments, states, [(0, 7)]))[3 : 3 + count])
            slot = to
        return (np.concatenate(found), *(array[slot].copy() for array in rank.states))

    assert same_bits(everywhere(in_chunks), everywhere(whole))


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_ranks_add_up_to_the_same_bits(ranks):
    """Heads of a group may lie on several ranks, and some ranks have none; states are parts of the whole."""
    alone = rank_of(NET, TENSORS, 1)
    step = step_of([(40, 0)], [(-1, 0)])
    expected = everywhere(lambda team: (alone.run(team, X, step), *(array.copy() for array in alone.states)))
    several = [rank_of(NET, TENSORS, 1, ranks=ranks, rank=number) for number in range(ranks)]
    parts = [everywhere(lambda team, rank=rank: rank.run(team, X, step)) for rank in several]
    assert np.array_equal(np.sum(parts, axis=0), expected[0])
    assert same_bits(np.concatenate([rank.states[1] for rank in several], axis=1), expected[2])


@pytest.mark.parametrize("weights", ["q8_0", "q4_0", "bf16"])
def test_other_weight_types(weights):
    """The bits are the same everywhere and in chunks; values stay near those of the weights that there are."""
    rank, reference, state = rank_of(NET, TENSORS, 1, weights), Reference(NET, TENSORS, weights), None
    expected = []
    for x in X:
        out, state = reference.token(x, state or reference.start())
        expected.append(out)
    found = everywhere(lambda team: rank.run(team, X, step_of([(40, 0)], [(-1, 0)])))
    first = everywhere(lambda team: rank.run(team, X[:33], step_of([(33, 0)], [(-1, 0)])))
    assert same_bits(first, found[:33])
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < (1e-5 if weights == "bf16" else 0.1)


def test_decays_of_huge_and_tiny_rates_stay_numbers():
    """A rate that forgets all, and one that forgets nothing, for gates of any size."""
    tensors = dict(TENSORS)
    tensors[f"{PREFIX}A"] = np.array([1e30, 1e-30, 0.0, 80.0, 1.0, 1e10], np.float32)
    tensors[f"{PREFIX}in_proj_a.weight"] = 50 * TENSORS[f"{PREFIX}in_proj_a.weight"]
    rank = rank_of(NET, tensors, 1)
    found = everywhere(lambda team: rank.run(team, X, step_of([(40, 0)], [(-1, 0)])))
    assert np.isfinite(found).all()
