"""The halves of a decoder layer against float64 NumPy, and against themselves in other company.

As in test_kernels.py, everything is computed with every instruction set that this processor has and on 1, 2 and 3
threads, and the bits must be the same.
"""

import time
from ctypes import addressof
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest

from mpillama.kernels import arguments
from mpillama.kernels.shared_sum import PROGRESS_STRIDE, SharedWindow
from mpillama.models import attention
from mpillama.models.linear import Matrix
from mpillama.models.workspace import Angles, StepArrays
from mpillama.quant.registry import WEIGHT_TYPES
from mpillama.quant.weight_type import LANES
from tests.kernels.kernel_parts import (
    GRID,
    TOKENS,
    activations,
    blank_activations,
    blocks_of,
    cached_blocks,
    everywhere,
    from_cached_blocks,
    hadamard,
    libraries,
    matrix,
    packed,
    part,
    random_matrix,
    row_parallel,
    same_bits,
    seen_by,
    stacked,
    teams,
    windows_of,
)

KV_TYPES = ("f32", "f16", "q8", "q4")
SCALED_KV = ("q8", "q4")
EPS = 1e-5
HIDDEN = 64


def blank_step(x: np.ndarray, heads: int, kv_heads: int, head_dim: int, inner: int, half: int = 0) -> StepArrays:
    """A step's arrays, NaN but for x."""
    tokens = len(x)
    nan = lambda *shape, dtype=np.float32: np.full((tokens, *shape), np.nan, dtype)  # noqa: E731
    return StepArrays(
        x=x.copy(), hidden=blank_activations(*x.shape), q=nan(heads, head_dim), k=nan(kv_heads, head_dim),
        v=nan(kv_heads, head_dim), context=blank_activations(tokens, heads * head_dim),
        gate=blank_activations(tokens, inner), latent=blank_activations(tokens, heads * head_dim), up=nan(inner),
        gates=nan(0), partial=nan(x.shape[1], dtype=np.float64), addend=nan(0), squares=nan(4, dtype=np.float64),
        shifts=nan(dtype=np.float64), chosen=np.empty((tokens, 0), np.int32), angles=(Angles(nan(half), nan(half)),),
    )  # fmt: skip


def normalised(x: np.ndarray, weight: np.ndarray, size: int | None = None) -> np.ndarray:
    """RMSNorm in float64 over the last axis, of which `size` are no padding."""
    squares = (x.astype(np.float64) ** 2).sum(axis=-1, keepdims=True) / (size or x.shape[-1])
    return x / np.sqrt(squares + EPS) * weight


# -- attention: the cache as it is defined -----------------------------------------------------------------------------


def stored_keys(keys: np.ndarray, kv_type: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., head_dim, 64] as a cache holds them, and the scales [..., head_dim / 32, 64]."""
    if kv_type not in SCALED_KV:
        return stored_floats(keys, kv_type), no_scales(keys)
    values, scales = cached_blocks(keys.swapaxes(-1, -2), kv_type)  # [..., 64, blocks, 32 or 16]
    *outer, _, count, _ = values.shape
    axes = len(outer)
    steps = values.reshape(*outer, 4, 16, count, -1, 4)
    order = (*range(axes), axes, axes + 2, axes + 3, axes + 1, axes + 4)
    packed_keys = np.ascontiguousarray(steps.transpose(order)).reshape(*outer, -1, 64)
    return packed_keys, halves(scales)


def stored_values(values: np.ndarray, kv_type: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., 64, head_dim] as a cache holds them, and the scales [..., head_dim / 32, 64]."""
    if kv_type not in SCALED_KV:
        return stored_floats(values, kv_type), no_scales(values)
    blocks, scales = cached_blocks(values, kv_type)
    return np.ascontiguousarray(blocks).reshape(*values.shape[:-1], -1), halves(scales)


def readable(stored: np.ndarray) -> np.ndarray:
    """Bit patterns of float16 as such, for which one NaN is like another."""
    return stored.view(np.float16) if stored.dtype == np.int16 else stored


def halves(scales: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(scales.swapaxes(-1, -2)).astype(np.float16).view(np.uint16)


def stored_floats(x: np.ndarray, kv_type: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(np.float32) if kv_type == "f32" else x.astype(np.float16).view(np.int16)


def no_scales(x: np.ndarray) -> np.ndarray:
    return np.zeros((*x.shape[:2], 0, 64), np.uint16)


def held(x: np.ndarray, kv_type: str, keys: bool) -> np.ndarray:
    """What keys [..., head_dim, 64] or values [..., 64, head_dim] are in float64 after being stored."""
    if kv_type not in SCALED_KV:
        with np.errstate(over="ignore"):
            return (x if kv_type == "f32" else x.astype(np.float16)).astype(np.float64)
    rows = x.swapaxes(-1, -2) if keys else x
    blocks, scales = cached_blocks(rows, kv_type)
    decoded = from_cached_blocks(blocks, scales.astype(np.float16), kv_type)
    return decoded.swapaxes(-1, -2) if keys else decoded


class AttentionCase:
    """Sequences over a cache whose blocks are dealt at random; `head_start` tells who shares a KV head.

    The step's own keys and values go to blocks of their own at the end, which nobody reads: what is attended to is in
    `keys` and `values`.
    """

    def __init__(
        self, segments: list[tuple[int, int]], head_start: list[int], kv_type: str = "f32", head_dim: int = 32,
        window: int = 0, weights: str = "f32", full: bool = False,
    ):  # fmt: skip
        rng = np.random.default_rng(len(segments))
        self.kv_type, self.head_dim, self.window, self.weights = kv_type, head_dim, window, weights
        self.head_start = np.array(head_start, np.int64)
        self.heads, self.kv_heads = head_start[-1], len(head_start) - 1
        counts = np.array([n for n, _ in segments])
        firsts = np.cumsum([0, *counts[:-1]])
        self.segments = np.array([[f, n, start] for f, (n, start) in zip(firsts, segments, strict=True)], np.int64)
        blocks = [(n + start + 63) // 64 for n, start in segments]
        dealt, width = rng.permutation(sum(blocks)), max(blocks)
        parts = np.split(dealt, np.cumsum(blocks)[:-1])
        self.tables = np.stack([np.pad(p, (0, width - len(p))) for p in parts]).astype(np.int64)
        self.tokens = int(counts.sum())
        self.own_blocks = (self.tokens + 63) // 64
        every = sum(blocks) + self.own_blocks
        self.keys = 1.5 * rng.standard_normal((every, self.kv_heads, head_dim, 64)).astype(np.float32)
        self.values = rng.standard_normal((every, self.kv_heads, 64, head_dim)).astype(np.float32)
        self.slots = 64 * sum(blocks) + rng.permutation(self.own_blocks * 64)[: self.tokens]
        self.scale = 1 / np.sqrt(head_dim)
        self.x = rng.standard_normal((self.tokens, HIDDEN)).astype(np.float32)
        self.norm = rng.uniform(0.6, 1.4, HIDDEN).astype(np.float32)
        rows = [self.heads, self.kv_heads, self.kv_heads]
        made = [
            packed(1.5 / 8 * random_matrix(n * head_dim or 16, HIDDEN, seed=i), weights) for i, n in enumerate(rows)
        ]
        self.qkv = [m if n else part(m, slice(0)) for (m, _), n in zip(made, rows, strict=True)]
        self.qkv_dense = [dense if n else dense[:0] for (_, dense), n in zip(made, rows, strict=True)]
        o, self.o_dense = packed(random_matrix(HIDDEN, self.heads * head_dim or 32, seed=4), weights, head_dim)
        self.o = o if self.heads else part(o, slice(0))
        half = 10 if full else 0  # of a head's channels, 20 are no padding
        angles = rng.uniform(0, 6, (self.tokens, half))
        self.cosines, self.sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        vector = lambda n: rng.standard_normal(n).astype(np.float32) if full else None  # noqa: E731
        self.biases = [vector(n * head_dim) for n in rows]
        self.head_norms = [vector(head_dim), vector(head_dim)]
        self.changes: dict[str, float] = {}
        self.query_factors: np.ndarray | None = None
        self.sinks: np.ndarray | None = None
        self.gate: Matrix | None = None

    def cache(self) -> list[np.ndarray]:
        """Keys, their scales, values, their scales."""
        if not self.kv_heads:
            return [np.zeros(0, np.uint8)] * 4
        return [*stored_keys(self.keys, self.kv_type), *stored_values(self.values, self.kv_type)]

    def run(self, team, cache: list[np.ndarray] | None = None) -> SimpleNamespace:
        """All that the half layer leaves."""
        a = blank_step(self.x, self.heads, self.kv_heads, self.head_dim, 0, self.cosines.shape[1])
        a.angles[0].cosines[:], a.angles[0].sines[:] = self.cosines, self.sines
        a.argument.query_factors = arguments.address(self.query_factors)
        cache = [array.copy() for array in cache or self.cache()]
        layer = arguments.AttentionLayer(
            **{name: m.column_parallel() for name, m in zip("qkv", self.qkv, strict=True)}, o=self.o.row_parallel(),
            cache=arguments.Cache(*map(arguments.address, cache), attention.KV_TYPES[self.kv_type].number),
            eps=EPS, scale=self.scale, hidden_size=HIDDEN, heads=self.heads, kv_heads=self.kv_heads,
            head_dim=self.head_dim, channels=2 * self.cosines.shape[1] or self.head_dim, window=self.window,
        )  # fmt: skip
        named = dict(
            zip(("q_bias", "k_bias", "v_bias", "q_norm", "k_norm"), self.biases + self.head_norms, strict=True)
        )
        for name, vector in {**named, "norm": self.norm, "head_start": self.head_start, "sinks": self.sinks}.items():
            setattr(layer, name, arguments.address(vector))
        for name, value in self.changes.items():
            setattr(layer, name, value)
        if self.gate is not None:
            layer.gate = self.gate.column_parallel()
        step = a.argument
        for name in ("slots", "segments", "tables"):
            setattr(step, name, arguments.address(getattr(self, name)))
        step.segment_count, step.table_width = self.tables.shape
        step.in_flight = 1
        if layer.head_norm == arguments.HeadNorm.WHOLE_PROJECTION:
            team.project_and_sum(layer, step)
            team.attend_projected(layer, step)
        else:
            team.attention_half(layer, step)
        return SimpleNamespace(a=a, cache=cache)

    def everywhere(self, cache: list[np.ndarray] | None = None) -> SimpleNamespace:
        """The same, everywhere: hidden, q, k, v, context and its blocks, partial, cache."""

        def run(team):
            found = self.run(team, cache)
            a = found.a
            return (
                a.hidden.x,
                a.q,
                a.k,
                a.v,
                a.context.x,
                *blocks_of(a.context),
                a.partial,
                *map(readable, found.cache),
            )

        hidden, q, k, v, context, values, scales, starts, halves, partial, *stored = everywhere(run)
        return SimpleNamespace(
            hidden=hidden, q=q, k=k, v=v, context=context, context_blocks=(values, scales, starts, halves),
            partial=partial, cache=stored,
        )  # fmt: skip

    def context(self, q: np.ndarray) -> np.ndarray:
        """float64 attention of the queries that the kernel made, row by row: [tokens, heads * head_dim]."""
        keys, values = held(self.keys, self.kv_type, True), held(self.values, self.kv_type, False)
        scaled = (q * self.scale).astype(np.float32)
        scaled = hadamard(scaled, 0.125) if self.kv_type == "q4" else scaled
        kind = WEIGHT_TYPES["q8_0" if self.kv_type in SCALED_KV else "f32"]
        rows = seen_by(kind, scaled.reshape(-1, self.head_dim))
        rows = hadamard(rows, 0.25) if self.kv_type == "q4" else rows
        rows, out = rows.reshape(q.shape), np.zeros(q.shape)
        for (first, count, start), table in zip(self.segments, self.tables, strict=True):
            for t in range(count):
                position, chunk, cap = start + t, self.changes.get("chunk", 0), self.changes.get("soft_cap", 0.0)
                first_seen = position - position % chunk if chunk else max(0, position + 1 - (self.window or 1 << 30))
                seen = slice(first_seen, position + 1)
                for kv in range(self.kv_heads):
                    k = keys[table, kv].transpose(0, 2, 1).reshape(-1, self.head_dim)[seen]
                    v = values[table, kv].reshape(-1, self.head_dim)[seen]
                    for h in range(self.head_start[kv], self.head_start[kv + 1]):
                        scores = k @ rows[first + t, h]
                        scores = cap * np.tanh(scores / cap) if cap else scores
                        weights = np.exp(scores - scores.max())
                        sink = 0 if self.sinks is None else np.exp(self.sinks[h] - scores.max())
                        out[first + t, h] = weights @ v / (weights.sum() + sink)
        return out.reshape(len(out), -1)


ATTENTION_CASES = {
    **{f"{n} tokens": ([(n, 0)], [0, 2, 4]) for n in TOKENS},
    "across a block": ([(9, 60)], [0, 2, 4]),
    "one at the end of a block": ([(1, 63)], [0, 1]),
    "one at the start of a block": ([(1, 64)], [0, 1]),
    "across a span": ([(7, 1020)], [0, 2]),
    "one in the third span": ([(1, 2100)], [0, 3]),
    "uneven heads of KV heads": ([(5, 30)], [0, 1, 4, 6]),
    "a KV head without query heads": ([(5, 30)], [0, 0, 3, 3]),
    "more heads than a tile has rows": ([(2, 70)], [0, 21]),
    "several sequences": ([(1, 5), (17, 0), (1, 1100), (3, 62), (1, 0)], [0, 2, 3]),
}


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("name", list(ATTENTION_CASES))
def test_attention(name, kv_type):
    case = AttentionCase(*ATTENTION_CASES[name], kv_type)
    found = case.everywhere()
    np.testing.assert_allclose(found.context, case.context(found.q), atol=4e-6)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("window", [1, 3, 64, 100, 1024, 1500])
def test_attention_within_a_window(window, kv_type):
    case = AttentionCase([(1, 5), (17, 120), (1, 1600), (3, 62)], [0, 2, 3], kv_type, window=window)
    found = case.everywhere()
    np.testing.assert_allclose(found.context, case.context(found.q), atol=4e-6)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_attention_with_other_head_sizes(head_dim, kv_type):
    case = AttentionCase([(5, 62)], [0, 2], kv_type, head_dim)
    found = case.everywhere()
    np.testing.assert_allclose(found.context, case.context(found.q), atol=4e-6)


@pytest.mark.parametrize("weights", ["f32", "q8_0"])
@pytest.mark.parametrize("tokens", [1, 9, 33])
def test_heads_may_be_gated(tokens, weights):
    case = AttentionCase([(tokens, 30)], [0, 1, 4], weights=weights)
    case.gate, dense = packed(random_matrix(case.heads * case.head_dim, HIDDEN, seed=8) / 4, weights)
    found = case.everywhere()
    gates = seen_by(WEIGHT_TYPES[weights], found.hidden) @ dense.T
    np.testing.assert_allclose(found.context, case.context(found.q) / (1 + np.exp(-gates)), atol=4e-6)


def test_attention_on_an_idle_rank():
    for tokens in (1, 3, 20):
        found = AttentionCase([(tokens, 2)], [0]).everywhere()
        assert found.context.shape == (tokens, 0)
        assert np.array_equal(found.partial, np.zeros((tokens, HIDDEN)))


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_attention_of_a_token_does_not_depend_on_its_company(kv_type):
    case = AttentionCase(*ATTENTION_CASES["several sequences"], kv_type)
    together, cache = case.everywhere(), case.cache()
    for (first, count, start), table in zip(case.segments, case.tables, strict=True):
        for t in range(count):
            alone = AttentionCase([(1, start + t)], list(case.head_start), kv_type)
            alone.x, alone.norm, alone.tables = case.x[first + t : first + t + 1], case.norm, table[None].copy()
            alone.slots = case.slots[first + t : first + t + 1]
            found = alone.everywhere(cache)
            assert same_bits(found.context[0], together.context[first + t])
            assert same_bits(found.partial[0], together.partial[first + t])


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_attention_does_not_read_behind_the_last_position(kv_type):
    case = AttentionCase([(3, 70)], [0, 2], kv_type)
    clean, cache, last = case.everywhere().context, case.cache(), case.tables[0, 1]
    if kv_type in SCALED_KV:
        for scales in (cache[1], cache[3]):
            scales[last, ..., 73 - 64 :] = 0x7E00
    else:
        bad = np.float32(np.nan) if kv_type == "f32" else np.int16(0x7E00)
        cache[0][last, :, :, 73 - 64 :], cache[2][last, :, 73 - 64 :] = bad, bad
    assert same_bits(case.everywhere(cache).context, clean)


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
@pytest.mark.parametrize("array", ["x", "keys", "values"])
def test_attention_shows_nan(array, kv_type):
    """A NaN in a query spoils its row, in a key or value (of position 8) the rows that see it."""
    case = AttentionCase([(4, 6)], [0, 1], kv_type)
    place = {"x": (2, 3), "keys": (case.tables[0, 0], 0, 3, 8), "values": (case.tables[0, 0], 0, 8, 3)}[array]
    getattr(case, array)[place] = np.nan
    found = np.isnan(case.everywhere().context)
    assert list(found.any(axis=1)) == ([False, False, True, False] if array == "x" else [False, False, True, True])
    if array != "values":
        assert np.array_equal(found.any(axis=1), found.all(axis=1))


# -- attention: what is around it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 7, 17, 40])
@pytest.mark.parametrize("weights", ["f32", "bf16", "q8_0", "q4_0"])
def test_the_first_half_of_a_layer(weights, tokens):
    """Norm; q, k, v; biases, norms of heads and rotation; attention; o_proj: each from what the one before left."""
    case, kind = AttentionCase([(tokens, 5)], [0, 2, 3], weights=weights, full=True), WEIGHT_TYPES[weights]
    found = case.everywhere()
    np.testing.assert_allclose(found.hidden, normalised(case.x, case.norm), rtol=3e-7)
    h = seen_by(kind, found.hidden)
    for name, dense, bias, norm in zip(
        ("q", "k", "v"), case.qkv_dense, case.biases, [*case.head_norms, None], strict=True
    ):
        expected = (h @ dense.T + bias).reshape(tokens, -1, 32)
        if norm is not None:
            expected = rotated(case, normalised(expected, norm, 20))
        np.testing.assert_allclose(getattr(found, name), expected, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(found.context, case.context(found.q), atol=4e-6)
    exact = seen_by(kind, found.context) @ case.o_dense.T
    np.testing.assert_allclose(found.partial, exact, atol=1e-5)
    assert np.array_equal(np.rint(found.partial / GRID) * GRID, found.partial)
    expected_blocks = blocks_of(activations(libraries()[0], found.context))
    if kind.quantised:
        assert same_bits(found.context_blocks, expected_blocks)


def rotated(case: AttentionCase, x: np.ndarray) -> np.ndarray:
    """Channel i with channel i + 10 as one complex number."""
    turn = (case.cosines + 1j * case.sines.astype(np.complex128))[:, None]
    pairs = (x[..., :10] + 1j * x[..., 10:20]) * turn
    return np.concatenate([pairs.real, pairs.imag, x[..., 20:]], axis=2)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("tokens", [1, 7, 8, 17, 70])
def test_keys_and_values_go_to_their_slots_only(tokens, kv_type):
    """As NumPy rounds them; all other places keep their bits."""
    case = AttentionCase([(tokens, 0)], [0, 1, 2], kv_type, head_dim=64, full=True)
    found = case.everywhere()
    block, place = case.slots // 64, case.slots % 64
    case.keys[block, :, :, place], case.values[block, :, place] = found.k, found.v
    assert same_bits(tuple(found.cache), tuple(map(readable, case.cache())))


def let_columns_out(case: "AttentionCase | MlpCase", columns: int = HIDDEN) -> None:
    """Let token t's norm be 1 in one channel and 0 elsewhere: its q, k, v, gate and up are column t mod `columns`."""
    case.x = np.eye(HIDDEN, dtype=np.float32)[np.arange(len(case.x)) % columns]
    case.norm = np.full(HIDDEN, 1 / np.float32(1 / np.sqrt(1 / HIDDEN + EPS)))


def first_columns(*columns: np.ndarray) -> Matrix:
    """float32, zero but for these columns."""
    dense = np.zeros((len(columns[0]), HIDDEN), np.float32)
    dense[:, : len(columns)] = np.stack(columns, axis=1)
    return matrix(WEIGHT_TYPES["f32"], *WEIGHT_TYPES["f32"].pack(dense))


def into_cache(x: np.ndarray, tokens: int = 1) -> np.ndarray:
    """What a float16 cache makes of float32 numbers, finite ones if there are several tokens."""
    width = -(-len(x) // (32 * tokens)) * 32
    columns = np.concatenate([x, np.zeros(width * tokens - len(x), np.float32)]).reshape(tokens, width)
    case = AttentionCase([(tokens, 0)], [0] * (width // 32 + 1), "f16")
    let_columns_out(case)
    case.qkv = [case.qkv[0], first_columns(*columns), first_columns(*columns)]
    keys, _, values, _ = case.everywhere().cache
    block, place = case.slots // 64, case.slots % 64
    stored = values[block, :, place]
    assert same_bits(keys[block, :, :, place], stored)
    return stored.reshape(-1)[: len(x)]


def test_floats_are_rounded_to_the_nearest_half_in_the_cache():
    """At, just below and just above the middle of any two halves; the last middle, 65520, becomes infinity."""
    positive = np.append(np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64), 65536.0)
    middles = ((positive[1:] + positive[:-1]) / 2).astype(np.float32)
    x = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))])
    x = np.concatenate([x, -x, positive, np.float32([65519.996, 1e30, 1e-45, 2**-25, 2**-24 * 1.5])]).astype(np.float32)
    with np.errstate(over="ignore"):
        assert same_bits(into_cache(x, 64), (x + np.float32(0)).astype(np.float16))


def test_what_is_not_finite_stays_so_in_the_cache():
    x = np.float32([np.nan, np.inf, -np.inf, -np.nan, 1.0, -1.0])
    assert same_bits(into_cache(x), x.astype(np.float16))


def test_random_floats_become_halves_as_in_numpy():
    x = np.random.default_rng(1).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    x = x[np.isfinite(x)]
    with np.errstate(over="ignore"):
        assert same_bits(into_cache(x, 64), (x + np.float32(0)).astype(np.float16))


def test_softmax_takes_e_to_the_x_accurately():
    """Position 0 of each sequence has the score 0, the 63 others one of many below; each has a channel of its own."""
    halves_of_steps = (np.arange(-125, 0) + 0.5) * np.log(2)
    steps = [np.nextafter(halves_of_steps.astype(np.float32), np.float32(s)) for s in (-np.inf, np.inf)]
    tiny = -(np.float32(10.0) ** np.arange(-45, 0, dtype=np.float32))
    x = np.concatenate([np.linspace(-87, 0, 30_000), halves_of_steps, *steps, tiny, [-87.001, -200, -1e30]])
    x = x.astype(np.float32)
    sequences = -(-len(x) // 63)
    padded = np.concatenate([x, np.zeros(sequences * 63 - len(x), np.float32)]).reshape(sequences, 63)
    case = AttentionCase([(1, 63)] * sequences, [0, 1], head_dim=64)
    let_columns_out(case, 1)
    case.scale, case.qkv[0] = 1.0, first_columns(np.eye(1, 64)[0])
    case.keys[:] = 0
    for table, scores in zip(case.tables, padded, strict=True):
        case.keys[table[0], 0, 0, 1:] = scores
        case.values[table[0], 0] = np.eye(64)
    found = case.everywhere().context.astype(np.float64)
    powers = (found[:, 1:] / found[:, :1]).reshape(-1)[: len(x)]
    assert not powers[x < -87].any()
    exact = np.exp(x.astype(np.float64))
    usual = (x >= -86) & (exact > 0)
    assert np.abs(powers[usual] / exact[usual] - 1).max() < 2e-7 + 2 * 2.0**-24


# -- SwiGLU ------------------------------------------------------------------------------------------------------------


class MlpCase:
    """SwiGLU of `inner` channels, or `experts` of it."""

    def __init__(
        self, tokens: int, inner: int, weights: str = "f32", down: str | None = None, panel: int = 32,
        experts: int = 0, chosen: int = 0, renormalise: bool = False, biased: bool = False,
    ):  # fmt: skip
        rng = np.random.default_rng(tokens)
        self.kind, self.down_kind = WEIGHT_TYPES[weights], WEIGHT_TYPES[down or weights]
        self.experts, self.chosen, self.renormalise = experts, chosen, renormalise
        self.x = rng.standard_normal((tokens, HIDDEN)).astype(np.float32)
        self.norm = rng.uniform(0.6, 1.4, HIDDEN).astype(np.float32)
        self.made = [self._expert(e, inner, panel) for e in range(max(experts, 1))]
        matrices = [[expert[i][0] for expert in self.made] for i in range(3)]
        self.gate, self.up, self.down = (stacked(m) if experts else m[0] for m in matrices)
        self.router = None
        if experts:
            dense = np.zeros((-(-experts // LANES) * LANES, HIDDEN), np.float32)
            dense[:experts] = random_matrix(experts, HIDDEN, seed=77) / 4
            self.router, self.router_dense = packed(dense, "f32")
        self.biases = [rng.standard_normal(inner).astype(np.float32) if biased else None for _ in range(2)]
        self.inner = inner

    def _expert(self, e: int, inner: int, panel: int):
        scale = np.float32(1 / 8)
        gate = packed(random_matrix(inner or 32, HIDDEN, seed=3 * e) * scale, self.kind)
        up = packed(random_matrix(inner or 32, HIDDEN, seed=3 * e + 1) * scale, self.kind)
        down = packed(random_matrix(HIDDEN, inner or 32, seed=3 * e + 2) * scale, self.down_kind, panel)
        return [(m if inner else part(m, slice(0)), dense) for m, dense in (gate, up, down)]

    def prepare(self, in_flight: int = 1) -> tuple[arguments.MlpLayer, StepArrays]:
        a = blank_step(self.x, 0, 0, 32, self.inner)
        layer = arguments.MlpLayer(
            gate=self.gate.column_parallel(), up=self.up.column_parallel(), down=self.down.row_parallel(), eps=EPS,
            hidden_size=HIDDEN,
        )  # fmt: skip
        if self.router:
            layer.router = arguments.Router(
                matrix=self.router.column_parallel(), chosen=self.chosen, renormalise=self.renormalise, scaling=1.0
            )
        for name, vector in zip(("norm", "gate_bias", "up_bias"), [self.norm, *self.biases], strict=True):
            setattr(layer, name, arguments.address(vector))
        a.argument.in_flight = in_flight
        return layer, a

    def run(self, team, in_flight: int = 1) -> StepArrays:
        layer, a = self.prepare(in_flight)
        team.mlp_half(layer, a.argument)
        return a

    def everywhere(self, in_flight: int = 1) -> SimpleNamespace:
        """hidden, gate (silu(gate) * up, without experts), its blocks, partial."""

        def run(team):
            a = self.run(team, in_flight)
            return (a.hidden.x, a.gate.x, *blocks_of(a.gate), a.partial)

        hidden, gate, *blocks, partial = everywhere(run)
        return SimpleNamespace(hidden=hidden, gate=gate, gate_blocks=tuple(blocks), partial=partial)

    def swiglu(self, h: np.ndarray, expert: int = 0, share: float | np.ndarray = 1.0) -> np.ndarray:
        """float64, of what the matrices see."""
        gate, up = (h @ self.made[expert][i][1].T + (0 if b is None else b) for i, b in enumerate(self.biases))
        return gate / (1 + np.exp(-gate)) * up * share


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("weights", "down"), [("f32", "f32"), ("q8_0", "q8_0"), ("q4_0", "f16"), ("bf16", "q8_0")])
def test_the_second_half_of_a_layer(weights, down, tokens):
    """For numbers of 32-row blocks below, at and above the number of threads."""
    for inner, biased in ((32, False), (64, True), (160, False)):
        case = MlpCase(tokens, inner, weights, down, biased=biased)
        found = case.everywhere()
        if tokens == 1:
            assert same_bits(case.everywhere(2).partial, found.partial)
        np.testing.assert_allclose(found.hidden, normalised(case.x, case.norm), rtol=3e-7)
        expected = case.swiglu(seen_by(case.kind, found.hidden))
        np.testing.assert_allclose(found.gate, expected, rtol=1e-5, atol=1e-5)
        exact = seen_by(case.down_kind, found.gate) @ case.made[0][2][1].T
        np.testing.assert_allclose(found.partial, exact, atol=1e-5)
        if case.down_kind.quantised:
            assert same_bits(found.gate_blocks, blocks_of(activations(libraries()[0], found.gate)))


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("experts", [0, 5])
def test_an_idle_rank_adds_nothing(experts, tokens):
    found = MlpCase(tokens, 0, experts=experts, chosen=2 * bool(experts)).everywhere()
    assert np.array_equal(found.partial, np.zeros((tokens, HIDDEN)))


def silu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The kernel's silu(gate) * up of any numbers."""
    padding = np.zeros(-len(gate) % 32, np.float32)
    case = MlpCase(1, 32)
    let_columns_out(case)
    case.gate, case.up = (first_columns(np.concatenate([x, padding])) for x in (gate, up))
    case.inner = len(gate) + len(padding)
    case.down, _ = packed(np.zeros((HIDDEN, case.inner), np.float32), "f32", 32)
    return case.everywhere().gate[0, : len(gate)]


def test_silu_over_its_range():
    x = np.concatenate([np.linspace(-86, 88, 60_000), np.float32(10.0) ** np.arange(-40, 0), [0.0, 1e4, 1e30, 3e38]])
    x = np.concatenate([x, -(np.float32(10.0) ** np.arange(-40, 0))]).astype(np.float32)
    exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(silu(x, np.full(len(x), 0.5, np.float32)), 0.5 * exact, rtol=1e-6, atol=1e-38)


def test_silu_far_below_zero_is_zero():
    x = np.float32([-90, -100, -1e4])
    np.testing.assert_allclose(silu(x, np.ones(3, np.float32)), 0, atol=1e-33)


@pytest.mark.parametrize("place", ["gate", "up"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_silu_keeps_bad_numbers(place, bad):
    arrays = {"gate": np.ones(32, np.float32), "up": np.ones(32, np.float32)}
    arrays[place][5] = bad
    assert list(np.flatnonzero(~np.isfinite(silu(**arrays)))) == [5]


# -- experts -----------------------------------------------------------------------------------------------------------


def expected_mixture(case: MlpCase, hidden: np.ndarray) -> np.ndarray:
    """float64, token by token."""
    logits = hidden.astype(np.float64) @ case.router_dense[: case.experts].T
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    out, seen = np.zeros((len(hidden), HIDDEN)), seen_by(case.kind, hidden)
    for t in range(len(hidden)):
        chosen = np.argsort(-shares[t])[: case.chosen]
        taken = shares[t, chosen] / (shares[t, chosen].sum() if case.renormalise else 1)
        for e, share in zip(chosen, taken, strict=True):
            inner = case.swiglu(seen[t], e, share)
            out[t] += seen_by(case.down_kind, inner[None])[0] @ case.made[e][2][1].T
    return out


MIXTURES = [(5, 2, True), (8, 1, False), (8, 3, False), (40, 4, True)]


@pytest.mark.parametrize("tokens", [1, 2, 7, 17, 40])
@pytest.mark.parametrize(("experts", "chosen", "renormalise"), MIXTURES)
@pytest.mark.parametrize("weights", ["f32", "bf16", "q8_0", "q4_0"])
def test_experts(weights, experts, chosen, renormalise, tokens):
    case = MlpCase(tokens, 96, weights, experts=experts, chosen=chosen, renormalise=renormalise)
    found = case.everywhere()
    if tokens == 1:
        assert same_bits(case.everywhere(2).partial, found.partial)
    expected = expected_mixture(case, found.hidden)
    # An activation near the middle of two steps may be rounded the other way.
    tolerance = 1e-2 * np.abs(expected).max() if case.kind.quantised else 1e-5
    np.testing.assert_allclose(found.partial, expected, atol=tolerance)
    assert np.array_equal(np.rint(found.partial / GRID) * GRID, found.partial)


@pytest.mark.parametrize("experts", [0, 8])
@pytest.mark.parametrize("weights", ["f32", "q4_0"])
def test_a_token_does_not_depend_on_its_company(weights, experts):
    case = MlpCase(33, 96, weights, experts=experts, chosen=3 * bool(experts))
    together, x = case.everywhere().partial, case.x
    for t in range(len(x)):
        case.x = x[t : t + 1]
        assert same_bits(case.everywhere().partial[0], together[t])
    case.x = x[5:14]
    assert same_bits(case.everywhere().partial, together[5:14])


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("weights", ["f32", "q4_0"])
def test_experts_may_be_split_over_ranks(weights, tokens):
    """Each rank has some panels of every expert; the sum of what they compute is what one computes."""
    case = MlpCase(tokens, 160, weights, experts=6, chosen=2)
    whole, total = case.everywhere().partial, 0.0
    full = case.gate, case.up, case.down
    for first, last in ((0, 2), (2, 2), (2, 5)):
        case.gate, case.up = (of_each(m, slice(2 * first, 2 * last)) for m in full[:2])
        case.down, case.inner = of_each(full[2], slice(first, last)), 32 * (last - first)
        total = total + case.everywhere().partial
    assert np.array_equal(total, whole)


def of_each(experts: Matrix, index: slice) -> Matrix:
    return Matrix.of(experts.weight_type, [np.ascontiguousarray(a[:, index]) for a in experts.arrays])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("experts", [0, 8])
@pytest.mark.parametrize("weights", ["f32", "q8_0"])
def test_a_bad_number_shows_in_its_token_only(weights, experts, bad):
    case = MlpCase(9, 96, weights, experts=experts, chosen=2 * bool(experts))
    case.x[4, 7] = bad
    finite = np.isfinite(case.everywhere().partial)
    assert not finite[4].any()
    assert np.delete(finite, 4, axis=0).all()


def test_a_product_alone_is_that_within_a_layer():
    case = MlpCase(9, 160, "q4_0")
    found = case.everywhere()
    assert same_bits(row_parallel(teams()[0], case.down, found.gate), found.partial)


@pytest.mark.parametrize("experts", [0, 8])
@pytest.mark.parametrize("weights", ["f32", "q4_0"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_coarse_grid_suits_the_residual_stream(tokens, weights, experts):
    """Each token has its own, by the exponents of its row: panels' results are multiples of it, near the exact ones."""
    case = MlpCase(tokens, 160, weights, experts=experts, chosen=2 * bool(experts))
    case.x *= 2.0 ** np.arange(8, 8 + tokens)[:, None]
    case.x[0, 3] = 0.0

    def run(team):
        layer, a = case.prepare()
        a.argument.shifts = arguments.address(a.shifts)
        team.mlp_half(layer, a.argument)
        return a.partial, a.shifts

    coarse, shifts = everywhere(run)
    exact = case.everywhere().partial
    exponents = np.maximum(np.where(case.x == 0, -40, np.frexp(case.x)[1] - 1), -40)
    steps = 2.0 ** np.clip(np.floor(exponents.sum(axis=1) / HIDDEN) - 8, -30, 0)
    assert np.array_equal(shifts, 1.5 * 2.0**52 * steps)
    multiples = coarse / steps[:, None]
    assert np.array_equal(multiples, np.round(multiples))
    panels = 8 * (1 + bool(experts))
    assert (np.abs(coarse - exact).max(axis=1) <= panels * steps / 2).all()
    assert not np.array_equal(coarse, exact)


# -- the sum over ranks ------------------------------------------------------------------------------------------------


class SummingRank:
    """A rank that adds what its experts or its MLP compute to the residual stream, through a window or alone."""

    def __init__(self, case: MlpCase, team, window: SharedWindow | None, bias: np.ndarray | None):
        self.team, self.window, self.bias = team, window, bias
        self.layer, self.a = case.prepare()
        self.progress = np.zeros((team.threads, PROGRESS_STRIDE), np.int64)

    def begin(self, sequence: int) -> bool:
        self.total = arguments.Sum(
            factor=1.0, progress=arguments.address(self.progress), bias=arguments.address(self.bias), sequence=sequence,
            spins=20, yields=20,
        )  # fmt: skip
        if self.window:
            self.total.window = addressof(self.window.argument)
        return self.team.mlp_half(self.layer, self.a.argument, self.total)

    def finish(self) -> bool:
        return self.team.finish_sum(self.a.argument, self.total)

    def run(self, sequence: int) -> None:
        done = self.begin(sequence)
        while not done:
            done = self.finish()


def case_of(tokens: int, rank: int, experts: int) -> MlpCase:
    case = MlpCase(tokens, 96, "q8_0", experts=experts, chosen=min(experts, 2))
    for expert in case.made:
        expert[2][0].values.reshape(-1)[:] = np.roll(expert[2][0].values.reshape(-1), rank)
    if experts:
        case.down = stacked([expert[2][0] for expert in case.made])
    return case


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 2, 9, 23])
def test_ranks_add_up_inside_the_region(tokens, ranks, experts):
    """Teams of one, two and three threads; a slot holds four tokens, so that most steps take several exchanges."""
    bias = np.random.default_rng(5).standard_normal(HIDDEN).astype(np.float32)
    cases = [case_of(tokens, rank, experts) for rank in range(ranks)]
    partials = [case.run(teams()[0]).partial.copy() for case in cases]
    assert ranks == 1 or not np.array_equal(partials[0], partials[1])
    expected = (cases[0].x + sum(partials[1:], start=partials[0]).astype(np.float32)) + bias
    for library in libraries():
        found = [library.team(1 + rank, yields=True) for rank in range(ranks)]
        windows = windows_of(found, 4 * HIDDEN) if ranks > 1 else [None]
        members = [SummingRank(*both, bias) for both in zip(cases, found, windows, strict=True)]
        threads = [Thread(target=member.run, args=(1,)) for member in members]
        for thread in threads:
            thread.start()
            time.sleep(0.002)  # so that the others give up for a while
        for thread in threads:
            thread.join()
        for member in members:
            assert same_bits(member.a.x, expected)
            member.team.close()


def test_a_rank_that_is_late_is_waited_for_without_adding_twice():
    cases = [case_of(9, rank, 0) for rank in range(2)]
    found = [libraries()[0].team(2, yields=True) for _ in range(2)]
    first, second = (SummingRank(*both, None) for both in zip(cases, found, windows_of(found, 4 * HIDDEN), strict=True))
    before = first.a.x.copy()
    assert not first.begin(1)
    assert not first.finish()
    assert np.array_equal(first.a.x, before)
    assert not second.begin(1)  # its first exchange is through, for the second it waits
    assert not np.array_equal(second.a.x[:4], before[:4])
    assert np.array_equal(second.a.x[4:], before[4:])
    while not (first.finish() & second.finish()):
        pass
    total = sum(case.run(found[0]).partial for case in cases)
    assert same_bits(first.a.x, before + total.astype(np.float32))
    assert same_bits(second.a.x, first.a.x)
    for team in found:
        team.close()
