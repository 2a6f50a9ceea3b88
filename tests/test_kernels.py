"""Each kernel against float64 NumPy, at sizes around the edges of its tiles, and against itself in other company."""

from types import SimpleNamespace

import numpy as np
import pytest

from mpillama.layout import lanes
from mpillama.layout.weight_types import WEIGHT_TYPES, WeightType

TYPES = list(WEIGHT_TYPES)
TOKENS = [1, 2, 3, 4, 5, 7, 8, 9, 17]
GROUPS = [1, 2, 3, 4, 5]
THREADS = [1, 2, 3, 5]
GRID = 2.0**-30
NO_TILES = np.zeros(64, np.uint8)  # AMX is not used


@pytest.fixture(scope="module")
def kernels(target: object) -> SimpleNamespace:
    """The compiled modules."""
    from mpillama.kernels import activations, attention, embedding, layer, rope, vector

    return SimpleNamespace(
        layer=layer, vector=vector, rope=rope, attention=attention.attention, embedding=embedding,
        places=activations.places,
    )  # fmt: skip


def without_scales(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """A layer's cache in f32 or f16, as the kernels take it."""
    none = np.zeros((*keys.shape[:2], 0, 64), np.uint16)
    return keys, none, values, none


# -- matrices ------------------------------------------------------------------------------------------------------


class Activations:
    """Float32 [tokens, k] and what the kernel makes of it for quantised matrices."""

    def __init__(self, kernels: SimpleNamespace, x: np.ndarray):
        tokens, k = x.shape
        self.blocks = k // 32
        count = kernels.places(tokens, self.blocks)
        self.x = np.ascontiguousarray(x, np.float32)
        self.tiled = np.zeros((count, 32), np.int8), np.zeros(count, np.float32), np.zeros(count, np.int32)
        for t in range(tokens):
            kernels.vector.quantise_blocks(self.x[t], *self.tiled, tokens, t, 0, self.blocks)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.x, *self.tiled

    def by_token(self, array: np.ndarray) -> np.ndarray:
        """[tokens, blocks, …] from tiles of 16 tokens, or of all if there are fewer: [tile, block, token, …]."""
        tokens = len(self.x)
        width = min(tokens, 16)
        tiles = array.reshape(-1, self.blocks, width, *array.shape[1:])
        return tiles.swapaxes(1, 2).reshape(-1, self.blocks, *array.shape[1:])[:tokens]

    values = property(lambda self: self.by_token(self.tiled[0]))
    scales = property(lambda self: self.by_token(self.tiled[1]))
    starts = property(lambda self: self.by_token(self.tiled[2]))

    def seen_by(self, weight_type: WeightType) -> np.ndarray:
        """What a matrix of this type multiplies, in float64."""
        if not weight_type.quantised:
            return self.x.astype(np.float64)
        return (self.values * self.scales[:, :, None].astype(np.float64)).reshape(self.x.shape)


def random_matrix(rows: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, k)).astype(np.float32)


def packed(x: np.ndarray, weight_type: WeightType, panel: int | None = None):
    """(values, scales) as the kernels take them, and the float64 matrix that they hold."""
    arrays = lanes.pack(x, weight_type, panel)
    scales = arrays[1].view(np.uint16) if weight_type.quantised else None
    return weight_type.view(arrays[0]), scales, lanes.unpack(arrays, weight_type).astype(np.float64)


def column_parallel(kernels, w, scales, x: Activations, threads: int = 2, in_flight: int = 1) -> np.ndarray:
    out = np.full((len(x.x), 16 * len(w)), np.nan, np.float32)
    kernels.layer.column_parallel(w, scales, *x.arrays, out, threads, in_flight, NO_TILES)
    return out


def row_parallel(kernels, w, scales, x: Activations, threads: int = 2, in_flight: int = 1) -> np.ndarray:
    out = np.full((len(x.x), 16 * w.shape[1]), np.nan)
    kernels.layer.row_parallel(w, scales, *x.arrays, out, threads, in_flight, NO_TILES)
    return out


def assert_close(found: np.ndarray, x: np.ndarray, w: np.ndarray, terms: int) -> None:
    """`found` is x w^T but for float32's rounding of at most `terms` sums; worst case, not a guess."""
    bound = (np.abs(x) @ np.abs(w).T) * terms * 2.0**-24 + 1e-30
    assert np.all(np.abs(found - x @ w.T) <= bound)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("weight_type", TYPES)
def test_column_parallel(kernels, weight_type, tokens):
    kind, blocks = WEIGHT_TYPES[weight_type], 1 + tokens % 3
    x = Activations(kernels, random_matrix(tokens, 32 * blocks, seed=9))
    for groups in GROUPS:
        w, scales, dense = packed(random_matrix(16 * groups, 32 * blocks), kind)
        found = column_parallel(kernels, w, scales, x)
        assert_close(found, x.seen_by(kind), dense, 2 * blocks if kind.quantised else 32 * blocks)
        for threads in THREADS:
            for in_flight in (1, 2):
                assert np.array_equal(column_parallel(kernels, w, scales, x, threads, in_flight), found)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("weight_type", TYPES)
def test_row_parallel(kernels, weight_type, tokens):
    kind, panel = WEIGHT_TYPES[weight_type], (32, 64, 128)[tokens % 3]
    for groups in GROUPS:
        panels = 1 + groups % 4
        x = Activations(kernels, random_matrix(tokens, panel * panels, seed=9))
        w, scales, dense = packed(random_matrix(16 * groups, panel * panels), kind, panel)
        found = row_parallel(kernels, w, scales, x)
        assert np.array_equal(np.rint(found / GRID) * GRID, found)
        exact = x.seen_by(kind)
        bound = np.abs(exact) @ np.abs(dense).T * panel * 2.0**-24 + panels * GRID
        assert np.all(np.abs(found - exact @ dense.T) <= bound)
        for threads in THREADS:
            for in_flight in (1, 2):
                assert np.array_equal(row_parallel(kernels, w, scales, x, threads, in_flight), found)


@pytest.mark.parametrize("weight_type", TYPES)
def test_a_row_of_a_product_does_not_depend_on_its_company(kernels, weight_type):
    """One token alone and one row group alone give the bits that they give among others."""
    x_all, kind = random_matrix(17, 96, seed=9), WEIGHT_TYPES[weight_type]
    together = Activations(kernels, x_all)
    w, scales, _ = packed(random_matrix(80, 96), kind)
    wp, scales_p, _ = packed(random_matrix(80, 96), kind, 32)
    columns, rows = column_parallel(kernels, w, scales, together), row_parallel(kernels, wp, scales_p, together)
    for t in range(17):
        alone = Activations(kernels, x_all[t : t + 1])
        assert np.array_equal(column_parallel(kernels, w, scales, alone)[0], columns[t])
        assert np.array_equal(row_parallel(kernels, wp, scales_p, alone)[0], rows[t])
    for g in range(5):
        part = None if scales is None else scales[g : g + 1]
        assert np.array_equal(column_parallel(kernels, w[g : g + 1], part, together), columns[:, 16 * g : 16 * g + 16])


@pytest.mark.parametrize("weight_type", TYPES)
def test_panels_may_be_split_and_added_in_any_order(kernels, weight_type):
    """What ranks do: each sums its panels, and the sums are added in whatever order MPI likes."""
    kind, panels, rng = WEIGHT_TYPES[weight_type], 7, np.random.default_rng(3)
    # Sizes so different that a float64 sum of unrounded numbers would depend on its order.
    x = random_matrix(3, 32 * panels, seed=9) * np.repeat(np.float32(2) ** np.array([9, -25, -8, -20, 12, -30, 3]), 32)
    w, scales, _ = packed(random_matrix(32, 32 * panels), kind, 32)
    whole = row_parallel(kernels, w, scales, Activations(kernels, x))
    for _ in range(20):
        order, borders = rng.permutation(panels), np.sort(rng.integers(0, panels + 1, rng.integers(0, 5)))
        total = np.zeros_like(whole)
        for part in rng.permuted(np.arange(len(borders) + 1)):
            mine = np.split(order, borders)[part]
            columns = np.concatenate([np.arange(32 * p, 32 * p + 32) for p in mine] or [np.arange(0)])
            mine_scales = None if scales is None else np.ascontiguousarray(scales[mine])
            mine_x = Activations(kernels, x[:, columns])
            total += row_parallel(kernels, np.ascontiguousarray(w[mine]), mine_scales, mine_x)
        assert np.array_equal(total, whole)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("weight_type", TYPES)
def test_an_idle_rank_computes_nothing(kernels, weight_type, tokens):
    """No row groups give no columns, no panels give zeros."""
    kind = WEIGHT_TYPES[weight_type]
    w, scales, _ = packed(random_matrix(32, 64), kind)
    none = None if scales is None else scales[:0]
    assert column_parallel(kernels, w[:0], none, Activations(kernels, np.zeros((tokens, 64)))).shape == (tokens, 0)
    w, scales, _ = packed(random_matrix(32, 64), kind, 32)
    none = None if scales is None else scales[:0]
    zeros = row_parallel(kernels, w[:0], none, Activations(kernels, np.zeros((tokens, 0))))
    assert np.array_equal(zeros, np.zeros((tokens, 32)))


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("weight_type", ["q8_0", "q4_0"])
def test_integer_dot_products_do_not_saturate(kernels, weight_type, tokens):
    """The largest bytes of both signs, against each other: exact, for sums that float32 holds."""
    kind = WEIGHT_TYPES[weight_type]
    low, high = (-128, 127) if weight_type == "q8_0" else (0, 15)
    patterns = [np.full(32, low), np.full(32, high), np.tile([low, high], 16), np.r_[[low] * 16, [high] * 16]]
    stored = np.stack([patterns[r % 4] for r in range(16)])[:, None].astype(kind.stored)
    w, scales = lanes.pack_blocks(stored, np.ones((16, 1), np.float16), kind)
    signs = [np.ones(32), -np.ones(32), np.tile([1, -1], 16), np.r_[-np.ones(16), np.ones(16)]]
    for sign in signs:
        x = Activations(kernels, np.tile(127 * sign, (tokens, 1)))
        assert np.array_equal(x.values[0, 0], 127 * sign)
        found = column_parallel(kernels, w, scales.view(np.uint16), x)
        integers = stored[:, 0].astype(np.int64) - (8 if weight_type == "q4_0" else 0)
        assert np.array_equal(found, np.tile(integers @ (127 * sign), (tokens, 1)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("weight_type", TYPES)
def test_a_bad_activation_shows_in_its_token_only(kernels, weight_type, tokens, bad):
    x = random_matrix(tokens, 64, seed=9)
    x[tokens - 1, 40] = bad
    activations, kind = Activations(kernels, x), WEIGHT_TYPES[weight_type]
    for run, panel in ((column_parallel, None), (row_parallel, 32)):
        w, scales, _ = packed(random_matrix(32, 64), kind, panel)
        found = run(kernels, w, scales, activations)
        assert not np.isfinite(found[tokens - 1]).any()
        assert np.isfinite(found[: tokens - 1]).all()


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("weight_type", TYPES)
def test_a_bad_weight_shows_in_its_row_only(kernels, weight_type, tokens):
    kind = WEIGHT_TYPES[weight_type]
    for run, panel in ((column_parallel, None), (row_parallel, 32)):
        w, scales, _ = packed(random_matrix(32, 64), kind, panel)
        bad = w.copy() if scales is None else scales.copy()
        pattern = {"f32": np.nan, "bf16": 0x7FC0}.get(weight_type, 0x7E00)  # a quiet NaN
        bad.reshape(-1, 16)[0, 5] = pattern
        args = (bad, None) if scales is None else (w, bad)
        found = run(kernels, *args, Activations(kernels, random_matrix(tokens, 64, seed=9)))
        assert np.isnan(found[:, 5]).all()
        assert np.isfinite(np.delete(found, 5, axis=1)).all()


def test_query_key_value_is_three_products(kernels):
    for weight_type, kv_groups in (("q8_0", 2), ("q4_0", 1), ("f16", 0)):
        kind = WEIGHT_TYPES[weight_type]
        matrices = [packed(random_matrix(16 * g, 64, seed=g), kind)[:2] for g in (3, kv_groups or 1, kv_groups or 1)]
        if not kv_groups:
            matrices[1:] = [(w[:0], s) for w, s in matrices[1:]]
        for tokens in (1, 2, 9):
            x = Activations(kernels, random_matrix(tokens, 64, seed=9))
            outs = [np.full((tokens, 16 * len(w)), np.nan, np.float32) for w, _ in matrices]
            kernels.layer.query_key_value(*[a for m in matrices for a in m], *x.arrays, *outs, 2, 1, NO_TILES)
            for out, (w, scales) in zip(outs, matrices, strict=True):
                assert np.array_equal(out, column_parallel(kernels, w, scales, x))


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("weight_type", ["f32", "q8_0", "q4_0"])
def test_gate_up(kernels, weight_type, quantised):
    """silu(gate) * up, for numbers of 32-row blocks below, at and above the number of threads; 0 on an idle rank."""
    kind = WEIGHT_TYPES[weight_type]
    for blocks in (0, 1, 2, 5):
        gate_matrix, up_matrix = (packed(random_matrix(160, 64, seed=s), kind)[:2] for s in (1, 2))
        gate_matrix, up_matrix = ([a if a is None else a[: 2 * blocks] for a in m] for m in (gate_matrix, up_matrix))
        for tokens in (1, 3, 9):
            x = Activations(kernels, random_matrix(tokens, 64, seed=9))
            gate, up = (column_parallel(kernels, *m, x).astype(np.float64) for m in (gate_matrix, up_matrix))
            out, scratch = (np.full(gate.shape, np.nan, np.float32) for _ in range(2))
            found = Activations(kernels, np.zeros(gate.shape))
            for threads in (1, 2, 3):
                kernels.layer.gate_up(
                    *gate_matrix, *up_matrix, None, None, *x.arrays, out, scratch, quantised, *found.arrays[1:],
                    threads, 1, NO_TILES,
                )  # fmt: skip
                np.testing.assert_allclose(out, gate / (1 + np.exp(-gate)) * up, rtol=1e-6, atol=1e-30)
                if quantised:
                    expected = Activations(kernels, out)
                    for ours, theirs in zip(found.arrays[1:], expected.arrays[1:], strict=True):
                        assert np.array_equal(ours, theirs)


# -- activations ---------------------------------------------------------------------------------------------------


def test_quantise_rounds_to_127ths_of_the_largest(kernels):
    x = random_matrix(9, 96) * np.float32(10) ** np.arange(-4, 5, dtype=np.float32)[:, None]
    found = Activations(kernels, x)
    blocks = x.reshape(9, 3, 32)
    largest = np.abs(blocks).max(axis=2)
    assert np.array_equal(found.scales, largest / np.float32(127))
    assert np.array_equal(found.values, np.rint(blocks * (np.float32(127) / largest)[:, :, None]))
    assert np.array_equal(found.starts, -8 * found.values.astype(np.int32).sum(axis=2))
    assert np.abs(found.values).max() == 127


@pytest.mark.parametrize("tiny", [0.0, -0.0, 1e-45, 1e-38, 9e-31])
def test_quantise_takes_tiny_blocks_for_zeros(kernels, tiny):
    found = Activations(kernels, np.full((1, 32), tiny))
    assert not found.values.any()
    assert found.scales[0, 0] == 0
    assert found.starts[0, 0] == 0


def test_quantise_holds_the_largest_numbers(kernels):
    biggest = np.finfo(np.float32).max
    found = Activations(kernels, np.r_[[biggest, -biggest], np.zeros(30)][None])
    assert list(found.values[0, 0, :2]) == [127, -127]
    assert found.scales[0, 0] == biggest / np.float32(127)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 31])
def test_quantise_marks_a_block_with_a_bad_number(kernels, bad, place):
    x = random_matrix(1, 96)
    x[0, 32 + place] = bad
    assert list(np.isnan(Activations(kernels, x).scales[0])) == [False, True, False]


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 17])
def test_normalise(kernels, tokens):
    """Each row on its own; the padding counts for nothing; the quantised form is that of the result."""
    size, eps = 50, 1e-5
    x, weight = random_matrix(tokens, 64) * np.float32(3), random_matrix(1, 64, seed=2)[0]
    x[:, size:], weight[size:] = 0.0, 0.0
    expected = x[:, :size] / np.sqrt((x[:, :size].astype(np.float64) ** 2).mean(axis=1, keepdims=True) + eps)
    for threads in THREADS:
        found = Activations(kernels, np.full(x.shape, 5.0))
        kernels.layer.normalise(x, weight, size, eps, found.x, True, *found.arrays[1:], threads)
        np.testing.assert_allclose(found.x[:, :size], expected * weight[:size], rtol=3e-7)
        assert not found.x[:, size:].any()
        again = Activations(kernels, found.x)
        assert all(np.array_equal(a, b) for a, b in zip(found.arrays, again.arrays, strict=True))


def test_normalise_without_quantised_matrices_leaves_their_arrays(kernels):
    found = Activations(kernels, np.full((2, 32), 5.0))
    before = [a.copy() for a in found.arrays]
    weight = np.ones(32, np.float32)
    kernels.layer.normalise(random_matrix(2, 32), weight, 32, 1e-5, found.x, False, *found.arrays[1:], 2)
    assert all(np.array_equal(a, b) for a, b in zip(found.arrays[1:], before[1:], strict=True))
    assert not np.array_equal(found.x, before[0])


def test_normalise_of_zeros_is_zero_and_of_nan_is_nan(kernels):
    x = np.zeros((3, 32), np.float32)
    x[1, 7], x[2, 7] = np.nan, np.inf
    found = Activations(kernels, np.zeros((3, 32)))
    weight = np.ones(32, np.float32)
    kernels.layer.normalise(x, weight, 32, 1e-5, found.x, False, *found.arrays[1:], 2)
    assert not found.x[0].any()
    assert np.isnan(found.x[1]).all()
    assert np.isnan(found.x[2, 7])


@pytest.mark.parametrize("gate", [0.0, -0.0, 1.0, -1.0, 88.0, -86.0, -90.0, 1e4, -1e4, 1e30, 3e38])
def test_silu_at_its_ends(kernels, gate):
    out = np.empty(16, np.float32)
    kernels.vector.silu_multiply(np.full(16, gate, np.float32), np.full(16, 0.5, np.float32), out, 0, 16)
    exact = np.float64(np.float32(gate)) / (1 + np.exp(-np.float64(gate), where=gate > -700, out=np.array(np.inf)))
    np.testing.assert_allclose(out, 0.5 * exact, rtol=1e-6, atol=1e-33)


@pytest.mark.parametrize("place", ["gate", "up"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_silu_keeps_bad_numbers(kernels, place, bad):
    arrays = {"gate": np.ones(32, np.float32), "up": np.ones(32, np.float32)}
    arrays[place][5] = bad
    out = np.empty(32, np.float32)
    kernels.vector.silu_multiply(arrays["gate"], arrays["up"], out, 0, 32)
    assert list(np.flatnonzero(~np.isfinite(out))) == [5]


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 17])
def test_sums_are_rounded_once(kernels, tokens):
    total = np.random.default_rng(4).standard_normal((tokens, 33))
    for threads in THREADS:
        out, x = np.empty(total.shape, np.float32), np.ones(total.shape, np.float32)
        kernels.vector.round_to_float(total, out, threads)
        kernels.vector.add_rounded(x, total, threads)
        assert np.array_equal(out, total.astype(np.float32))
        assert np.array_equal(x, np.float32(1) + total.astype(np.float32))


# -- embedding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_type", TYPES)
def test_embedding_rows_are_the_matrix_rows(kernels, weight_type):
    kind, rows = WEIGHT_TYPES[weight_type], np.array([0, 47, -1, 15, 16, 31, 5, 5])
    w, scales, dense = packed(random_matrix(48, 96), kind)
    out = np.full((len(rows), 96), np.nan)
    if scales is None:
        kernels.embedding.embed_floats(w, rows, out)
    else:
        kernels.embedding.embed_blocks(w, scales, rows, out)
    assert np.array_equal(out, np.where(rows[:, None] < 0, 0.0, dense[rows]))


# -- rotary embedding and cache --------------------------------------------------------------------------------------


def test_angles_are_float32_products(kernels):
    positions = np.array([0, 1, 63, 64, 8191, 131071, 2**20 - 1], np.int32)
    frequencies = (500000.0 ** -(np.arange(0, 64, 2) / 64)).astype(np.float32)
    cosines, sines = (np.empty((len(positions), 32), np.float32) for _ in range(2))
    kernels.rope.rope_angles(positions, frequencies, 1.0, cosines, sines)
    angles = (positions[:, None].astype(np.float32) * frequencies).astype(np.float64)
    np.testing.assert_allclose(cosines, np.cos(angles), atol=6e-8, rtol=0)
    np.testing.assert_allclose(sines, np.sin(angles), atol=6e-8, rtol=0)


class CacheStep:
    """Queries, keys and values of some tokens, with caches of 3 blocks; `head_dim` 32 of which 20 are real."""

    def __init__(self, tokens: int, cache_dtype: str, heads: int = 3, kv_heads: int = 2):
        rng = np.random.default_rng(tokens)
        self.q, self.k, self.v = (
            rng.standard_normal((tokens, n, 32)).astype(np.float32) for n in (heads, kv_heads, kv_heads)
        )
        for array in (self.q, self.k, self.v):
            array[..., 20:] = 0
        self.cosines, self.sines = (rng.standard_normal((tokens, 10)).astype(np.float32) for _ in range(2))
        self.keys = np.full((3, kv_heads, 32, 64), 77, cache_dtype)
        self.values = np.full((3, kv_heads, 64, 32), 77, cache_dtype)
        self.slots = rng.permutation(3 * 64)[:tokens]

    def run(self, kernels, threads: int) -> None:
        """Rotate in place and store."""
        kernels.layer.rotate_and_store(
            self.q, self.k, self.v, None, None, 1e-5, self.cosines, self.sines, without_scales(self.keys, self.values),
            self.slots, threads,
        )  # fmt: skip

    def rotated(self, x: np.ndarray) -> np.ndarray:
        """Channel i with channel i + 10 as one complex number."""
        turn = (self.cosines + 1j * self.sines.astype(np.complex128))[:, None]
        pairs = (x[..., :10] + 1j * x[..., 10:20].astype(np.complex128)) * turn
        return np.concatenate([pairs.real, pairs.imag, x[..., 20:]], axis=2)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_rotation_turns_every_token_by_its_own_angle(kernels, tokens, threads):
    before, step = CacheStep(tokens, "f4"), CacheStep(tokens, "f4")
    step.run(kernels, threads)
    np.testing.assert_allclose(step.q, step.rotated(before.q), atol=1e-6)
    np.testing.assert_allclose(step.k, step.rotated(before.k), atol=1e-6)
    assert np.array_equal(step.v, before.v)


@pytest.mark.parametrize("dtype", ["f4", "i2"])
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("tokens", [1, 7, 8, 17])
def test_keys_and_values_go_to_their_slots_only(kernels, tokens, threads, dtype):
    step = CacheStep(tokens, dtype)
    keys, values = step.keys.copy(), step.values.copy()
    step.run(kernels, threads)
    block, place = step.slots // 64, step.slots % 64
    stored_k, stored_v = (x if dtype == "f4" else x.astype(np.float16).view(np.int16) for x in (step.k, step.v))
    keys[block, :, :, place], values[block, :, place] = stored_k, stored_v
    assert np.array_equal(step.keys, keys)
    assert np.array_equal(step.values, values)


def test_an_idle_rank_rotates_and_stores_nothing(kernels):
    step = CacheStep(9, "f4", heads=0, kv_heads=0)
    step.run(kernels, 2)
    assert step.keys.size == 0


# -- attention -----------------------------------------------------------------------------------------------------


class AttentionCase:
    """Sequences over a cache whose blocks are dealt at random; head_start tells who shares a KV head."""

    def __init__(self, segments: list[tuple[int, int]], head_start: list[int], dtype: str = "f4", head_dim: int = 32):
        rng = np.random.default_rng(len(segments))
        self.head_start = np.array(head_start)
        counts = np.array([n for n, _ in segments])
        firsts = np.cumsum([0, *counts[:-1]])
        self.segments = np.array([[f, n, start] for f, (n, start) in zip(firsts, segments, strict=True)])
        blocks = [(n + start + 63) // 64 for n, start in segments]
        dealt, width = rng.permutation(sum(blocks)), max(blocks)
        parts = np.split(dealt, np.cumsum(blocks)[:-1])
        self.tables = np.stack([np.pad(p, (0, width - len(p))) for p in parts])
        self.q = 1.5 * rng.standard_normal((counts.sum(), head_start[-1], head_dim)).astype(np.float32)
        kv_heads = len(head_start) - 1
        keys = 1.5 * rng.standard_normal((sum(blocks), kv_heads, head_dim, 64)).astype(np.float32)
        values = rng.standard_normal((sum(blocks), kv_heads, 64, head_dim)).astype(np.float32)
        self.keys, self.values = (a if dtype == "f4" else a.astype(np.float16).view(np.int16) for a in (keys, values))
        self.scale = 1 / np.sqrt(head_dim)

    @property
    def cache(self) -> tuple[np.ndarray, ...]:
        return without_scales(self.keys, self.values)

    def run(self, kernels, threads: int = 2, quantised: bool = False) -> Activations:
        """The kernel's answer; x is [tokens, heads * head_dim]."""
        tokens, heads, head_dim = self.q.shape
        out = Activations(kernels, np.zeros((tokens, heads * head_dim)))
        out.x[:] = np.nan
        kernels.attention(
            self.q, self.cache, self.head_start, self.segments, self.tables, self.scale, 0,
            out.x.reshape(self.q.shape), quantised, *out.arrays[1:], threads,
        )  # fmt: skip
        return out

    def expected(self) -> np.ndarray:
        """float64, row by row."""
        out = np.zeros(self.q.shape)
        for (first, count, start), table in zip(self.segments, self.tables, strict=True):
            for t in range(count):
                for kv in range(len(self.head_start) - 1):
                    for h in range(self.head_start[kv], self.head_start[kv + 1]):
                        out[first + t, h] = self.one_row(self.q[first + t, h], table, kv, start + t + 1)
        return out.reshape(len(out), -1)

    def one_row(self, q: np.ndarray, table: np.ndarray, kv: int, positions: int) -> np.ndarray:
        keys = self.as_float(self.keys)[table, kv].transpose(0, 2, 1).reshape(-1, len(q))[:positions]
        values = self.as_float(self.values)[table, kv].reshape(-1, len(q))[:positions]
        scores = keys @ q.astype(np.float64) * self.scale
        weights = np.exp(scores - scores.max())
        return weights @ values / weights.sum()

    @staticmethod
    def as_float(cache: np.ndarray) -> np.ndarray:
        return (cache if cache.dtype == np.float32 else cache.view(np.float16)).astype(np.float64)


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


@pytest.mark.parametrize("dtype", ["f4", "i2"])
@pytest.mark.parametrize("name", list(ATTENTION_CASES))
def test_attention(kernels, name, dtype):
    case = AttentionCase(*ATTENTION_CASES[name], dtype)
    found = case.run(kernels)
    np.testing.assert_allclose(found.x, case.expected(), atol=3e-6)
    for threads in (1, 3, 8):
        again = case.run(kernels, threads, quantised=True)
        assert np.array_equal(again.x, found.x)
        expected = Activations(kernels, found.x)
        assert all(np.array_equal(a, b) for a, b in zip(again.arrays, expected.arrays, strict=True))


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_attention_with_other_head_sizes(kernels, head_dim):
    case = AttentionCase([(5, 62)], [0, 2], "f4", head_dim)
    np.testing.assert_allclose(case.run(kernels).x, case.expected(), atol=3e-6)


def test_attention_on_an_idle_rank(kernels):
    assert AttentionCase([(3, 2)], [0]).run(kernels).x.shape == (3, 0)


def test_attention_of_a_token_does_not_depend_on_its_company(kernels):
    case = AttentionCase(*ATTENTION_CASES["several sequences"])
    together = case.run(kernels).x
    for (first, count, start), table in zip(case.segments, case.tables, strict=True):
        for t in range(count):
            alone = AttentionCase([(1, start + t)], list(case.head_start))
            alone.q, alone.keys, alone.values = case.q[first + t : first + t + 1], case.keys, case.values
            alone.tables = table[None].copy()
            assert np.array_equal(alone.run(kernels).x[0], together[first + t])


def test_attention_does_not_read_behind_the_last_position(kernels):
    case = AttentionCase([(3, 70)], [0, 2])
    clean = case.run(kernels).x
    last = case.tables[0, 1]
    case.keys[last, :, :, 73 - 64 :], case.values[last, :, 73 - 64 :] = np.nan, np.inf
    assert np.array_equal(case.run(kernels).x, clean)


@pytest.mark.parametrize("array", ["q", "keys", "values"])
def test_attention_shows_nan(kernels, array):
    """A NaN in a query spoils its row, in a key or value (of position 8) the rows that see it."""
    case = AttentionCase([(4, 6)], [0, 1])
    place = {"q": (2, 0, 3), "keys": (case.tables[0, 0], 0, 3, 8), "values": (case.tables[0, 0], 0, 8, 3)}[array]
    getattr(case, array)[place] = np.nan
    found = np.isnan(case.run(kernels).x)
    assert list(found.any(axis=1)) == ([False, False, True, False] if array == "q" else [False, False, True, True])
    if array != "values":
        assert np.array_equal(found.any(axis=1), found.all(axis=1))


# -- the vocabulary of the kernels -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emitted(target: object):
    """tests.emitted: single operations as functions."""
    from tests import emitted

    return emitted


def test_exp_is_accurate_over_its_range(emitted):
    x = np.linspace(-87, 88, 400_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(emitted.exp(x) / exact - 1).max() < 2e-7


def test_exp_near_zero_and_at_every_step_of_its_reduction(emitted):
    halves = (np.arange(-125, 126) + 0.5) * np.log(2)
    x = np.concatenate([np.nextafter(halves.astype(np.float32), np.float32(s * np.inf)) for s in (-1, 1)])
    x = np.concatenate([x, halves.astype(np.float32), np.float32(10.0) ** np.arange(-45, 0), [-1e-45, -1e-8]])
    x = x[(x > -87) & (x < 88)].astype(np.float32)
    assert np.abs(emitted.exp(x) / np.exp(x.astype(np.float64)) - 1).max() < 2e-7


def test_exp_at_special_values(emitted):
    x = np.array([0.0, -0.0, -np.inf, -87.001, -1e30, np.nan, np.inf, 89.0, 3e38], np.float32)
    found = emitted.exp(x)
    assert list(found[:5]) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert np.isnan(found[5])
    np.testing.assert_allclose(found[6:], 1.65e38, rtol=2e-3)


def test_sine_and_cosine_up_to_a_million_radians(emitted):
    rng = np.random.default_rng(0)
    near_quarters = np.arange(2**19) * (np.pi / 2)
    angles = np.concatenate([rng.uniform(0, 2**20, 300_000), np.arange(2**17), near_quarters, [0.0, 1e-300, 1e-9]])
    for sign in (1, -1):
        sines, cosines = emitted.sine_cosine_of(sign * angles)
        assert np.abs(sines - np.sin(sign * angles)).max() < 1e-15
        assert np.abs(cosines - np.cos(sign * angles)).max() < 1e-15


EVERY_HALF = np.arange(2**16, dtype=np.uint16)


def test_every_half_becomes_its_float(emitted):
    exact = EVERY_HALF.view(np.float16).astype(np.float32)
    found = emitted.half_to_float(EVERY_HALF)
    nan = np.isnan(exact)
    assert np.array_equal(found[~nan].view(np.uint32), exact[~nan].view(np.uint32))
    assert np.isnan(found[nan]).all()


def test_every_half_survives_the_way_back(emitted):
    x = EVERY_HALF.view(np.float16).astype(np.float32)
    found = emitted.float_to_half(x)
    nan = np.isnan(x)
    assert np.array_equal(found[~nan], EVERY_HALF[~nan])
    assert np.isnan(found[nan].view(np.float16)).all()


def test_floats_between_halves_are_rounded_to_nearest_even(emitted):
    """At, just below and just above the middle of any two halves; the last middle, 65520, becomes infinity."""
    positive = np.append(np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64), 65536.0)
    middles = ((positive[1:] + positive[:-1]) / 2).astype(np.float32)
    x = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))])
    x = np.concatenate([x, -x, np.float32([65519.996, 1e30, np.inf, 1e-45, 2**-25, 2**-24 * 1.5])])
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).view(np.uint16)
    assert np.array_equal(emitted.float_to_half(x), expected)


def test_random_float_patterns_become_halves_as_in_numpy(emitted):
    x = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16)
    found, nan = emitted.float_to_half(x).view(np.float16), np.isnan(expected)
    assert np.array_equal(found[~nan], expected[~nan])
    assert np.isnan(found[nan]).all()


def test_every_bfloat_becomes_its_float(emitted):
    expected = EVERY_HALF.astype(np.uint32) << 16
    assert np.array_equal(emitted.bfloat_to_float(EVERY_HALF).view(np.uint32), expected)


def test_the_grid_is_multiples_of_2_to_the_minus_30(emitted):
    rng = np.random.default_rng(2)
    x = (rng.standard_normal(50_000) * 2.0 ** rng.integers(-40, 21, 50_000)).astype(np.float32)
    found = emitted.round_to_grid(x)
    assert np.array_equal(found, np.rint(x.astype(np.float64) / GRID) * GRID)
    assert np.isnan(emitted.round_to_grid(np.float32([np.nan]))).all()
    assert list(emitted.round_to_grid(np.float32([np.inf, -np.inf]))) == [np.inf, -np.inf]
    small = found[np.abs(found) < 64]
    assert all(small[rng.permutation(len(small))].cumsum()[-1] == small.sum() for _ in range(5))


class Q8Case(AttentionCase):
    """The same with a q8 cache, filled by the kernel that stores keys and values."""

    def __init__(self, kernels, segments: list[tuple[int, int]], head_start: list[int]):
        super().__init__(segments, head_start)
        blocks, kv_heads, head_dim, _ = self.keys.shape
        scales = (blocks, kv_heads, head_dim // 32, 64)
        self.q8 = tuple(
            np.zeros(shape, dtype)
            for shape, dtype in ((self.keys.shape, "i1"), (scales, "u2"), (self.values.shape, "i1"), (scales, "u2"))
        )
        # Every place of every block is a token that is not turned.
        k = np.ascontiguousarray(self.keys.transpose(0, 3, 1, 2)).reshape(-1, kv_heads, head_dim)
        v = np.ascontiguousarray(self.values.transpose(0, 2, 1, 3)).reshape(-1, kv_heads, head_dim)
        cosines, sines = (np.full((len(k), head_dim // 2), angle, np.float32) for angle in (1, 0))
        slots = np.arange(len(k))
        kernels.layer.rotate_and_store(k[:, :0].copy(), k, v, None, None, 1e-5, cosines, sines, self.q8, slots, 2)

    @property
    def cache(self) -> tuple[np.ndarray, ...]:
        return self.q8

    def decoded(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys [blocks, kv_heads, head_dim, 64] and values [blocks, kv_heads, 64, head_dim] that the cache holds."""
        keys, key_scales, values, value_scales = self.q8
        blocks, kv_heads, head_dim, _ = keys.shape
        steps = keys.reshape(blocks, kv_heads, 4, head_dim // 32, 8, 16, 4)
        channels = steps.transpose(0, 1, 3, 4, 6, 2, 5).reshape(keys.shape).astype(np.float64)
        scale = [s.view(np.float16).astype(np.float64) for s in (key_scales, value_scales)]
        return (
            channels * np.repeat(scale[0], 32, axis=2),
            values * np.repeat(scale[1].swapaxes(2, 3), 32, axis=3),
        )


def test_q8_cache_holds_rounded_keys_and_values(kernels):
    case = Q8Case(kernels, [(5, 62)], [0, 1, 2])
    for held, true, axis in zip(case.decoded(), (case.keys, case.values), (2, 3), strict=True):
        step = np.abs(true).max(axis=axis, keepdims=True) / 127
        assert np.all(np.abs(held - true) <= step * (0.5 + 127 * 2.0**-11))
        assert not np.array_equal(held, true)


@pytest.mark.parametrize("name", list(ATTENTION_CASES))
def test_q8_attention(kernels, name):
    """As float64 attention over what the cache holds, up to the rounding of the queries; the same for any threads."""
    case = Q8Case(kernels, *ATTENTION_CASES[name])
    found = case.run(kernels).x
    for threads in (1, 3, 8):
        assert np.array_equal(case.run(kernels, threads).x, found)
    case.keys, case.values = (a.astype(np.float32) for a in case.decoded())
    blocks = case.q.reshape(*case.q.shape[:2], -1, 32)
    scale = np.abs(blocks).max(axis=3, keepdims=True) / 127
    case.q = (np.rint(blocks / np.where(scale == 0, 1, scale)) * scale).reshape(case.q.shape).astype(np.float32)
    np.testing.assert_allclose(found, case.expected(), atol=2e-3)
