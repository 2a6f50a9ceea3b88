"""Layers divided over stages: who holds what, and steps that go through them in parts."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillama.loading.model_file import open_model
from mpillama.models.cache import KVCache, cache_bytes, joint_step
from mpillama.models.config import ModelConfig
from mpillama.models.decoder import Decoder
from mpillama.models.partition import MICRO_TOKENS, Division, divide_layers, micro_batches
from mpillama.models.shapes import SHAPES
from mpillama.models.tensors import EMBEDDING, FINAL_NORM, LM_HEAD, WeightTypes
from mpillama.models.weights import slice_bytes
from mpillama.quant.registry import WEIGHT_TYPES
from tests import golden_models, running
from tests import tiny_models as models

TYPES = WeightTypes(WEIGHT_TYPES["q8_0"])


@given(
    costs=st.lists(st.integers(1, 50), min_size=1, max_size=9), outer=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    data=st.data(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_the_most_costly_stage_costs_least(costs, outer, data):
    stages = data.draw(st.integers(1, len(costs)))
    before, after = outer

    def most(borders: tuple[int, ...]) -> int:
        sums = [sum(costs[a:b]) for a, b in zip((0, *borders), (*borders, len(costs)), strict=True)]
        sums[0] += before
        sums[-1] += after
        return max(sums)

    found = divide_layers(tuple(costs), before, after, stages)
    assert [layer for own in found for layer in own] == list(range(len(costs)))
    assert all(found)
    best = min(most(borders) for borders in combinations(range(1, len(costs)), stages - 1))
    assert most(tuple(own.stop for own in found[:-1])) == best


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("ranks", "stages"), [(2, 2), (4, 2), (6, 3)])
def test_stages_hold_every_tensor_once(ranks, stages, tied):
    config = ModelConfig.from_hf({**models.AWKWARD, "num_hidden_layers": 5, "tie_word_embeddings": tied})
    division, specs = Division(ranks, None, stages), config.tensors(TYPES)
    parts, even = config.partition(division), config.partition(division.group)
    assert [part.is_last for part in parts[: division.group]] == [True] * division.group
    assert [part.is_first for part in parts[-division.group :]] == [True] * division.group
    for place, usual in enumerate(even):
        column = parts[place :: division.group]
        for spec in specs:
            holders = [part for part in column if len(spec.units_of(part))] or column[:1]
            twice = spec.name == EMBEDDING and tied
            assert len(holders) == (2 if twice else 1), spec.name
            assert all(spec.units_of(part) == spec.units_of(usual) for part in holders)
            if spec.name in (FINAL_NORM, LM_HEAD):
                assert holders == [column[0]]
        assert sum(cache_bytes(config, part, 3, "f16") for part in column) == cache_bytes(config, usual, 3, "f16")


@pytest.mark.parametrize("shape", ["llama-3.1-405b", "deepseek-r1", "qwen3-30b-a3b", "llama-3.2-1b"])
@pytest.mark.parametrize("stages", [2, 4])
def test_stages_of_real_models_are_about_equal(shape, stages):
    config = ModelConfig.from_hf(SHAPES[shape])
    specs = config.tensors(TYPES)
    sizes = [slice_bytes(specs, part) for part in config.partition(Division(stages, None, stages))]
    layer = max(slice_bytes([spec for spec in specs if spec.layer == n], config.partition(1)[0]) for n in range(9))
    assert max(sizes) - min(sizes) <= 2 * layer


def test_small_steps_stay_in_one_part():
    assert micro_batches(1000, 1) == 1
    assert [micro_batches(tokens, 2) for tokens in (1, MICRO_TOKENS, 2 * MICRO_TOKENS, 256)] == [1, 1, 2, 8]


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 20])
def test_a_step_in_parts_has_the_bits_of_the_whole(parts, model_file):
    """Three sequences together, cut anywhere."""
    check_parts(running.load(model_file("awkward", "q8_0"), 2), parts)


@pytest.mark.parametrize("parts", [2, 7])
def test_a_step_in_parts_carries_states_on(parts):
    """Of gated delta nets, which read in each part what the part before wrote."""
    check_parts(running.load_file(open_model(str(golden_models.FOLDER / "qwen3_next")), 2), parts)


def check_parts(model: Decoder, parts: int) -> None:
    tokens = np.random.default_rng(3).integers(0, 101, 20)
    starts, counts, logits = np.array([0, 0, 0]), np.array([11, 1, 8]), np.array([4, 1, 8])
    tables = np.array([[2], [0], [1]])
    whole = joint_step(tokens, starts, counts, logits, tables)
    expected = model.forward(whole, KVCache(model.config, model.part, 3, "f16", states=3))
    cache = KVCache(model.config, model.part, 3, "f16", states=3)
    borders = np.linspace(0, 20, parts + 1).astype(int)
    found = [model.forward(whole.rows(a, b), cache) for a, b in pairwise(borders)]
    np.testing.assert_array_equal(np.concatenate(found), expected)


def test_a_step_of_one_sequence_is_the_same_beside_another():
    rng, names = np.random.default_rng(1), ("token_ids", "positions", "slots", "segments", "logit_rows", "states")
    for _ in range(200):
        start, count = int(rng.integers(0, 200)), int(rng.integers(1, 100))
        tokens, logits = rng.integers(0, 101, count), int(rng.integers(0, count + 1))
        tables = np.stack([rng.permutation(10)[:6], np.arange(10, 16)])
        alone = joint_step(tokens, np.array([start]), np.array([count]), np.array([logits]), tables[:1])
        beside = joint_step(
            np.append(tokens, 0), np.array([start, 0]), np.array([count, 1]), np.array([logits, 0]), tables
        )
        for name in names:
            own, both = getattr(alone, name), getattr(beside, name)
            assert own.dtype == both.dtype
            np.testing.assert_array_equal(own, both[: len(own)])
        assert len(alone.logit_rows) == len(beside.logit_rows)
