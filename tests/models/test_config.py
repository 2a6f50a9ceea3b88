"""Reading Hugging Face configurations: spellings of transformers 4 and 5, refusals by name."""

import math
from typing import Any

import numpy as np
import pytest

from mpillama.errors import UserError
from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config import ModelConfig
from mpillama.models.mlp import Experts, GatedMlp
from mpillama.models.router import Router
from mpillama.models.shapes import SHAPES, shape_config, types_of_shape
from tests.reference import llama3_frequencies

BASE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({**BASE, **changes})


def attention(config: ModelConfig) -> Any:
    """That of the first layer."""
    return config.blocks[0].attention


def mlp(config: ModelConfig) -> Any:
    return config.blocks[0].mlp


def windows(config: ModelConfig) -> tuple[int, ...]:
    return tuple(block.attention.window for block in config.blocks)


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in BASE.items() if k != key}


def test_what_is_left_out_has_transformers_defaults():
    config = read()
    assert (attention(config).kv_heads, attention(config).head_dim, config.max_position_embeddings) == (4, 16, 2048)
    assert (config.rms_norm_eps, config.rope.theta, config.rope.scaling) == (1e-6, 10000.0, None)
    assert config.tie_word_embeddings is False


def test_null_means_left_out():
    null = dict.fromkeys(("num_key_value_heads", "head_dim", "rope_scaling", "hidden_act", "rms_norm_eps"))
    assert read(**null) == read()


def test_what_is_given_is_taken():
    config = read(num_key_value_heads=2, head_dim=32, max_position_embeddings=7, rms_norm_eps=1e-5, rope_theta=5e5)
    assert (attention(config).kv_heads, attention(config).head_dim, config.max_position_embeddings) == (2, 32, 7)
    assert (config.rms_norm_eps, config.rope.theta) == (1e-5, 5e5)
    assert read(tie_word_embeddings=True).tie_word_embeddings is True


def test_sizes_are_padded_to_blocks_of_32():
    config = read(hidden_size=200, intermediate_size=344, head_dim=20)
    assert (config.padded_hidden_size, mlp(config).padded_size, attention(config).padded_head_dim) == (224, 352, 32)


def test_transformers_5_spells_rope_as_4():
    old = read(rope_theta=5e5, rope_scaling=LLAMA3)
    new = read(rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert old == new
    assert old.rope.theta == 5e5
    assert old.rope.scaling is not None


@pytest.mark.parametrize("plain", [{}, {"rope_type": "default"}, {"type": "default"}, {"rope_type": None}])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_plain_rope_in_all_spellings(key, plain):
    assert read(**{key: plain}) == read()


def test_the_first_spelling_of_the_rope_type_is_understood():
    old = {**LLAMA3, "type": LLAMA3["rope_type"]}
    del old["rope_type"]
    assert read(rope_scaling=old) == read(rope_scaling=LLAMA3)


def test_rope_theta_inside_and_outside():
    assert read(rope_parameters={"rope_type": "default", "rope_theta": 123.0}).rope.theta == 123.0
    assert read(rope_theta=99.0, rope_parameters={"rope_type": "default"}).rope.theta == 99.0
    assert read(rope_theta=99.0, rope_parameters={"rope_theta": 123.0}).rope.theta == 123.0


def test_plain_frequencies():
    assert read(head_dim=8, rope_theta=16.0).inverse_frequencies() == pytest.approx([1, 0.5, 0.25, 0.125])


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("original", [64, 1000, 8192])
def test_llama3_frequencies(original, factor):
    """Against the formula told by turns instead of wavelengths; every branch occurs."""
    scaling = {**LLAMA3, "original_max_position_embeddings": original, "factor": factor}
    config = read(head_dim=128, rope_theta=500000.0, rope_scaling=scaling)
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    found = np.array(config.inverse_frequencies())
    np.testing.assert_allclose(found, llama3_frequencies(plain, scaling), rtol=1e-12)
    ratio = found / plain
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(1 / factor)
    assert np.sum((ratio < 0.999) & (ratio > 1.001 / factor)) >= 3
    assert np.all(np.diff(found) < 0)


def test_llama3_frequencies_at_the_ends_of_the_ramp():
    """A wavelength of exactly original / high is kept, of original / low divided."""
    scaling = read(rope_scaling=LLAMA3).rope.scaling
    for turns, kept in ((4.0, 1.0), (1.0, 0.0), (2.5, 0.5)):
        frequency = turns * 2 * math.pi / 8192
        assert scaling.apply([frequency], 1e4)[0] == pytest.approx(frequency * (kept + (1 - kept) / 8))


@pytest.mark.parametrize(
    ("name", "dense", "experts"),
    [
        ("llama-3.2-1b", "bf16", ""),
        ("glm-4.6", "fp8", "fp8"),
        ("deepseek-r1", "fp8", "fp8"),
        ("kimi-k2", "bf16", "int4/32"),
        ("gpt-oss-120b", "bf16", "mxfp4"),
        ("hy3", "fp8", "fp8"),
        ("qwen3.5-397b", "fp8", "fp8"),
    ],
)
def test_shapes_as_they_are_published(name, dense, experts):
    config = ModelConfig.from_hf(shape_config(name))
    specs = {s.name: s for s in config.tensors(types_of_shape(name, "as-published", config))}
    last = f"model.layers.{config.num_hidden_layers - 1}."
    assert specs["model.embed_tokens.weight"].weight_type.name == "bf16"
    assert specs[last + "self_attn.o_proj.weight"].weight_type.name == dense
    found = {s.weight_type.name for s in specs.values() if s.experts}
    assert found - {"f32"} == ({experts} if experts else set())
    kept = {s.weight_type.name for name, s in specs.items() if ".in_proj_a." in name or ".in_proj_b." in name}
    assert kept <= {"bf16"}
    assert types_of_shape(name, "as-stored", config).default.name == "q4_0"


@pytest.mark.parametrize("name", list(SHAPES))
def test_known_shapes_are_configurations(name):
    config = ModelConfig.from_hf(shape_config(name))
    assert config.rope.scaling is not None or "rope_scaling" not in shape_config(name)
    assert isinstance(config.blocks[-1].mlp, Experts) == ("num_experts_per_tok" in shape_config(name))


def test_an_unknown_shape_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"llama-9.*llama-3\.1-8b"):
        shape_config("llama-9")


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
@pytest.mark.parametrize("value", [None, 0, -4, 1.5, "64", True, [64], 2**40, 10**30, math.inf, math.nan])
def test_an_impossible_size_is_named(key, value):
    with pytest.raises(UserError, match=f"{key}="):
        read(**{key: value})


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_a_missing_size_is_named(key):
    with pytest.raises(UserError, match=f"{key}=None"):
        ModelConfig.from_hf(without(key))


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1.0, "1e-5", math.inf, math.nan, False])
def test_an_impossible_constant_is_named(key, value):
    with pytest.raises(UserError, match=f"{key}="):
        read(**{key: value})


@pytest.mark.parametrize(
    "model_type",
    ["gemma", "gpt2", None, 3, "minimax_m3", "minimax_m3_vl", "deepseek_v4", "kimi_k3"],
)
def test_another_architecture_is_named(model_type):
    with pytest.raises(UserError, match=rf"model_type={model_type!r}.*llama"):
        ModelConfig.from_hf({**BASE, "model_type": model_type})


def test_a_configuration_without_model_type_is_refused():
    with pytest.raises(UserError, match="model_type=None"):
        ModelConfig.from_hf(without("model_type"))


def test_another_activation_is_named():
    with pytest.raises(UserError, match=r"hidden_act='gelu'.*silu"):
        read(hidden_act="gelu")


@pytest.mark.parametrize("kind", ["dynamic", "proportional", "mrope"])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_another_rope_scaling_is_named(key, kind):
    with pytest.raises(UserError, match=f"rope_type='{kind}'.*llama3"):
        read(**{key: {"rope_type": kind, "factor": 2.0}})


@pytest.mark.parametrize("key", [k for k in LLAMA3 if k != "rope_type"])
@pytest.mark.parametrize("value", [None, 0, -1, "8"])
def test_an_impossible_rope_constant_is_named(key, value):
    with pytest.raises(UserError, match=f"{key}="):
        read(rope_scaling={**LLAMA3, key: value})


def test_equal_ends_of_the_ramp_are_no_division_by_zero():
    """Either refused, or numbers."""
    try:
        config = read(rope_scaling={**LLAMA3, "low_freq_factor": 4.0}, head_dim=128)
    except UserError:
        return
    assert np.isfinite(config.inverse_frequencies()).all()


def test_heads_that_do_not_share_evenly_are_named():
    with pytest.raises(UserError, match=r"num_attention_heads=4.*num_key_value_heads=3"):
        read(num_key_value_heads=3)


def test_an_odd_head_size_is_named():
    with pytest.raises(UserError, match="head_dim=15"):
        read(head_dim=15)


def test_more_heads_than_channels_are_refused():
    with pytest.raises(UserError, match="head_dim=0"):
        read(hidden_size=2)


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_biases_that_a_family_lacks_are_refused_by_name(key):
    """A checkpoint with biases gives wrong answers if they are left out."""
    with pytest.raises(UserError, match=key):
        read(model_type="mistral", num_key_value_heads=2, **{key: True})
    plain = read(model_type="mistral", num_key_value_heads=2)
    assert read(model_type="mistral", num_key_value_heads=2, **{key: False}) == plain


def test_biases_of_llama():
    plain, biased = read(), read(attention_bias=True, mlp_bias=True)
    assert not attention(plain).qkv_bias
    assert not attention(plain).output_bias
    assert not mlp(plain).bias
    assert attention(biased).qkv_bias
    assert attention(biased).output_bias
    assert mlp(biased).bias


# -- families ------------------------------------------------------------------------------------------------------


def test_qwen2_has_biases_on_queries_keys_and_values():
    config = read(model_type="qwen2", num_key_value_heads=2)
    assert attention(config) == GroupedQueryAttention(4, 2, 16, qkv_bias=True)
    assert not mlp(config).bias


def test_sliding_windows():
    assert windows(read(sliding_window=7)) == (0, 0)  # Llama has none
    assert windows(read(model_type="mistral", num_key_value_heads=2)) == (4096, 4096)
    assert windows(read(model_type="mistral", num_key_value_heads=2, sliding_window=None)) == (0, 0)
    qwen = {"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 8, "use_sliding_window": True}
    assert windows(read(**qwen, max_window_layers=1)) == (0, 8)
    assert windows(read(**qwen, layer_types=["sliding_attention", "full_attention"])) == (8, 0)
    assert windows(read(**{**qwen, "use_sliding_window": False})) == (0, 0)
    with pytest.raises(UserError, match="layer_types"):
        read(**qwen, layer_types=["linear_attention"] * 2)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_experts(key):
    config = read(
        model_type="qwen3_moe", num_key_value_heads=2, **{key: 8}, num_experts_per_tok=2, moe_intermediate_size=48
    )
    assert mlp(config) == Experts(48, router=Router(8, chosen=2))
    with pytest.raises(UserError, match="num_experts_per_tok=9"):
        read(model_type="qwen3_moe", num_key_value_heads=2, **{key: 8}, num_experts_per_tok=9, moe_intermediate_size=48)
    for other in ({"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}):
        with pytest.raises(UserError, match=next(iter(other))):
            read(
                model_type="qwen3_moe",
                num_key_value_heads=2,
                **{key: 8},
                num_experts_per_tok=2,
                moe_intermediate_size=48,
                **other,
            )


def test_yarn_and_linear_frequencies():
    """The ends are those of the paper: the fastest pair stays, the slowest is divided."""
    plain = np.array(read(head_dim=64).inverse_frequencies())
    linear = read(head_dim=64, rope_scaling={"rope_type": "linear", "factor": 4.0})
    np.testing.assert_allclose(linear.inverse_frequencies(), plain / 4)
    yarn = read(head_dim=64, rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512})
    found = np.array(yarn.inverse_frequencies())
    assert found[0] == plain[0]
    assert found[-1] == pytest.approx(plain[-1] / 4)
    assert yarn.rope.factor == pytest.approx(0.1 * math.log(4) + 1)
    assert linear.rope.factor == 1.0


# -- RoPE as transformers 5.24 reads it ----------------------------------------------------------------------------

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def test_a_rope_scaling_stands_in_the_place_of_rope_parameters():
    plain = {"rope_type": "default", "rope_theta": 5e5}
    assert read(rope_parameters=plain, rope_scaling=LINEAR) == read(rope_scaling=LINEAR)  # its rope_theta goes as well
    assert read(rope_parameters=plain, rope_scaling=LINEAR, rope_theta=7e3) == read(rope_scaling=LINEAR, rope_theta=7e3)
    assert read(rope_parameters=plain, rope_scaling={**LINEAR, "rope_theta": 3e3}).rope.theta == 3e3
    assert read(rope_parameters={**LINEAR, "rope_theta": 5e5}, rope_scaling={}).rope.theta == 5e5
    assert read(rope_parameters={**LINEAR, "rope_theta": 5e5}, rope_scaling=None).rope.scaling is not None


def test_the_constants_of_yarn_that_may_be_left_out():
    context = {"max_position_embeddings": 4096}
    ratio = read(**context, rope_scaling={**YARN, "factor": None})
    assert ratio == read(**context, rope_scaling={**YARN, "factor": 8.0})
    without = {k: v for k, v in YARN.items() if not k.startswith("original")}
    whole = {**YARN, "original_max_position_embeddings": 4096}
    assert read(**context, rope_scaling=without) == read(**context, rope_scaling=whole)


@pytest.mark.parametrize("scaling", [YARN, LLAMA3])
def test_an_original_context_beside_the_rule_is_the_one_that_counts(scaling):
    inside = {**scaling, "original_max_position_embeddings": 1024}
    assert read(rope_scaling=scaling, original_max_position_embeddings=1024) == read(rope_scaling=inside)


def test_the_attention_factor_of_yarn():
    own = 0.1 * math.log(4) + 1
    assert read(rope_scaling=YARN).rope.factor == pytest.approx(own)
    assert read(rope_scaling={**YARN, "attention_factor": 1.0}).rope.factor == 1.0
    assert read(rope_scaling={**YARN, "attention_factor": 1.25, "mscale": 2.0}).rope.factor == 1.25
    assert read(rope_scaling={**YARN, "mscale": 0.7}).rope.factor == pytest.approx(own)
    both = read(rope_scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 1.0})
    assert both.rope.factor == pytest.approx((0.07 * math.log(4) + 1) / own)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("rule", "field", "value"),
    [
        ({}, "factor", 4.0),
        (LINEAR, "low_freq_factor", 2.0),
        (LINEAR, "original_max_position_embeddings", 512),
        (LLAMA3, "attention_factor", 1.5),
        (YARN, "attn_factor", 1.5),
        (YARN, "extrapolation_factor", 0.5),
        (YARN, "mrope_section", [16, 24, 24]),
        (LINEAR, "partial_rotary_factor", 0.5),
        (LINEAR, "full_attention", {"rope_type": "linear", "factor": 2.0}),
        (LINEAR, "use_dynamic", True),
    ],
)
def test_a_field_of_a_rule_that_nobody_reads_is_named(key, rule, field, value):
    with pytest.raises(UserError, match=f"{field}="):
        read(**{key: {**rule, field: value}})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_interleaved", True),
        ("use_mrope", True),
        ("partial_rotary_factor", 0.25),
        ("rotary_pct", 0.5),
        ("rope_ratio", 8),
        ("rotary_emb_base", 0),
        ("rope_local_base_freq", 1e4),
        ("yarn", {"factor": 4.0}),
    ],
)
def test_a_field_beside_the_rule_that_nobody_reads_is_named(field, value):
    with pytest.raises(UserError, match=f"{field}="):
        read(**{field: value})


@pytest.mark.parametrize("field", ["rope_interleaved", "use_mrope", "partial_rotary_factor", "rope_ratio"])
def test_fields_that_change_nothing_are_no_obstacle(field):
    value = 1.0 if field in ("partial_rotary_factor", "rope_ratio") else False
    assert read(**{field: value}) == read(**{field: None}) == read()
    assert read(rope_scaling={**LINEAR, field: value, "finetuned": True}) == read(rope_scaling=LINEAR)


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_a_rule_is_refused_in_the_words_of_the_file(spelling):
    with pytest.raises(UserError, match=f" {spelling}='dynamic'") as caught:
        read(rope_scaling={spelling: "dynamic", "factor": 2.0})
    assert "factors" not in str(caught.value), "a name of our own"


@pytest.mark.parametrize("rope", [[LINEAR], "linear", 4.0])
def test_rope_that_is_no_object_is_named(rope):
    with pytest.raises(UserError, match="rope_scaling="):
        read(rope_scaling=rope)


@pytest.mark.parametrize("key", ["factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"])
@pytest.mark.parametrize("value", ["1", -1.0, True, [1.0], math.inf])
def test_an_impossible_constant_of_yarn_is_named(key, value):
    with pytest.raises(UserError, match=f"{key}="):
        read(rope_scaling={**YARN, key: value})


PHI = {"model_type": "phi3", "max_position_embeddings": 1024, "original_max_position_embeddings": 256}
LONGROPE = {
    "short_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
}


@pytest.mark.parametrize("kind", [{"type": "longrope"}, {"rope_type": "longrope"}, {"type": "su"}])
def test_longrope_divides_by_the_factors_of_the_context(kind):
    config = read(**PHI, rope_scaling={**kind, **LONGROPE})
    plain = np.array(read().inverse_frequencies())
    assert (config.max_position_embeddings, config.longest_context) == (256, 1024)
    assert config.rope.factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(256)))
    for context, factors in ((None, "short"), (256, "short"), (257, "long")):
        found = config.for_context(context).inverse_frequencies()
        np.testing.assert_allclose(found, plain / LONGROPE[f"{factors}_factor"])
    assert read(rope_theta=3.0).for_context(10**6) == read(rope_theta=3.0)


def test_longrope_of_another_number_of_factors_is_refused():
    for key in LONGROPE:
        with pytest.raises(UserError, match="RoPE"):
            read(**PHI, rope_scaling={"type": "longrope", **LONGROPE, key: [1.0, 2.0]})


def test_a_part_of_the_channels_is_turned():
    config = read(**PHI, partial_rotary_factor=0.75)
    assert config.rotations[0].channels == 12
    assert len(config.inverse_frequencies()) == 6
    assert config.rotations == read(**PHI, rope_parameters={"partial_rotary_factor": 0.75}).rotations
    with pytest.raises(UserError, match="partial_rotary_factor"):
        read(partial_rotary_factor=0.75)  # Llama has none


def test_layers_with_windows_may_have_a_rope_of_their_own():
    old = read(
        model_type="gemma3_text", num_hidden_layers=3, sliding_window_pattern=3, head_dim=8, rope_theta=2e5,
        rope_local_base_freq=300.0, rope_scaling={"rope_type": "linear", "factor": 8.0},
    )  # fmt: skip
    both = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e5},
    }
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    new = read(model_type="gemma3_text", num_hidden_layers=3, layer_types=kinds, head_dim=8, rope_parameters=both)
    assert old == new
    assert [old.rotation_of(block).rope.theta for block in old.blocks] == [300.0, 300.0, 2e5]
    assert windows(old) == (4096, 4096, 0)
    local, distant = (rotation.inverse_frequencies() for rotation in old.rotations)
    np.testing.assert_allclose(local, 300.0 ** -(np.arange(0, 8, 2) / 8))
    np.testing.assert_allclose(distant, 2e5 ** -(np.arange(0, 8, 2) / 8) / 8)


def test_queries_grow_with_their_position():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.5}
    factors = read(model_type="ministral3", num_key_value_heads=4, rope_parameters=rope).rope.query_factors
    assert [factors.at(position) for position in (0, 15, 16, 47)] == [
        1.0, 1.0, 1 + 0.5 * math.log(2), 1 + 0.5 * math.log(3),
    ]  # fmt: skip


# -- latent attention -------------------------------------------------------------------------------------------------

LATENT = {
    "model_type": "deepseek_v3", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 5, "kv_lora_rank": 40, "q_lora_rank": 33, "n_routed_experts": 8, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
MAGNITUDE = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0}


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2"])
def test_latent_attention_and_experts_behind_dense_layers(model_type):
    first, second, third = ModelConfig.from_hf({**LATENT, "model_type": model_type}).blocks
    assert first.attention == third.attention
    assert (first.attention.q_rank, first.attention.kv_rank, first.attention.cache_width) == (33, 40, 64 + 64)
    assert isinstance(first.mlp, GatedMlp)
    assert not isinstance(first.mlp, Experts)
    assert second.mlp == third.mlp
    router = second.mlp.router
    assert (router.groups, router.chosen_groups, router.scaling, router.correction) == (2, 1, 2.5, True)
    assert second.mlp.shared.intermediate_size == 2048


def test_queries_may_come_without_compression():
    assert ModelConfig.from_hf({**LATENT, "q_lora_rank": None}).blocks[0].attention.q_rank == 0
    assert (
        ModelConfig.from_hf({k: v for k, v in LATENT.items() if k != "q_lora_rank"}).blocks[0].attention.q_rank == 1536
    )


def test_the_magnitude_of_yarn_squared_scales_the_scores_of_latent_attention():
    """As transformers: 192^-0.5 * (0.1 * ln 40 + 1)^2 in DeepSeek V3."""
    scaled = ModelConfig.from_hf({**LATENT, "rope_scaling": {**MAGNITUDE, "mscale_all_dim": 1.0}})
    assert scaled.blocks[0].attention.softmax_factor == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert scaled.rope.factor == 1.0
    plain = ModelConfig.from_hf({**LATENT, "rope_scaling": MAGNITUDE})
    assert plain.blocks[0].attention.softmax_factor == 1.0
    assert plain.rope.factor == pytest.approx(0.1 * math.log(40) + 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scoring_func", "softmax"),
        ("topk_method", "group_limited_greedy"),
        ("moe_layer_freq", 2),
        ("attention_bias", True),
        ("qk_rope_head_dim", 7),
        ("hidden_act", "gelu"),
        ("n_group", 3),
        ("index_topk", 2048),
    ],
)
def test_variants_of_deepseek_that_nobody_runs_are_refused_by_name(key, value):
    with pytest.raises(UserError, match=f"{key}={value!r}"):
        ModelConfig.from_hf({**LATENT, key: value})


@pytest.mark.parametrize(("layers", "dense"), [(1, 1), (2, 1), (3, 1), (20, 1), (60, 3), (61, 3)])
def test_some_layers_are_of_every_kind_in_proportion(layers, dense):
    whole = ModelConfig.from_hf(shape_config("deepseek-r1"))
    some = whole.some_layers(layers).blocks
    assert len(some) == layers
    assert [isinstance(block.mlp, Experts) for block in some] == [False] * dense + [True] * (layers - dense)
    alike = ModelConfig.from_hf(shape_config("llama-3.2-1b"))
    assert alike.some_layers(2) == alike.first_layers(2)
