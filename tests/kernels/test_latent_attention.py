"""The half layer of multi-head latent attention against float64 NumPy, and against itself in other company.

As in test_kernels.py, everything is computed with every instruction set that this processor has and on 1, 2 and 3
threads, and the bits must be the same.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from mpillama.kernels import arguments
from mpillama.models.attention import KV_TYPES
from mpillama.models.latent_attention import LATENT_EPS, LatentAttention
from mpillama.models.workspace import Angles, StepArrays
from mpillama.quant.registry import WEIGHT_TYPES
from mpillama.quant.weight_type import round_up
from tests.kernels.kernel_parts import (
    GRID,
    blank_activations,
    blocks_of,
    cached_blocks,
    everywhere,
    from_cached_blocks,
    packed,
    part,
    random_matrix,
    same_bits,
    seen_by,
)
from tests.kernels.test_half_layers import SCALED_KV

HIDDEN, EPS = 64, 1e-5
KIND = LatentAttention(heads=3, q_rank=40, kv_rank=72, nope=24, rope=12, value=20)
PAST = 2.0
"""Standard deviation of what lies in the cache before the step."""


def rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def padded(x: np.ndarray, *sizes: int) -> np.ndarray:
    """With zeros up to these sizes of the last axes."""
    axes = x.ndim - len(sizes)
    return np.pad(x, [(0, 0)] * axes + [(0, size - x.shape[axes + i]) for i, size in enumerate(sizes)])


class LatentCase:
    """Sequences over a cache whose blocks are dealt at random; a segment is (tokens, first position)."""

    def __init__(
        self, segments: list[tuple[int, int]], kv_type: str = "f32", kind: LatentAttention = KIND, weights: str = "f32",
    ):  # fmt: skip
        rng = np.random.default_rng(len(segments))
        self.kind, self.kv_type, self.weights = kind, kv_type, weights
        counts = np.array([n for n, _ in segments])
        firsts = np.cumsum([0, *counts[:-1]])
        self.segments = np.array([[f, n, start] for f, (n, start) in zip(firsts, segments, strict=True)], np.int64)
        blocks = [(n + start + 63) // 64 for n, start in segments]
        dealt = np.split(rng.permutation(sum(blocks)), np.cumsum(blocks)[:-1])
        self.tables = np.stack([np.pad(p, (0, max(blocks) - len(p))) for p in dealt]).astype(np.int64)
        self.tokens = int(counts.sum())
        places = [(s, start + t) for s, (n, start) in enumerate(segments) for t in range(n)]
        self.positions = np.array([p for _, p in places])
        self.slots = np.array([64 * self.tables[s, p // 64] + p % 64 for s, p in places], np.int64)
        self.x = rng.standard_normal((self.tokens, HIDDEN)).astype(np.float32)
        vector = lambda n, size: padded(rng.uniform(0.6, 1.4, n).astype(np.float32), size)  # noqa: E731
        self.norm = vector(HIDDEN, HIDDEN)
        self.q_norm = vector(kind.q_rank, round_up(kind.q_rank, 32))
        self.kv_norm = vector(kind.kv_rank, round_up(kind.kv_rank, 32))
        angles = rng.uniform(0, 6, (4096, kind.rope // 2))[self.positions]
        self.cosines, self.sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self.past = PAST * rng.standard_normal((sum(blocks), 64, kind.cache_width)).astype(np.float32)
        self.past[:, :, kind.kv_rank : round_up(kind.kv_rank, 32)] = 0
        self.past[:, :, round_up(kind.kv_rank, 32) + kind.rope :] = 0
        self.make_matrices()

    def make_matrices(self) -> None:
        """Each as kernels take it, and its float64 values without padding: [heads, rows, columns] of heads."""
        k, up = self.kind, round_up
        sizes = {
            "q": (k.heads, k.nope + k.rope, k.q_rank or HIDDEN), "kv_a": (1, k.kv_rank + k.rope, HIDDEN),
            "k_b": (k.heads, k.kv_rank, k.nope), "v_b": (k.heads, k.value, k.kv_rank),
        }  # fmt: skip
        if k.q_rank:
            sizes["q_a"] = (1, k.q_rank, HIDDEN)
        self.matrices, self.dense = {}, {}
        for seed, (name, (heads, rows, columns)) in enumerate(sizes.items()):
            made = random_matrix(max(heads, 1) * rows, columns, seed).reshape(-1, rows, columns) / np.sqrt(columns)
            whole = padded(made, up(rows, 32), up(columns, 32)).reshape(-1, up(columns, 32))
            self.matrices[name], dense = packed(whole, self.weights)
            self.dense[name] = dense.reshape(-1, up(rows, 32), up(columns, 32))[:heads, :rows, :columns]
            if not heads:
                self.matrices[name] = part(self.matrices[name], slice(0))
        value = up(k.value, 32)
        whole = padded(random_matrix(HIDDEN, max(k.heads, 1) * k.value, 9).reshape(HIDDEN, -1, k.value), value)
        o, dense = packed(whole.reshape(HIDDEN, -1), self.weights, value)
        self.matrices["o"] = o if k.heads else part(o, slice(0))
        self.dense["o"] = dense[:, : k.heads * value]

    def cache(self) -> list[np.ndarray]:
        """Values and scales."""
        if self.kv_type in SCALED_KV:
            values, scales = cached_blocks(self.past, self.kv_type)
            return [values.reshape(*self.past.shape[:-1], -1), scales.astype(np.float16).view(np.uint16)]
        values = self.past if self.kv_type == "f32" else self.past.astype(np.float16).view(np.int16)
        return [values, np.zeros(0, np.uint16)]

    def held(self, cache: list[np.ndarray]) -> np.ndarray:
        """What a cache holds: float64 [blocks, 64, width]."""
        values, scales, *_ = cache
        if self.kv_type in SCALED_KV:
            return from_cached_blocks(values.reshape(*scales.shape, -1), scales.view(np.float16), self.kv_type)
        return (values if self.kv_type == "f32" else values.view(np.float16)).astype(np.float64)

    def run(self, team, cache: list[np.ndarray] | None = None) -> SimpleNamespace:
        """All that the half layer leaves."""
        kind = self.kind
        nan = lambda width, dtype=np.float32: np.full((self.tokens, width), np.nan, dtype)  # noqa: E731
        sizes = kind.step_widths({kind.split: range(kind.heads)})
        a = StepArrays(
            x=self.x.copy(), hidden=blank_activations(self.tokens, HIDDEN), q=nan(sizes["q"]), k=nan(sizes["k"]),
            v=nan(sizes["v"]), context=blank_activations(self.tokens, sizes["context"]),
            gate=blank_activations(self.tokens, 0), latent=blank_activations(self.tokens, sizes["latent"]), up=nan(0),
            gates=nan(sizes.get("gates", 0)), partial=nan(HIDDEN, np.float64), addend=nan(0),
            squares=nan(4, np.float64), shifts=np.full(self.tokens, np.nan),
            chosen=np.full((self.tokens, sizes.get("chosen", 0)), -1, np.int32),
            angles=(Angles(self.cosines, self.sines),),
        )  # fmt: skip
        cache = [array.copy() for array in cache or self.cache()]
        layer = self.layer(cache)
        step = a.argument
        for name in ("slots", "segments", "tables"):
            setattr(step, name, arguments.address(getattr(self, name)))
        step.segment_count, step.table_width = self.tables.shape
        step.in_flight = 1
        team.latent_half(layer, step)
        return SimpleNamespace(a=a, cache=cache)

    def layer(self, cache: list[np.ndarray]) -> arguments.LatentLayer:
        """For kernels."""
        kind = self.kind
        return arguments.LatentLayer(
            **{n: m.row_parallel() if n == "o" else m.column_parallel() for n, m in self.matrices.items()},
            cache=LatentAttention.cache_argument(kind, cache, KV_TYPES[self.kv_type]),
            **{name: arguments.address(getattr(self, name)) for name in ("norm", "q_norm", "kv_norm")},
            eps=EPS, latent_eps=LATENT_EPS, scale=1 / np.sqrt(kind.nope + kind.rope), hidden_size=HIDDEN,
            heads=kind.heads, q_rank=kind.q_rank, kv_rank=kind.kv_rank, nope=kind.nope, rope=kind.rope,
            pairs=kind.rotary_pairs,
        )  # fmt: skip

    def everywhere(self, cache: list[np.ndarray] | None = None) -> SimpleNamespace:
        """The same, everywhere."""
        k, heads = self.kind, self.kind.heads

        def run(team):
            found = self.run(team, cache)
            a = found.a
            latent = a.latent.x.reshape(-1)[: self.tokens * heads * round_up(k.kv_rank, 32)]
            context = a.context.x.reshape(-1)[: self.tokens * heads * round_up(k.value, 32)]
            blocks = blocks_of(a.context)
            return a.chosen, a.q, a.k, a.v, latent.copy(), context.copy(), a.partial, *found.cache, *blocks

        chosen, q, k_, v, latent, context, partial, *rest = everywhere(run)
        by_head = lambda x, n: x.reshape(self.tokens, heads, round_up(n, 32))[..., :n]  # noqa: E731
        return SimpleNamespace(
            q=by_head(q, k.nope + k.rope), q_a=k_[:, : k.q_rank], kv_a=v[:, : k.kv_rank + k.rope],
            latent=by_head(latent, k.kv_rank), context=by_head(context, k.value), partial=partial,
            cache=rest[: len(self.cache())], chosen=chosen,
        )  # fmt: skip

    def seen(self, x: np.ndarray) -> np.ndarray:
        """What a matrix multiplies; the channels of the last axis are padded to whole blocks before."""
        width = x.shape[-1]
        return seen_by(WEIGHT_TYPES[self.weights], padded(x, round_up(width, 32)).astype(np.float32))[..., :width]

    def rotated(self, x: np.ndarray, pairs: bool | None = None) -> np.ndarray:
        """[tokens, …, rope], turned to halves; `pairs` stand as those of the kind unless it is said."""
        half = self.kind.rope // 2
        pairs = self.kind.rotary_pairs if pairs is None else pairs
        first, second = (x[..., ::2], x[..., 1::2]) if pairs else (x[..., :half], x[..., half:])
        shape = (self.tokens, *[1] * (x.ndim - 2), half)
        turned = (first + 1j * second) * (self.cosines + 1j * self.sines.astype(np.float64)).reshape(shape)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def attended(self, found: SimpleNamespace) -> np.ndarray:
        """float64 attention of the queries that the kernel made over the cache it left: [tokens, heads, kv_rank]."""
        k, held = self.kind, self.held(found.cache)
        latent, out = round_up(k.kv_rank, 32), np.zeros((self.tokens, k.heads, k.kv_rank))
        absorbed = np.einsum("thn,hcn->thc", self.seen(found.q[..., : k.nope]), self.dense["k_b"])
        scale = 1 / np.sqrt(k.nope + k.rope)
        for (first, count, start), table in zip(self.segments, self.tables, strict=True):
            past = held[table].reshape(-1, k.cache_width)
            for t in range(count):
                at = self.sees(found, first + t, start + t)
                latents = past[at, : k.kv_rank]
                scores = absorbed[first + t] @ latents.T
                scores = scores + found.q[first + t, :, k.nope :] @ past[at, latent : latent + k.rope].T
                weights = np.exp(scale * (scores - scores.max(axis=1, keepdims=True)))
                out[first + t] = weights @ latents / weights.sum(axis=1, keepdims=True)
        return out

    def sees(self, found: SimpleNamespace, token: int, position: int) -> np.ndarray:
        """Which positions a token attends to."""
        return np.arange(position + 1)


CASES = {
    **{f"{n} tokens": ([(n, 0)],) for n in (1, 2, 5, 16, 33, 70)},
    "across a block": ([(9, 60)],),
    "one at the end of a block": ([(1, 63)],),
    "one at the start of a block": ([(1, 64)],),
    "across a span": ([(7, 508)],),
    "one in the third span": ([(1, 1100)],),
    "several sequences": ([(1, 5), (17, 0), (1, 600), (3, 62), (1, 0)],),
}


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("name", list(CASES))
def test_latent_attention(name, kv_type):
    case = LatentCase(*CASES[name], kv_type)
    found = case.everywhere()
    np.testing.assert_allclose(found.latent, case.attended(found), atol=2e-5)


@pytest.mark.parametrize(
    "kind",
    [
        LatentAttention(heads=1, q_rank=0, kv_rank=32, nope=32, rope=2, value=32),
        LatentAttention(heads=21, q_rank=33, kv_rank=34, nope=1, rope=34, value=1, rotary_pairs=False),
        LatentAttention(heads=70, q_rank=1, kv_rank=1, nope=40, rope=32, value=65),
    ],
)
def test_latent_attention_of_other_sizes(kind):
    case = LatentCase([(3, 62), (1, 520)], "f16", kind)
    found = case.everywhere()
    np.testing.assert_allclose(found.latent, case.attended(found), atol=2e-5)
    np.testing.assert_allclose(found.context, np.einsum("thc,hvc->thv", found.latent, case.dense["v_b"]), atol=2e-5)


@pytest.mark.parametrize("tokens", [1, 7, 17, 40])
@pytest.mark.parametrize("weights", ["f32", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("q_rank", [40, 0])
def test_the_half_layer_with_latents(weights, tokens, q_rank):
    """Each part from what the one before left."""
    kind = LatentAttention(heads=3, q_rank=q_rank, kv_rank=72, nope=24, rope=12, value=20)
    case = LatentCase([(tokens, 5)], kind=kind, weights=weights)
    found, dense = case.everywhere(), case.dense
    h = case.seen(rms(case.x, case.norm, EPS))
    np.testing.assert_allclose(found.kv_a, h @ dense["kv_a"][0].T, atol=2e-5)
    if q_rank:
        np.testing.assert_allclose(found.q_a, h @ dense["q_a"][0].T, atol=2e-5)
        h = case.seen(rms(found.q_a, case.q_norm[:q_rank], LATENT_EPS))
    q = np.einsum("tc,hrc->thr", h, dense["q"])
    q[..., kind.nope :] = case.rotated(q[..., kind.nope :])
    np.testing.assert_allclose(found.q, q, atol=2e-5)
    latents = rms(found.kv_a[:, : kind.kv_rank], case.kv_norm[: kind.kv_rank], LATENT_EPS)
    stored = found.cache[0].reshape(-1, kind.cache_width)[case.slots]
    np.testing.assert_allclose(stored[:, : kind.kv_rank], latents, atol=2e-6)
    keys = case.rotated(found.kv_a[:, kind.kv_rank :])
    np.testing.assert_allclose(stored[:, round_up(kind.kv_rank, 32) :][:, : kind.rope], keys, atol=2e-6)
    np.testing.assert_allclose(found.latent, case.attended(found), atol=2e-5)
    context = np.einsum("thc,hvc->thv", case.seen(found.latent), dense["v_b"])
    np.testing.assert_allclose(found.context, context, atol=2e-5)
    whole = padded(found.context, round_up(kind.value, 32)).reshape(tokens, -1)
    np.testing.assert_allclose(found.partial, seen_by(WEIGHT_TYPES[weights], whole) @ dense["o"].T, atol=2e-5)
    assert np.array_equal(np.rint(found.partial / GRID) * GRID, found.partial)


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_latents_go_to_their_slots_only(kv_type):
    case = LatentCase([(9, 60), (1, 3)], kv_type)
    found, before = case.everywhere().cache, case.cache()
    others = np.setdiff1d(np.arange(64 * len(case.past)), case.slots)
    for now, then in zip(found, before, strict=True):
        if now.size:
            assert np.array_equal(now.reshape(-1, now.shape[-1])[others], then.reshape(-1, now.shape[-1])[others])


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_latent_attention_of_a_token_does_not_depend_on_its_company(kv_type):
    case = LatentCase(*CASES["several sequences"], kv_type)
    together = case.everywhere()
    for s, ((first, count, start), table) in enumerate(zip(case.segments, case.tables, strict=True)):
        cache = case.cache()
        for t in range(count):
            alone = LatentCase([(1, start + t)], kv_type)
            for name in ("x", "slots", "cosines", "sines"):
                setattr(alone, name, getattr(case, name)[first + t : first + t + 1].copy())
            alone.norm, alone.q_norm, alone.kv_norm, alone.tables = (
                case.norm,
                case.q_norm,
                case.kv_norm,
                table[None].copy(),
            )
            found = alone.everywhere(cache)
            cache = found.cache
            assert same_bits(found.latent[0], together.latent[first + t]), (s, t)
            assert same_bits(found.partial[0], together.partial[first + t])


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_latent_attention_does_not_read_behind_the_last_position(kv_type):
    case = LatentCase([(3, 70)], kv_type)
    clean, cache, last = case.everywhere().latent, case.cache(), case.tables[0, 1]
    if kv_type in SCALED_KV:
        cache[1][last, 73 - 64 :] = 0x7E00
    else:
        cache[0][last, 73 - 64 :] = np.float32(np.nan) if kv_type == "f32" else np.int16(0x7E00)
    assert same_bits(case.everywhere(cache).latent, clean)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_spoils_the_rows_that_see_it(value):
    """Token 2 of 4, whose neighbours in the tile do not see it, or see it behind them."""
    case = LatentCase([(4, 6)])
    clean = case.everywhere().latent
    case.x[2, 3] = value
    found = case.everywhere().latent
    assert same_bits(found[:2], clean[:2])
    assert list(np.isnan(found).any(axis=(1, 2))) == [False, False, True, True]


def test_latent_attention_on_an_idle_rank():
    kind = LatentAttention(heads=0, q_rank=40, kv_rank=72, nope=24, rope=12, value=20)
    for tokens in (1, 20):
        found = LatentCase([(tokens, 2)], kind=kind).everywhere()
        assert np.array_equal(found.partial, np.zeros((tokens, HIDDEN)))
