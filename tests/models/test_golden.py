"""Every family against the logits of transformers, read from a folder, a GGUF, a .m file and a native file."""

import json
import math

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from mpillama.errors import UserError
from mpillama.loading.model_file import ModelFile, open_model
from mpillama.models.weights import slice_shapes
from mpillama.quant.registry import STORED_TYPES, WEIGHT_TYPES
from tests import golden_models as g
from tests import running
from tests.conftest import THREADS

F32_TOLERANCE = 1e-5  # of the largest logit; measured: 1e-6
BOUNDS = {"f16": 2e-3, "bf16": 2e-2, "q8_0": 0.1, "q4_0": 0.8}
"""As above, for weights rounded to a type; measured for Mixtral, where a router may choose otherwise: 0.07 for q8_0,
0.58 for q4_0."""
BLOCKS_TOLERANCE = 0.03  # of the largest logit, for activations in int8
NOT_IN_GGUF = ("llama_yarn", "llama_linear", "mistral", "ministral", "llama_bias", "kimi_k2", "llama4")
IN_GGUF = tuple(f for f in g.FAMILIES if f not in NOT_IN_GGUF)
IN_DLLAMA = ("llama", "qwen3", "qwen3_moe")


def logits(model: ModelFile, family: str) -> np.ndarray:
    return running.all_logits(running.load_file(model, THREADS), [g.golden(family)[0]])


def error(found: np.ndarray, family: str) -> float:
    expected = g.golden(family)[1]
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("family", g.FAMILIES)
def test_a_folder_gives_the_logits_of_transformers(family):
    model = open_model(str(g.FOLDER / family), "f32")
    assert error(logits(model, family), family) < F32_TOLERANCE


@pytest.mark.parametrize("family", [family for family in g.FAMILIES if g.golden_experts(family) is not None])
def test_experts_are_those_that_transformers_chooses(family):
    """Exactly, in every layer and for every token."""
    model = running.load_file(open_model(str(g.FOLDER / family), "f32"), THREADS)
    assert np.array_equal(running.chosen_experts(model, g.golden(family)[0]), g.golden_experts(family))


@pytest.mark.parametrize("family", [family for family in g.FAMILIES if g.golden_positions(family) is not None])
def test_positions_are_those_that_transformers_chooses(family):
    """Exactly, by every indexer and for every token that must choose."""
    model = running.load_file(open_model(str(g.FOLDER / family), "f32"), THREADS)
    found, expected = running.chosen_positions(model, g.golden(family)[0]), g.golden_positions(family)
    first = expected.shape[2]
    assert np.array_equal(found[:, first:], expected[:, first:])
    assert first < len(g.golden(family)[0]) // 4


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_head_of_its_own_is_used_though_the_configuration_ties_it(prefix, tmp_path):
    """Transformers gives these logits for such a folder, too."""
    config = json.loads((g.FOLDER / "llama" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = {name.replace("model.", prefix, 1): tensor for name, tensor in g.family_tensors("llama").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert error(logits(open_model(str(tmp_path), "f32"), "llama"), "llama") < F32_TOLERANCE


def test_a_context_beyond_the_original_takes_longropes_other_factors(tmp_path):
    """For all positions, as transformers does with a prompt of so many tokens; a run that does not ask stays within."""
    model = open_model(str(g.FOLDER / "phi3_beyond"), "f32")
    assert (model.config.max_position_embeddings, model.config.longest_context) == (8, 512)
    found = running.all_logits(running.load_file(model, THREADS, 16), [g.golden("phi3_beyond")[0]])
    assert error(found, "phi3_beyond") < F32_TOLERANCE
    g.write_gguf(tmp_path / "model.gguf", "phi3_beyond", g.as_float32)
    again = running.load_file(open_model(str(tmp_path / "model.gguf")), THREADS, 16)
    assert np.array_equal(running.all_logits(again, [g.golden("phi3_beyond")[0]]), found)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize(("family", "outer"), [("gemma3", "gemma3"), ("ministral3", "mistral3")])
def test_a_language_model_within_one_that_sees(family, outer, prefix, tmp_path, caplog):
    """Under its older and newer names; what sees is left out, with a warning."""
    inner = json.loads((g.FOLDER / family / "config.json").read_text())
    ends = {key: inner.pop(key) for key in ("eos_token_id", "bos_token_id", "tie_word_embeddings")}
    config = {"model_type": outer, "text_config": inner, "vision_config": {"hidden_size": 8}, **ends}
    (tmp_path / "config.json").write_text(json.dumps(config))
    head = prefix.removesuffix("model.") if prefix.endswith(".model.") else ""
    tensors = {
        name.replace("model.", prefix, 1) if name.startswith("model.") else head + name: tensor
        for name, tensor in g.stored_tensors(family).items()
    }
    seeing = dict.fromkeys(("vision_tower.x.weight", "multi_modal_projector.norm.weight"), np.ones((2, 3), np.float32))
    save_file({**tensors, **seeing}, tmp_path / "model.safetensors")
    assert error(logits(open_model(str(tmp_path), "f32"), family), family) < F32_TOLERANCE
    assert "2 tensors" in caplog.text
    assert open_model(str(tmp_path)).config_json["eos_token_id"] == ends["eos_token_id"]


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_the_language_model_of_qwen_is_taken_out_of_its_folder(family, tmp_path):
    """As it is published: what sees is called visual, and what drafts tokens stands beside both."""
    inner = json.loads((g.FOLDER / family / "config.json").read_text())
    inner["rope_parameters"] |= {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
    config = {"model_type": family, "text_config": inner, "tie_word_embeddings": inner["tie_word_embeddings"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (g.FOLDER / family / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8:start]), whole[start:]
    names = {name: name.replace("model.", "model.language_model.", 1) for name in header}
    header = {names[name]: described for name, described in header.items()}
    for name in ("model.visual.merger.norm.weight", "mtp.fc.weight"):
        header[name] = {"dtype": "F32", "shape": [3], "data_offsets": [len(data), len(data) + 12]}
        data += bytes(12)
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    found = logits(open_model(str(tmp_path), "f32"), family)
    assert np.array_equal(found, logits(open_model(str(g.FOLDER / family), "f32"), family))


@pytest.mark.parametrize("weights", list(BOUNDS))
@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_weights_in_other_types_stay_near(family, weights):
    assert error(logits(open_model(str(g.FOLDER / family), weights), family), family) < BOUNDS[weights]


@pytest.mark.parametrize("family", g.FAMILIES)
def test_tokens_one_by_one_give_the_same_bits(family):
    model, ids = running.load_file(open_model(str(g.FOLDER / family)), THREADS), g.golden(family)[0]
    assert np.array_equal(running.all_logits(model, [ids]), running.all_logits(model, running.cut(ids, 1)))


@pytest.mark.parametrize("family", IN_GGUF)
def test_a_gguf_gives_the_same_bits_as_the_folder(family, tmp_path):
    g.write_gguf(tmp_path / "model.gguf", family, g.as_float32)
    found = logits(open_model(str(tmp_path / "model.gguf")), family)
    if family == "llama3":  # the frequencies come as float32 divisors
        assert error(found, family) < F32_TOLERANCE
    else:
        assert np.array_equal(found, logits(open_model(str(g.FOLDER / family), "f32"), family))


def test_a_gguf_with_kv_b_in_one_piece_gives_the_same_bits(tmp_path):
    g.write_gguf(tmp_path / "model.gguf", "deepseek_v3", g.as_float32, old=True)
    found = logits(open_model(str(tmp_path / "model.gguf")), "deepseek_v3")
    assert np.array_equal(found, logits(open_model(str(g.FOLDER / "deepseek_v3"), "f32"), "deepseek_v3"))


@pytest.mark.parametrize(
    ("family", "name"),
    [("deepseek_v3", "kv_b_proj.weight"), ("deepseek_v3", "kv_a_layernorm.weight"), ("qwen2", "q_proj.bias")],
)
def test_what_is_missing_is_named(family, name, tmp_path):
    """Of a matrix in two parts the first of them."""
    (tmp_path / "config.json").write_text((g.FOLDER / family / "config.json").read_text())
    kept = {key: tensor for key, tensor in g.family_tensors(family).items() if f"1.self_attn.{name}" not in key}
    save_file(kept, tmp_path / "model.safetensors")
    shown = name.replace("kv_b", "k_b")
    with pytest.raises(UserError, match=rf"1\.self_attn\.{shown}' is missing"):
        open_model(str(tmp_path))


def test_kimi_within_a_model_that_also_sees_gives_the_same_bits(tmp_path):
    """As Kimi K2.5 and later are published."""
    inner = json.loads((g.FOLDER / "kimi_k2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": inner}))
    tensors = {f"language_model.{name}": tensor for name, tensor in g.family_tensors("kimi_k2").items()}
    others = {name: np.ones((4, 8), np.float32) for name in ("vision_tower.encoder.weight", "mm_projector.pre.weight")}
    save_file({**tensors, **others}, tmp_path / "model.safetensors")
    found = logits(open_model(str(tmp_path), "f32"), "kimi_k2")
    assert np.array_equal(found, logits(open_model(str(g.FOLDER / "kimi_k2"), "f32"), "kimi_k2"))


@pytest.mark.parametrize("name", ["model.layers.3.eh_proj.weight", "mtp.0.fc.weight", "model.mtp.norm.weight"])
def test_layers_that_only_draft_tokens_are_left_out_and_told(name, tmp_path, caplog):
    """As in transformers; a layer that the configuration does not count is refused."""
    config = json.loads((g.FOLDER / "hy_v3" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    tensors = dict(g.family_tensors("hy_v3"))
    save_file({**tensors, name: np.ones((4, 8), np.float32)}, tmp_path / "model.safetensors")
    with caplog.at_level("INFO", "mpillama"):
        found = logits(open_model(str(tmp_path), "f32"), "hy_v3")
    assert np.array_equal(found, logits(open_model(str(g.FOLDER / "hy_v3"), "f32"), "hy_v3"))
    assert name in caplog.text
    other = name.replace("layers.3", "layers.4").replace("mtp", "drafts")
    save_file({**tensors, other: np.ones((4, 8), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=other):
        open_model(str(tmp_path), "f32")


def test_layers_of_a_gguf_that_only_draft_tokens_are_left_out(tmp_path):
    g.write_gguf(tmp_path / "model.gguf", "hy_v3", g.as_float32, drafts=1)
    model = open_model(str(tmp_path / "model.gguf"))
    assert model.config.num_hidden_layers == 3
    assert np.array_equal(logits(model, "hy_v3"), logits(open_model(str(g.FOLDER / "hy_v3"), "f32"), "hy_v3"))


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_a_gguf_in_another_float_type_gives_the_same_bits_as_our_own_rounding(kind, tmp_path):
    g.write_gguf(tmp_path / "model.gguf", "mixtral", g.as_type(gguf.GGMLQuantizationType[kind]))
    model = open_model(str(tmp_path / "model.gguf"))
    assert model.weight_types.default.name == kind.lower()
    ours = logits(open_model(str(g.FOLDER / "mixtral"), kind.lower()), "mixtral")
    assert np.array_equal(logits(model, "mixtral"), ours)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1"])
def test_quantised_blocks_of_a_gguf_are_taken_as_they_are(kind, size, tmp_path):
    """Bit for bit what our own rounding of the same weights gives, but for o_proj: its blocks span several heads."""
    g.write_gguf(tmp_path / "model.gguf", "mixtral", g.as_type(gguf.GGMLQuantizationType[kind]))
    theirs, ours = open_model(str(tmp_path / "model.gguf")), open_model(str(g.FOLDER / "mixtral"), kind.lower())
    assert theirs.weight_types.default.name == kind.lower()
    for part in ours.config.partition(size):
        for spec in ours.specs:
            pair = [read(m, spec, spec.units_of(part), slice_shapes(spec, part)) for m in (theirs, ours)]
            if "o_proj" in spec.name:
                continue
            if not spec.vector and spec.weight_type.quantised:  # padding has other bits, but the same value 0
                pair = [[spec.weight_type.unpack(e) for e in by_expert(arrays, spec) if e[0].size] for arrays in pair]
            assert all(np.array_equal(a, b) for a, b in zip(*pair, strict=True)), spec.name


@pytest.mark.parametrize("kind", [t.name.upper() for t in WEIGHT_TYPES.values() if t.quantised and t.ggml])
def test_a_gguf_gives_the_logits_of_the_values_in_its_blocks(kind, tmp_path):
    """Whatever the bytes; but for the rounding of activations. And the same bits token by token."""
    blocks = g.as_random_blocks(gguf.GGMLQuantizationType[kind])
    g.write_of_whole_blocks(tmp_path / "folder", STORED_TYPES[kind.lower()].block)
    g.write_gguf(tmp_path / "blocks.gguf", str(tmp_path / "folder"), blocks)
    g.write_gguf(tmp_path / "floats.gguf", str(tmp_path / "folder"), g.as_floats_of(blocks))
    models = [open_model(str(tmp_path / f"{name}.gguf")) for name in ("blocks", "floats")]
    assert [m.weight_types.default.name for m in models] == [kind.lower(), "f32"]
    assert not models[0].requantised()
    found, expected = (logits(model, "llama") for model in models)
    assert np.abs(found - expected).max() < BLOCKS_TOLERANCE * np.abs(expected).max()
    runner, ids = running.load_file(models[0], THREADS), g.golden("llama")[0]
    assert np.array_equal(running.all_logits(runner, running.cut(ids, 1)), found)


MIXED = [gguf.GGMLQuantizationType[kind] for kind in ("Q4_K", "Q6_K", "IQ4_XS", "Q3_K", "Q8_0")]


@pytest.mark.parametrize(("family", "tolerance"), [("llama", 0.03), ("mixtral", 0.03), ("qwen3_5", 0.06)])
def test_every_matrix_of_a_gguf_may_have_its_own_type(family, tolerance, tmp_path):
    """Also gate, up and down of the same experts, one matrix of different layers, and blocks over several heads."""
    g.write_of_whole_blocks(tmp_path / "folder", 256, family)
    g.write_gguf(tmp_path / "blocks.gguf", str(tmp_path / "folder"), g.as_blocks_in_turn(MIXED))
    g.write_gguf(tmp_path / "floats.gguf", str(tmp_path / "folder"), g.as_floats_of(g.as_blocks_in_turn(MIXED)))
    models = [open_model(str(tmp_path / f"{name}.gguf")) for name in ("blocks", "floats")]
    types = {spec.name: spec.weight_type.name for spec in models[0].specs if "layers" in spec.name and not spec.vector}
    of_mlp = [kind for name, kind in types.items() if "layers.0.mlp" in name and "proj" in name]
    assert len(set(of_mlp)) == 3
    assert {kind.name.lower() for kind in MIXED} <= set(types.values())
    found, expected = (logits(model, family) for model in models)
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
    runner, ids = running.load_file(models[0], THREADS), g.golden(family)[0]
    assert np.array_equal(running.all_logits(runner, running.cut(ids, 1)), found)


def test_a_gguf_in_a_type_without_kernels_becomes_one_that_has_them(tmp_path):
    """Bit for bit as if its values were quantised to that."""
    blocks = g.as_random_blocks(gguf.GGMLQuantizationType.IQ2_XXS)
    g.write_of_whole_blocks(tmp_path / "folder", 256)
    g.write_gguf(tmp_path / "blocks.gguf", str(tmp_path / "folder"), blocks)
    g.write_gguf(tmp_path / "floats.gguf", str(tmp_path / "folder"), g.as_floats_of(blocks))
    model, floats = open_model(str(tmp_path / "blocks.gguf")), open_model(str(tmp_path / "floats.gguf"), "q6_k")
    assert model.weight_types.default.name == "q6_k"
    assert set(model.requantised()) == {"iq2_xxs"}
    assert np.array_equal(logits(model, "llama"), logits(floats, "llama"))


@pytest.mark.parametrize("family", IN_DLLAMA)
def test_a_dllama_file_gives_the_same_bits_as_the_folder(family, tmp_path):
    g.write_dllama(tmp_path / "model.m", family)
    found = logits(open_model(str(tmp_path / "model.m")), family)
    assert np.array_equal(found, logits(open_model(str(g.FOLDER / family), "f32"), family))


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("family", ["llama_bias", "qwen3_moe", "deepseek_v3"])
def test_slices_are_parts_of_the_whole(family, size):
    """What the ranks hold, put side by side, is what one rank holds; and a rank reads no more than its slices."""
    model = open_model(str(g.FOLDER / family), "bf16")
    for spec in model.specs:
        whole = read(model, spec, range(spec.units), slice_shapes(spec, model.config.partition(1)[0]))
        for part in model.config.partition(size):
            units = spec.units_of(part)
            for array, all_units, stored in zip(
                read(model, spec, units, slice_shapes(spec, part)), whole, spec.arrays(), strict=True
            ):
                inside = slice(units.start * stored.entries, units.stop * stored.entries)
                wanted = all_units[:, inside] if stored.experts else all_units[inside]
                assert np.array_equal(array, wanted)


def by_expert(arrays: list[np.ndarray], spec) -> list[list[np.ndarray]]:
    return [[a[e] for a in arrays] for e in range(spec.experts)] if spec.experts else [arrays]


def read(model, spec, units, shapes) -> list[np.ndarray]:
    arrays = [np.empty(shape, dtype) for dtype, shape in shapes]
    reader = model.reader(lambda count: None, 2)
    try:
        reader.read(spec, units, arrays)
    finally:
        reader.close()
    if not spec.vector:
        values = math.prod(spec.source_shape) * max(1, spec.experts) * len(units) / spec.units
        widest = max(model.checkpoint.tensors[name].type.row_bytes(32) / 32 for name in spec.source_names)
        # A column slice of blocks takes the whole blocks at its ends.
        assert reader.bytes_read <= values * widest + (2 * 34 * spec.rows if spec.panel else 0)
    return arrays
