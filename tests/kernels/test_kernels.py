"""Each kernel against float64 NumPy, at sizes around the edges of its tiles, and against itself in other company.

Everything is computed with every instruction set that this processor has and on 1, 2 and 3 threads (`everywhere`); the
bits must be the same. The halves of a layer are in test_half_layers.py.
"""

import ctypes
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mpillama.errors import UserError
from mpillama.kernels import arguments
from mpillama.kernels.isa import choose_isa, host_features, known_sets
from mpillama.quant.k_types import SuperBlockType, SymmetricType
from mpillama.quant.registry import WEIGHT_TYPES
from mpillama.quant.weight_type import WeightType
from tests.kernels.kernel_parts import (
    GRID,
    ISAS,
    LIBRARY_TOO,
    THREADS,
    TOKENS,
    TYPES,
    activations,
    blank_activations,
    blocks_of,
    by_token,
    column_parallel,
    everywhere,
    libraries,
    matrix,
    packed,
    part,
    quantised,
    random_matrix,
    row_parallel,
    same_bits,
    seen_by,
    teams,
    windows_of,
)

GROUPS = (1, 2, 3, 4, 5)
RANGES = {
    "q8_0": (-128, 127), "q4_0": (0, 15), "q5_0": (0, 31), "iq4_nl": (0, 15), "mxfp4": (15, 7), "q4_1": (0, 15),
    "q5_1": (0, 31), "q2_k": (0, 3), "q3_k": (-4, 3), "q4_k": (0, 15), "q5_k": (0, 31), "q6_k": (-32, 31),
    "iq4_xs": (0, 15),
}  # fmt: skip
"""What a type holds for its least and for its largest integer."""
WITH_MINIMUMS = ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k")
ONES = {"q8_0": 1, "q4_0": 9, "q5_0": 17, "iq4_nl": 8}
"""What types with float16 scales hold for 1."""


def with_unit_scales(kind: WeightType, stored: np.ndarray) -> tuple[np.ndarray, ...]:
    """A type's numbers whose values are its integers, or 7 less where it has minimums.

    Small integers that are scales are the largest that there are, so that these do not saturate either.
    """
    if isinstance(kind, SuperBlockType):
        most = -kind.form.most_scale - 1 if isinstance(kind, SymmetricType) else kind.form.most_scale
        others = kind.quantise(np.zeros((len(stored), 32), np.float32))[1:]
        return stored, *(np.full_like(a, 1 if a.dtype.kind == "f" else most) for a in others)
    one = np.float16(1) if kind.lanes[1].dtype == "<f2" else np.uint8(128)
    minimums = [np.full(stored.shape[:2], np.float16(-7))] * (kind.name in WITH_MINIMUMS)
    return stored, np.full(stored.shape[:2], one), *minimums


EVERY_HALF = np.arange(2**16, dtype=np.uint16)


@pytest.mark.parametrize("name", [isa.name for isa in known_sets()])
def test_an_instruction_set_is_among_those_compared(name):
    try:
        choose_isa(name, host_features())
    except UserError as error:
        pytest.skip(str(error))
    assert name in ISAS
    if LIBRARY_TOO in os.environ:
        pytest.skip("another library is compared with the best one")
    assert {(t.library.isa, t.threads) for t in teams()} >= {(name, threads) for threads in THREADS}


def test_structs_are_the_same_in_c_and_in_python():
    expected = []
    for struct in arguments.STRUCTS:
        expected += [ctypes.sizeof(struct), *(getattr(struct, name).offset for name, _ in struct._fields_)]
    for library in libraries():
        assert library.offsets() == expected


# -- products --------------------------------------------------------------------------------------------------------


def each_way(product, w, x):
    """The result of a product everywhere; a single token goes through one and through two groups at a time."""
    found = everywhere(lambda team: product(team, w, x))
    if len(x) == 1:
        assert same_bits(everywhere(lambda team: product(team, w, x, 2)), found)
    return found


def assert_close(found: np.ndarray, x: np.ndarray, w: np.ndarray, terms: int, absolute: float = 1e-30) -> None:
    """`found` is x w^T but for float32's rounding of at most `terms` sums; worst case, not a guess."""
    bound = (np.abs(x) @ np.abs(w).T) * terms * 2.0**-24 + absolute
    assert np.all(np.abs(found - x @ w.T) <= bound)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("weight_type", TYPES)
def test_column_parallel(weight_type, tokens):
    kind, blocks = WEIGHT_TYPES[weight_type], 1 + tokens % 3
    x = random_matrix(tokens, 32 * blocks, seed=9)
    for groups in GROUPS:
        w, dense = packed(random_matrix(16 * groups, 32 * blocks), kind)
        terms = (16 if weight_type in WITH_MINIMUMS else 4) * blocks if kind.quantised else 32 * blocks
        assert_close(each_way(column_parallel, w, x), seen_by(kind, x), dense, terms)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("weight_type", TYPES)
def test_row_parallel(weight_type, tokens):
    kind, panel = WEIGHT_TYPES[weight_type], (32, 64, 128)[tokens % 3]
    for groups in GROUPS:
        panels = 1 + groups % 4
        x = random_matrix(tokens, panel * panels, seed=9)
        w, dense = packed(random_matrix(16 * groups, panel * panels), kind, panel)
        found = each_way(row_parallel, w, x)
        assert np.array_equal(np.rint(found / GRID) * GRID, found)
        assert_close(found, seen_by(kind, x), dense, panel, panels * GRID)


@pytest.mark.parametrize(("weight_type", "rows"), [("f32", 2048), ("q4_0", 8192)])
def test_threads_divide_the_rows_of_long_panels(weight_type, rows):
    """Rows so many that a single token's threads divide rows instead of panels, or both."""
    for panels in (1, 2, 7):
        x = random_matrix(1, 128 * panels, seed=9)
        w, dense = packed(random_matrix(rows, 128 * panels), weight_type, 128)
        found = each_way(row_parallel, w, x)
        assert_close(found, seen_by(WEIGHT_TYPES[weight_type], x), dense, 128, panels * GRID)


@pytest.mark.parametrize("tokens", [17, 40])
@pytest.mark.parametrize("weight_type", TYPES)
def test_a_row_of_a_product_does_not_depend_on_its_company(weight_type, tokens):
    """One token alone and one row group alone give the bits that they give among others."""
    x = random_matrix(tokens, 96, seed=9)
    w, _ = packed(random_matrix(80, 96), weight_type)
    wp, _ = packed(random_matrix(80, 96), weight_type, 32)
    columns = everywhere(lambda team: column_parallel(team, w, x))
    rows = everywhere(lambda team: row_parallel(team, wp, x))
    for t in range(tokens):
        alone = x[t : t + 1]
        assert same_bits(everywhere(lambda team, alone=alone: column_parallel(team, w, alone))[0], columns[t])
        assert same_bits(everywhere(lambda team, alone=alone: row_parallel(team, wp, alone))[0], rows[t])
    for g in range(5):
        one = part(w, slice(g, g + 1))
        found = everywhere(lambda team, one=one: column_parallel(team, one, x))
        assert same_bits(found, columns[:, 16 * g : 16 * g + 16])


@pytest.mark.parametrize(("weight_type", "columns"), [("q4_0", 4224), ("q6_k", 4352), ("nvfp4", 4224), ("fp8", 1152)])
def test_rows_longer_than_what_is_unpacked_at_a_time(weight_type, columns):
    """AVX2 unpacks 4,096 columns for many tokens, 512 of floats: a token alone has the same bits."""
    x = random_matrix(20, columns, seed=9)
    for product, panel in ((column_parallel, None), (row_parallel, 128)):
        w, _ = packed(random_matrix(16, columns), weight_type, panel)
        found = everywhere(lambda team, product=product, w=w: product(team, w, x))
        for t in (0, 19):
            alone = everywhere(lambda team, product=product, w=w, t=t: product(team, w, x[t : t + 1]))
            assert same_bits(alone[0], found[t])


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("weight_type", TYPES)
def test_panels_may_be_split_and_added_in_any_order(weight_type, tokens):
    """What ranks do: each sums its panels, and the sums are added in whatever order MPI likes."""
    panels, rng = 7, np.random.default_rng(3)
    # Sizes so different that a float64 sum of unrounded numbers would depend on its order.
    sizes = np.repeat(np.float32(2) ** np.array([9, -25, -8, -20, 12, -30, 3]), 32)
    x = random_matrix(tokens, 32 * panels, seed=9) * sizes
    w, _ = packed(random_matrix(32, 32 * panels), weight_type, 32)
    whole = everywhere(lambda team: row_parallel(team, w, x))
    for turn in range(20):
        order, borders = rng.permutation(panels), np.sort(rng.integers(0, panels + 1, rng.integers(0, 5)))
        total, team = np.zeros_like(whole), teams()[turn % len(teams())]
        for rank in rng.permuted(np.arange(len(borders) + 1)):
            mine = np.split(order, borders)[rank]
            columns = np.concatenate([np.arange(32 * p, 32 * p + 32) for p in mine] or [np.arange(0)])
            total += row_parallel(team, part(w, mine), x[:, columns])
        assert np.array_equal(total, whole)


@pytest.mark.parametrize("tokens", [1, 9, 33])
@pytest.mark.parametrize("weight_type", TYPES)
def test_an_idle_rank_computes_nothing(weight_type, tokens):
    """No row groups give no columns, no panels give zeros."""
    w, _ = packed(random_matrix(32, 64), weight_type)
    nothing = everywhere(lambda team: column_parallel(team, part(w, slice(0)), np.zeros((tokens, 64))))
    assert nothing.shape == (tokens, 0)
    w, _ = packed(random_matrix(32, 64), weight_type, 32)
    zeros = everywhere(lambda team: row_parallel(team, part(w, slice(0)), np.zeros((tokens, 0))))
    assert np.array_equal(zeros, np.zeros((tokens, 32)))


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("weight_type", RANGES)
def test_integer_dot_products_do_not_saturate(weight_type, tokens):
    """The largest bytes of both signs, against each other: exact, for sums that float32 holds."""
    kind = WEIGHT_TYPES[weight_type]
    low, high = RANGES[weight_type]
    patterns = [np.full(32, low), np.full(32, high), np.tile([low, high], 16), np.r_[[low] * 16, [high] * 16]]
    of_zeros = kind.quantise(np.zeros((16, 32), np.float32))[0]
    stored = np.stack([patterns[r % 4] for r in range(16)])[:, None].astype(of_zeros.dtype)
    numbers = with_unit_scales(kind, stored)
    integers = kind.dequantise(numbers).astype(np.int64)
    w = matrix(kind, *kind.pack_blocks(numbers))
    for sign in (np.ones(32), -np.ones(32), np.tile([1, -1], 16), np.r_[-np.ones(16), np.ones(16)]):
        x = np.tile(127 * sign, (tokens, 1))
        found = each_way(column_parallel, w, x)
        assert np.array_equal(found, np.tile(integers @ (127 * sign), (tokens, 1)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [1, 3, 8, 17])
@pytest.mark.parametrize("weight_type", TYPES)
def test_a_bad_activation_shows_in_its_token_only(weight_type, tokens, bad):
    x = random_matrix(tokens, 64, seed=9)
    x[tokens - 1, 40] = bad
    for product, panel in ((column_parallel, None), (row_parallel, 32)):
        w, _ = packed(random_matrix(32, 64), weight_type, panel)
        found = each_way(product, w, x)
        assert not np.isfinite(found[tokens - 1]).any()
        assert np.isfinite(found[: tokens - 1]).all()


@pytest.mark.parametrize("tokens", [1, 3, 8, 17])
@pytest.mark.parametrize("weight_type", TYPES)
def test_a_bad_weight_shows_in_its_row_only(weight_type, tokens):
    if weight_type == "mxfp4":
        pytest.skip("its scales are numbers all")
    dense = random_matrix(32, 64)
    dense[5, 40] = np.nan
    for product, panel in ((column_parallel, None), (row_parallel, 32)):
        with np.errstate(all="ignore"):
            w, _ = packed(dense, weight_type, panel)
        found = each_way(product, w, random_matrix(tokens, 64, seed=9))
        assert not np.isfinite(found[:, 5]).any()
        assert np.isfinite(np.delete(found, 5, axis=1)).all()


def test_the_grid_is_multiples_of_2_to_the_minus_30():
    rng = np.random.default_rng(2)
    x = (rng.standard_normal(50_000) * 2.0 ** rng.integers(-40, 21, 50_000)).astype(np.float32)
    x[:3] = np.nan, np.inf, -np.inf
    found = everywhere(lambda team: row_parallel(team, first_column(x, 32), np.eye(1, 32, dtype=np.float32)))[0]
    assert np.array_equal(found, np.rint(x.astype(np.float64) / GRID) * GRID, equal_nan=True)
    small = found[np.abs(found) < 64]
    assert all(small[rng.permutation(len(small))].cumsum()[-1] == small.sum() for _ in range(5))


def first_column(x: np.ndarray, panel: int | None = None):
    """A float32 matrix whose product with (1, 0, 0, …) is `x`, a multiple of 16 numbers."""
    dense = np.zeros((len(x), 32), np.float32)
    dense[:, 0] = x
    return matrix(WEIGHT_TYPES["f32"], *WEIGHT_TYPES["f32"].pack(dense, panel))


# -- activations -----------------------------------------------------------------------------------------------------


def blocks(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Values [tokens, blocks, 32], scales, starts and halves [tokens, blocks]."""

    def run(team):
        h = activations(team.library, x)
        return tuple(by_token(h, array).copy() for array in blocks_of(h))

    return everywhere(run)


@pytest.mark.parametrize("tokens", TOKENS)
def test_quantise_rounds_to_127ths_of_the_largest(tokens):
    sizes = np.float32(10) ** (np.arange(tokens) % 9 - 4).astype(np.float32)
    x = random_matrix(tokens, 96) * sizes[:, None]
    values, scales, starts, halves = blocks(x)
    expected, expected_scales = quantised(x)
    assert np.array_equal(scales, expected_scales)
    assert np.array_equal(values, expected)
    assert np.array_equal(starts, -8 * values.astype(np.int32).sum(axis=2))
    of_halves = values.reshape(tokens, 3, 2, 16).sum(axis=3, dtype=np.int16)
    assert np.array_equal(halves[:, :, None].copy().view(np.int16), of_halves)
    assert np.array_equal(np.abs(values).max(axis=2), np.full((tokens, 3), 127))


@pytest.mark.parametrize("tiny", [0.0, -0.0, 1e-45, 1e-38, 9e-31])
def test_quantise_takes_tiny_blocks_for_zeros(tiny):
    assert not any(array.any() for array in blocks(np.full((1, 32), tiny, np.float32)))


def test_quantise_holds_the_smallest_and_the_largest_numbers():
    for largest in (np.float32(1.1e-30), np.finfo(np.float32).max):
        values, scales, *_ = blocks(np.r_[[largest, -largest], np.zeros(30)][None].astype(np.float32))
        assert list(values[0, 0, :2]) == [127, -127]
        assert scales[0, 0] == largest / np.float32(127)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 31])
def test_quantise_marks_a_block_with_a_bad_number(place, bad):
    x = random_matrix(1, 96)
    x[0, 32 + place] = bad
    values, scales, *_ = blocks(x)
    assert list(np.isnan(scales[0])) == [False, True, False]
    assert not values[0, 1].any()


def normalise(team, x, weight, size, with_blocks=True, eps=1e-5):
    h = blank_activations(*x.shape)
    team.normalise(x, weight, size, eps, with_blocks, h.argument)
    return h.x, *blocks_of(h)


@pytest.mark.parametrize("tokens", TOKENS)
def test_normalise(tokens):
    """Each row on its own; the padding counts for nothing; the quantised form is that of the result."""
    size, eps = 50, 1e-5
    x, weight = random_matrix(tokens, 64) * np.float32(3), random_matrix(1, 64, seed=2)[0]
    x[:, size:], weight[size:] = 0.0, 0.0
    expected = x[:, :size] / np.sqrt((x[:, :size].astype(np.float64) ** 2).mean(axis=1, keepdims=True) + eps)
    found, *quantised_form = everywhere(lambda team: normalise(team, x, weight, size))
    np.testing.assert_allclose(found[:, :size], expected * weight[:size], rtol=3e-7)
    assert not found[:, size:].any()
    assert same_bits(tuple(quantised_form), blocks_of(activations(libraries()[0], found)))
    plain, *untouched = everywhere(lambda team: normalise(team, x, weight, size, False))
    assert same_bits(plain, found)
    assert not any(array.any() for array in untouched)


def test_normalise_of_zeros_is_zero_and_of_nan_is_nan():
    x = np.zeros((3, 32), np.float32)
    x[1, 7], x[2, 7] = np.nan, np.inf
    found = everywhere(lambda team: normalise(team, x, np.ones(32, np.float32), 32, False)[0])
    assert not found[0].any()
    assert np.isnan(found[1]).all()
    assert np.isnan(found[2, 7])


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 17, 600])
def test_sums_are_rounded_once(tokens):
    """600 tokens are enough to be shared by the threads."""
    total, bias = np.random.default_rng(4).standard_normal((tokens, 33)), random_matrix(1, 33)[0]

    def run(team):
        out = np.empty(total.shape, np.float32)
        team.round_to_float(total, out)
        x, biased = np.ones(total.shape, np.float32), np.ones(total.shape, np.float32)
        team.add_rounded(x, total)
        team.add_rounded(biased, total, bias)
        return out, x, biased

    out, x, biased = everywhere(run)
    assert np.array_equal(out, total.astype(np.float32))
    assert np.array_equal(x, np.float32(1) + total.astype(np.float32))
    assert np.array_equal(biased, x + bias)


# -- embedding and number formats ------------------------------------------------------------------------------------


def embed(w, rows):
    out = np.full((len(rows), w.columns), np.nan)
    return everywhere(lambda team: (team.library.embed_rows(w.column_parallel(), rows, out), out.copy())[1])


@pytest.mark.parametrize("weight_type", TYPES)
def test_embedding_rows_are_the_matrix_rows(weight_type):
    rows = np.array([0, 47, -1, 15, 16, 31, 5, 5])
    w, dense = packed(random_matrix(48, 96), weight_type)
    assert np.array_equal(embed(w, rows), np.where(rows[:, None] < 0, 0.0, dense[rows]))


def every_pattern(weight_type: str) -> np.ndarray:
    """What a float matrix of all 16-bit patterns holds, in their order."""
    kind = WEIGHT_TYPES[weight_type]
    patterns = EVERY_HALF.reshape(-1, 16, 32).swapaxes(1, 2)
    w = matrix(kind, np.ascontiguousarray(patterns).view(kind.lanes[0].dtype))
    return embed(w, np.arange(2**11)).reshape(-1)


def test_every_half_becomes_its_float():
    exact = EVERY_HALF.view(np.float16).astype(np.float64)
    assert np.array_equal(every_pattern("f16"), exact, equal_nan=True)


def test_every_bfloat_becomes_its_float():
    with np.errstate(invalid="ignore"):
        exact = (EVERY_HALF.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    assert np.array_equal(every_pattern("bf16"), exact, equal_nan=True)


@pytest.mark.parametrize("weight_type", ONES)
def test_every_half_is_a_scale(weight_type):
    """In an embedding and in a product."""
    kind = WEIGHT_TYPES[weight_type]
    stored = np.full((2**16, 1, 32), ONES[weight_type], kind.lanes[0].dtype)
    w = matrix(kind, *kind.pack_blocks((stored, EVERY_HALF.view(np.float16)[:, None])))
    exact = EVERY_HALF.view(np.float16).astype(np.float64)
    assert np.array_equal(embed(w, np.arange(2**16))[:, 7], exact, equal_nan=True)
    x = np.zeros((1, 32), np.float32)
    x[0, 3] = 127  # its scale is 1
    found = each_way(column_parallel, w, x)[0]
    with np.errstate(invalid="ignore"):
        assert np.array_equal(found, (127 * exact).astype(np.float32), equal_nan=True)


def test_every_exponent_is_a_scale():
    """As above, for the powers of two of mxfp4."""
    kind, exponents = WEIGHT_TYPES["mxfp4"], np.arange(256, dtype=np.uint8)
    w = matrix(kind, *kind.pack_blocks((np.full((256, 1, 32), 2, np.uint8), exponents[:, None])))  # ones
    exact = 2.0 ** (np.arange(256) - 127.0)
    with np.errstate(over="ignore"):
        assert np.array_equal(embed(w, np.arange(256))[:, 7], exact.astype(np.float32))
        x = np.zeros((1, 32), np.float32)
        x[0, 3] = 127  # its scale is 1
        assert np.array_equal(each_way(column_parallel, w, x)[0], (127 * exact).astype(np.float32))


# -- RoPE's angles ---------------------------------------------------------------------------------------------------


def angles(positions, frequencies, factor=1.0):
    shape = len(positions), len(frequencies)
    cosines, sines = np.empty(shape, np.float32), np.empty(shape, np.float32)

    def run(team):
        team.library.angles(positions, frequencies, factor, cosines, sines)
        return cosines.copy(), sines.copy()

    return everywhere(run)


def assert_rounded(found: np.ndarray, exact: np.ndarray) -> None:
    """Right but for an error of 1e-15 before the rounding to float32."""
    assert np.all(np.abs(found - exact) <= np.spacing(np.abs(found)) / 2 + 1e-15)


def test_angles_are_float32_products():
    positions = np.array([0, 1, 63, 64, 8191, 131071, 2**20 - 1], np.int32)
    frequencies = (500000.0 ** -(np.arange(0, 64, 2) / 64)).astype(np.float32)
    cosines, sines = angles(positions, frequencies)
    exact = (positions[:, None].astype(np.float32) * frequencies).astype(np.float64)
    assert_rounded(cosines, np.cos(exact))
    assert_rounded(sines, np.sin(exact))
    scaled = angles(positions, frequencies, 1.3)
    assert np.array_equal(scaled[0], cosines * np.float32(1.3))
    assert np.array_equal(scaled[1], sines * np.float32(1.3))


def test_sine_and_cosine_up_to_a_million_radians():
    near_quarters = np.arange(2**18) * (np.pi / 2)
    random = np.random.default_rng(0).uniform(0, 2**20, 100_000)
    wanted = np.concatenate([random, np.arange(2**16), near_quarters, [0.0, 1e-30, 1e-9]]).astype(np.float32)
    for sign in (1, -1):
        cosines, sines = angles(np.array([sign], np.int32), wanted)
        exact = sign * wanted.astype(np.float64)
        assert_rounded(cosines[0], np.cos(exact))
        assert_rounded(sines[0], np.sin(exact))


# -- the team --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("yields", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_meet_and_end(threads, yields):
    before = tasks()
    for library in libraries():
        team = library.team(threads, yields)
        assert len(tasks() - before) == threads - 1
        team.barriers(50)
        time.sleep(0.02)  # so long that they sleep
        team.barriers(50)
        team.close()
        team.close()
        until_tasks_are(before)


def until_tasks_are(expected: set[int]) -> None:
    """A thread that was joined may be listed for a moment yet."""
    for _ in range(1000):
        if tasks() == expected:
            break
        time.sleep(0.01)
    assert tasks() == expected


def tasks() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def test_signals_are_for_the_interpreters_thread():
    before = tasks()
    team = libraries()[0].team(2)
    (thread,) = tasks() - before
    status = dict(line.split(":\t") for line in Path(f"/proc/self/task/{thread}/status").read_text().splitlines())
    team.close()
    assert int(status["SigBlk"], 16) >> 1 & 1  # SIGINT
    assert int(status["SigBlk"], 16) >> 14 & 1  # SIGTERM


def test_threads_run_where_openmps_places_say(monkeypatch):
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one processor")
    monkeypatch.setenv("OMP_PLACES", f"{{{cpus[0]}}},{{{cpus[1]}}}")
    before = tasks()
    team = libraries()[0].team(2)
    (thread,) = tasks() - before
    where = os.sched_getaffinity(thread)
    team.close()
    assert where == {cpus[1]}
    assert os.sched_getaffinity(0) == set(cpus)


def test_touching_writes_to_each_page_once():
    for size in (1, 4096, 4097, 10 * 4096 + 5):
        expected = np.ones(size, np.uint8)
        expected[::4096] = 0
        memory = np.ones(size, np.uint8)
        assert np.array_equal(everywhere(lambda team, m=memory: (team.touch_pages(m), m.copy())[1]), expected)


def test_reading_memory_reads_all_of_it():
    memory = np.random.default_rng(0).integers(0, 256, 3 * 512 * 20 + 100, np.uint8)
    for team in teams():
        results = np.zeros(team.threads, np.int64)
        count = team.read_memory(memory, results)
        assert memory.size - 512 * team.threads < count <= memory.size
        assert np.bitwise_xor.reduce(results) == np.bitwise_xor.reduce(memory[:count].view(np.int32))


# -- the sum over ranks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_add_up_in_shared_memory(ranks):
    """Many sums one after the other, the ranks at different speeds; the order of the sum is that of the ranks."""
    addends = np.random.default_rng(ranks).standard_normal((60, ranks, 37))
    for team in teams():
        shared, found = windows_of([team] * ranks, 40), np.full_like(addends, np.nan)

        def rank(number: int, shared=shared, found=found) -> None:
            for turn, mine in enumerate(addends[:, number]):
                found[turn, number] = mine
                if turn % 7 == number:
                    time.sleep(0.001)
                posted = False
                while not shared[number].sum(found[turn, number], turn + 1, posted, 100, 100):
                    posted = True

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = addends[:, 0].copy()
        for other in range(1, ranks):
            expected += addends[:, other]
        assert np.array_equal(found, np.repeat(expected[:, None], ranks, axis=1))


def test_a_rank_that_waits_in_vain_gets_its_turn_back():
    for team in teams():
        first, second = windows_of([team] * 2, 4)
        mine, theirs = np.array([1.0, 2.0]), np.array([10.0, 20.0])
        assert not first.sum(mine, 1, False, 10, 10)
        assert list(mine) == [1.0, 2.0]
        assert second.sum(theirs, 1, False, 10, 10)
        mine[:] = np.nan  # what was posted counts
        assert first.sum(mine, 1, True, 10, 10)
        assert list(mine) == list(theirs) == [11.0, 22.0]
