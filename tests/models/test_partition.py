"""Who owns what: every unit once, for any number of ranks, in exact whole numbers."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillama.formats.native.reader import TableEntry
from mpillama.models.cache import cache_bytes
from mpillama.models.config import ModelConfig
from mpillama.models.mlp import ffn_panel
from mpillama.models.partition import Split, split_units
from mpillama.models.shapes import SHAPES
from mpillama.models.tensors import TensorSpec, WeightTypes
from mpillama.models.weights import arena_bytes, slice_bytes, slice_shapes
from mpillama.quant.registry import WEIGHT_TYPES
from mpillama.quant.weight_type import LANES
from tests import tiny_models as models

LLAMA_405B = SHAPES["llama-3.1-405b"]


def assert_covers(ranges: list[range], units: int) -> None:
    """The ranges follow each other from 0 to `units`."""
    assert ranges[0].start == 0
    assert ranges[-1].stop == units
    assert all(a.stop == b.start and a.start <= a.stop for a, b in pairwise(ranges))


@given(units=st.integers(0, 10**15), size=st.integers(1, 2000))
@settings(max_examples=200, deadline=None)
def test_equal_ranks_differ_by_at_most_one(units, size):
    ranges = split_units(units, size)
    assert len(ranges) == size
    assert_covers(ranges, units)
    lengths = [len(r) for r in ranges]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


@given(
    units=st.integers(0, 10**9),
    shares=st.lists(st.floats(0, 1e6) | st.integers(0, 100), min_size=1, max_size=50).filter(lambda w: sum(w) > 0),
)
@settings(max_examples=200, deadline=None)
def test_weights_share_units_in_proportion(units, shares):
    ranges = split_units(units, len(shares), shares)
    assert len(ranges) == len(shares)
    assert_covers(ranges, units)
    for mine, share in zip(ranges, shares, strict=True):
        assert abs(len(mine) - units * share / sum(shares)) <= 1 + 1e-6 * units


def test_a_rank_of_weight_zero_gets_nothing():
    assert [len(r) for r in split_units(10, 4, [0, 1, 0, 4])] == [0, 2, 0, 8]


@given(size=st.integers(1, 10**9))
def test_panels_divide_the_padded_ffn(size):
    panel = ffn_panel(size)
    padded = -(-size // 32) * 32
    assert panel in (32, 64, 128)
    assert padded % panel == 0
    assert panel == 128 or padded % (2 * panel)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Any Llama shape, up to a few hundred heads."""
    kv_heads = draw(st.integers(1, 40))
    source = {
        "model_type": "llama",
        "hidden_size": draw(st.integers(1, 3000)),
        "intermediate_size": draw(st.integers(1, 9000)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": kv_heads * draw(st.integers(1, 16)),
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 100)),
        "vocab_size": draw(st.integers(1, 5000)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    return ModelConfig.from_hf(source)


def splits_of(config: ModelConfig) -> tuple[Split, ...]:
    """By query heads and by KV heads."""
    return config.blocks[0].attention.splits


@given(config=configs(), size=st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_a_rank_has_the_kv_heads_of_its_query_heads_and_no_others(config, size):
    parts = config.partition(size)
    queries, keys = splits_of(config)
    assert_covers([part[queries] for part in parts], queries.count)
    for part in parts:
        assert set(part[keys]) == {head // (queries.count // keys.count) for head in part[queries]}
    for a, b in pairwise([part[keys] for part in parts if part[queries]]):
        assert b.start in (a.stop, a.stop - 1)


@given(config=configs(), size=st.integers(1, 600))
@settings(max_examples=50, deadline=None)
def test_ranks_are_idle_only_where_there_are_more_ranks_than_units(config, size):
    parts, busy = config.partition(size), config.most_busy_ranks
    assert any(p.is_idle() for p in parts) == (size > busy)


@given(config=configs(), size=st.integers(1, 60), weight_type=st.sampled_from(list(WEIGHT_TYPES)))
@settings(max_examples=100, deadline=None)
def test_the_slices_of_all_ranks_cover_every_tensor_once(config, size, weight_type):
    parts = config.partition(size)
    for spec in config.tensors(WeightTypes(WEIGHT_TYPES[weight_type])):
        ranges = [spec.units_of(p) for p in parts]
        if spec.split is None:
            assert all(r == range(1) for r in ranges)
        elif spec.split.group > 1:
            assert {u for r in ranges for u in r} == set(range(spec.units))
        else:
            assert_covers(ranges, spec.units)
        assert_extents_are_the_units(spec, ranges)


def assert_extents_are_the_units(spec: TensorSpec, ranges: list[range]) -> None:
    """Each array's extents lie inside it, a unit takes the same bytes everywhere, neighbours touch."""
    for array in spec.arrays():
        entry = TableEntry(array, 4096, None)
        assert array.shape[0] == spec.units * array.entries
        whole = entry.extent(range(spec.units))
        assert whole == (4096, entry.bytes)
        for mine in ranges:
            offset, count = entry.extent(mine)
            assert offset == 4096 + mine.start * entry.bytes // spec.units
            assert count == len(mine) * entry.bytes // spec.units
            assert offset + count <= sum(whole)


@given(config=configs(), size=st.integers(1, 60), weight_type=st.sampled_from(list(WEIGHT_TYPES)))
@settings(max_examples=50, deadline=None)
def test_a_slice_is_what_the_ranks_arrays_hold(config, size, weight_type):
    kind = WEIGHT_TYPES[weight_type]
    specs = config.tensors(WeightTypes(kind))
    for part in config.partition(size):
        for spec in specs:
            rows, runs, columns = len(spec.units_of(part)) * spec.unit, 1, spec.columns
            if spec.panel:
                rows, runs, columns = spec.rows, len(spec.units_of(part)), spec.panel
            expected = 4 * rows if spec.vector else rows // LANES * runs * kind.group_bytes(columns)
            assert slice_bytes([spec], part) == expected
        assert 0 <= arena_bytes(specs, part) - slice_bytes(specs, part) < 4096 * len(kind.lanes) * len(specs)


def test_two_ranks_hold_the_kv_head_at_their_border():
    """10 heads in 5 groups of 2 over 3 ranks: 4, 3, 3; heads 6 and 7 share KV head 3."""
    config = ModelConfig.from_hf(models.AWKWARD)
    assert [part[splits_of(config)[1]] for part in config.partition(3)] == [range(2), range(2, 4), range(3, 5)]


def test_more_ranks_than_units_leave_the_last_ones_idle():
    config = ModelConfig.from_hf(models.AWKWARD)
    parts, (queries, keys) = config.partition(12), splits_of(config)
    assert [len(part[queries]) for part in parts] == [1] * 10 + [0] * 2
    assert [len(part[config.blocks[0].mlp.splits[0]]) for part in parts] == [1] * 11 + [0]
    assert [part[keys] for part in parts[-2:]] == [range(0)] * 2


def is_exact(value: object) -> bool:
    """An arbitrary-size integer, not NumPy's."""
    return type(value) is int


@pytest.mark.parametrize("weight_type", list(WEIGHT_TYPES))
@pytest.mark.parametrize("factor", [1, 10])
def test_sizes_are_exact_whole_numbers_for_ten_times_llama_405b(weight_type, factor):
    """Hidden and FFN sizes, layers and vocabulary times 10: tensors of up to 100 times the elements."""
    scaled = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
    config = ModelConfig.from_hf({**LLAMA_405B, **{key: factor * LLAMA_405B[key] for key in scaled}})
    specs, offset, elements = config.tensors(WeightTypes(WEIGHT_TYPES[weight_type])), 0, 0
    parts = config.partition(7)
    for spec in specs:
        rows, columns = spec.rows, spec.columns
        elements += rows * columns
        for array in spec.arrays():
            entry = TableEntry(array, offset, None)
            assert all(map(is_exact, (*array.shape, entry.bytes, entry.entry_bytes)))
            for part in (parts[0], parts[-1]):
                start, count = entry.extent(spec.units_of(part))
                assert is_exact(start)
                assert is_exact(count)
                assert offset <= start <= start + count <= offset + entry.bytes
            offset += entry.bytes
        assert all(is_exact(n) for part in parts for _, shape in slice_shapes(spec, part) for n in shape)
    bits = {
        "f32": 32,
        "f16": 16,
        "bf16": 16,
        "q8_0": 8.5,
        "q4_0": 4.5,
        "q5_0": 5.5,
        "iq4_nl": 4.5,
        "mxfp4": 4.25,
        "q4_1": 5,
        "q5_1": 6,
        "q2_k": 2.625,
        "q3_k": 3.4375,
        "q4_k": 4.5,
        "q5_k": 5.5,
        "q6_k": 6.5625,
        "iq4_xs": 4.25,
        "fp8": 8,
        "int8": 8,
        "int4": 4,
        "int4_f16": 4,
        "int4_bf16": 4,
        "nvfp4": 4.5,
    }[weight_type]
    norms = sum(s.rows for s in specs if s.vector)
    least = (elements - norms) * bits + 32 * norms
    if len({array.unit for array in WEIGHT_TYPES[weight_type].lanes}) == 1:
        assert offset * 8 == least
    else:  # what several blocks have in common is there again for each panel of 128 columns
        assert least <= offset * 8 < 1.09 * least
    # Ranks at a border hold a KV head twice.
    assert offset <= sum(slice_bytes(specs, p) for p in parts) < 1.03 * offset + 7 * 4 * norms
    assert is_exact(cache_bytes(config, parts[0], 10**7, "f16"))
    assert elements > 4e11 * factor**3 * 0.9
