"""Which positions an indexer chooses, against float64 NumPy, and latent attention to these alone.

As in test_latent_attention.py, every instruction set on 1, 2 and 3 threads must give the same bits.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from mpillama.kernels import arguments
from mpillama.models.attention import KV_TYPES
from mpillama.models.latent_attention import LATENT_EPS
from mpillama.models.sparse_latent_attention import INDEX_EPS, Indexer, SparseLatentAttention
from mpillama.quant.registry import WEIGHT_TYPES
from mpillama.quant.weight_type import round_up
from tests.kernels.kernel_parts import packed, random_matrix, same_bits, seen_by
from tests.kernels.test_half_layers import SCALED_KV
from tests.kernels.test_latent_attention import CASES, EPS, HIDDEN, KIND, LatentCase, padded, rms


def sparse(chosen: int, heads: int = 19, channels: int = 40, rotary_pairs: bool = False) -> SparseLatentAttention:
    return SparseLatentAttention(**vars(KIND), indexer=Indexer(heads, channels, rotary_pairs), chosen=chosen)


class SparseCase(LatentCase):
    """With an indexer, whose keys of the past are random."""

    kind: SparseLatentAttention

    def make_matrices(self) -> None:
        super().make_matrices()
        indexer, up = self.kind.indexer, round_up
        n, channels, width = indexer.heads, indexer.channels, indexer.width
        wq = padded(random_matrix(n * channels, self.kind.q_rank, 20).reshape(n, channels, -1), width, 64)
        wq = wq.reshape(n * width, -1)[:, : up(self.kind.q_rank, 32)]
        wk = padded(random_matrix(channels, HIDDEN, 21), width, HIDDEN)
        of_heads = padded(random_matrix(n, HIDDEN, 22), up(n, 16), HIDDEN)
        (self.wq, wq), (self.wk, self.dense_k) = (packed(np.ascontiguousarray(w), self.weights) for w in (wq, wk))
        self.dense_q = wq.reshape(n, width, -1)[:, :channels, : self.kind.q_rank]
        self.of_heads, self.dense_weights = packed(of_heads, "f32")
        rng = np.random.default_rng(23)
        self.k_norm, self.k_bias = (padded(rng.normal(m, 0.3, channels).astype(np.float32), width) for m in (1, 0))
        self.past_keys = rng.standard_normal((*self.past.shape[:2], width)).astype(np.float32)
        self.past_keys[:, :, channels:] = 0

    def cache(self) -> list[np.ndarray]:
        keys = self.past_keys if self.kv_type == "f32" else self.past_keys.astype(np.float16).view(np.int16)
        return [*super().cache(), keys.copy()]

    def layer(self, cache: list[np.ndarray]) -> arguments.LatentLayer:
        layer = super().layer(cache[:2])
        indexer = self.kind.indexer
        _, keys = self.kind.cache_argument(cache, KV_TYPES[self.kv_type])
        layer.indexer = arguments.Indexer(
            q=self.wq.column_parallel(), k=self.wk.column_parallel(), weights=self.of_heads.column_parallel(),
            cache=keys, k_norm=arguments.address(self.k_norm), k_bias=arguments.address(self.k_bias), eps=INDEX_EPS,
            heads=indexer.heads, channels=indexer.channels, chosen=self.kind.chosen, pairs=indexer.rotary_pairs,
        )  # fmt: skip
        return layer

    def turned(self, x: np.ndarray) -> np.ndarray:
        """[tokens, …, channels] with the first of them turned to halves."""
        rope = self.kind.rope
        return np.concatenate([self.rotated(x[..., :rope], self.kind.indexer.rotary_pairs), x[..., rope:]], axis=-1)

    def keys(self, found: SimpleNamespace) -> np.ndarray:
        """What the cache holds, float64 [blocks, 64, channels]."""
        keys = found.cache[2]
        keys = keys if self.kv_type == "f32" else keys.view(np.float16)
        return keys[:, :, : self.kind.indexer.channels].astype(np.float64)

    def new_keys(self) -> np.ndarray:
        """Those of the step's tokens: float64 [tokens, channels]."""
        channels = self.kind.indexer.channels
        k = self.seen(rms(self.x, self.norm, EPS)) @ self.dense_k[:channels].T
        k = k - k.mean(axis=1, keepdims=True)
        k = k / np.sqrt((k**2).mean(axis=1, keepdims=True) + INDEX_EPS)
        return self.turned(k * self.k_norm[:channels] + self.k_bias[:channels])

    def scores(self, found: SimpleNamespace) -> list[np.ndarray]:
        """Of each token over all its positions, by the keys in the cache."""
        indexer, held = self.kind.indexer, self.keys(found)
        queries = self.seen(rms(found.q_a, self.q_norm[: self.kind.q_rank], LATENT_EPS))
        queries = self.turned(np.einsum("tc,hrc->thr", queries, self.dense_q))
        h = padded(rms(self.x, self.norm, EPS), HIDDEN).astype(np.float32)
        weights = seen_by(WEIGHT_TYPES["f32"], h) @ self.dense_weights[: indexer.heads].T
        weights = weights / np.sqrt(indexer.heads * indexer.channels)
        found_scores = []
        for (first, count, start), table in zip(self.segments, self.tables, strict=True):
            past = held[table].reshape(-1, indexer.channels)
            for t in range(first, first + count):
                dots = np.maximum(queries[t] @ past[: start + t - first + 1].T, 0)
                found_scores.append(weights[t] @ dots)
        return found_scores

    def sees(self, found: SimpleNamespace, token: int, position: int) -> np.ndarray:
        return found.chosen[token] if position >= self.kind.chosen else np.arange(position + 1)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("name", ["33 tokens", "across a span", "one in the third span", "several sequences"])
def test_the_positions_with_the_highest_scores_are_seen(name, kv_type):
    case = SparseCase(*CASES[name], kv_type, sparse(17))
    found = case.everywhere()
    np.testing.assert_allclose(case.keys(found).reshape(-1, 40)[case.slots], case.new_keys(), atol=3e-3)
    choosing = 0
    for scores, chosen, position in zip(case.scores(found), found.chosen, case.positions, strict=True):
        if position < 17:
            assert set(chosen) == {-1}  # it does not choose
            continue
        choosing += 1
        assert (np.diff(chosen) > 0).all()
        others = np.delete(scores, chosen)
        assert scores[chosen].min() > others.max() - 1e-4
    assert choosing > 0
    np.testing.assert_allclose(found.latent, case.attended(found), atol=2e-5)


@pytest.mark.parametrize("kind", [sparse(1, 1, 12), sparse(70, 32, 64, True), sparse(520, 5, 33, True)])
@pytest.mark.parametrize("weights", ["f32", "q8_0"])
def test_indexers_of_other_sizes(kind, weights):
    case = SparseCase([(3, 62), (2, 1190)], "f32", kind, weights)
    found = case.everywhere()
    for scores, chosen, position in zip(case.scores(found), found.chosen, case.positions, strict=True):
        if position >= kind.chosen:
            assert scores[chosen].min() > np.delete(scores, chosen).max() - 1e-4
    np.testing.assert_allclose(found.latent, case.attended(found), atol=2e-5)


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_a_token_that_may_see_all_positions_has_the_bits_of_plain_latent_attention(kv_type):
    segments = [(30, 0), (4, 510), (1, 1000)]
    found, plain = SparseCase(segments, kv_type, sparse(1001)).everywhere(), LatentCase(segments, kv_type).everywhere()
    assert same_bits((found.latent, found.partial, *found.cache[:2]), (plain.latent, plain.partial, *plain.cache))
    assert set(found.chosen.flat) == {-1}
    more = SparseCase(segments, kv_type, sparse(1000)).everywhere()
    assert same_bits(more.partial[:34], plain.partial[:34])
    assert not same_bits(more.partial[34:], plain.partial[34:])


def test_of_equal_scores_the_lower_positions_are_chosen():
    """Without weights all are 0; with keys of zeros those of the past are, of one sign or the other."""
    case = SparseCase([(40, 100)], kind=sparse(33))
    case.past_keys[:] = 0
    some = [chosen[chosen < 100] for chosen in case.everywhere().chosen]
    assert all(np.array_equal(chosen, np.arange(len(chosen))) for chosen in some)
    assert len({len(chosen) for chosen in some}) > 2
    case.of_heads.values[:] = 0
    assert np.array_equal(case.everywhere().chosen, np.tile(np.arange(33), (40, 1)))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_score_that_is_no_number_is_the_least(sign):
    """Of whichever sign: processors differ in that."""
    case = SparseCase([(2, 900)], "f32", sparse(40))
    place = case.everywhere().chosen[0][3]
    case.past_keys.reshape(-1, case.past_keys.shape[2])[64 * case.tables[0, place // 64] + place % 64] = np.copysign(
        np.nan, sign
    )
    assert place not in case.everywhere().chosen


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_what_is_not_chosen_is_not_read(kv_type):
    """Latents that are no numbers lie there."""
    case = SparseCase([(2, 900)], kv_type, sparse(40))
    clean, cache = case.everywhere(), case.cache()
    unseen = np.setdiff1d(np.arange(900), clean.chosen)
    slots = 64 * case.tables[0, unseen // 64] + unseen % 64
    if kv_type in SCALED_KV:
        cache[1].reshape(-1, cache[1].shape[2])[slots] = 0x7E00
    else:
        cache[0].reshape(-1, cache[0].shape[2])[slots] = np.nan if kv_type == "f32" else np.int16(0x7E00)
    found = case.everywhere(cache)
    assert same_bits((found.chosen, found.latent, found.partial), (clean.chosen, clean.latent, clean.partial))


def test_the_choice_of_a_token_does_not_depend_on_its_company():
    case = SparseCase([(37, 50), (1, 700), (20, 0)], "f16", sparse(21))
    together = case.everywhere()
    first, count, start = case.segments[0]
    cache = case.cache()
    for t in range(count):
        alone = SparseCase([(1, start + t)], "f16", sparse(21))
        for name in ("x", "slots", "cosines", "sines"):
            setattr(alone, name, getattr(case, name)[first + t : first + t + 1].copy())
        alone.norm, alone.q_norm, alone.kv_norm, alone.tables = case.norm, case.q_norm, case.kv_norm, case.tables[:1]
        found = alone.everywhere(cache)
        cache = found.cache
        assert np.array_equal(found.chosen[0], together.chosen[first + t])
        assert same_bits(found.partial[0], together.partial[first + t])
