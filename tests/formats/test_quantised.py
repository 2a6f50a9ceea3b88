"""Quantised checkpoints of Hugging Face: every scheme in slices for ranks, its values, logits, and what is refused."""

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mpillama.errors import UserError
from mpillama.loading.model_file import ModelFile, open_model
from mpillama.models.partition import Partition
from mpillama.models.tensors import TensorSpec
from mpillama.models.weights import slice_shapes
from mpillama.quant.registry import STORED_TYPES
from tests import golden_models as golden
from tests import running
from tests.formats.test_delta_nets_in_fp8 import config_of
from tests.models.test_golden import by_expert
from tests.quantised_checkpoints import (
    BLOCKS,
    FLOAT8,
    SCHEMES,
    SIZES,
    Arrays,
    Written,
    bf16,
    delta_net_in_fp8,
    float_of,
    packed_config,
    write_values,
    written,
)  # fmt: skip
from tests.tiny_models import AWKWARD

THREADS = 2
PROMPT = [5, 17, 90, 3, 3, 64, 21]
EXPERTS: dict[str, Any] = {
    **SIZES, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 192,
    "num_hidden_layers": 1,
}  # fmt: skip
ANY_ORDER = {"gptq any order": "gptq with desc_act", "int4 64 any order": "compressed-tensors with actorder"}
"""Schemes whose columns are in an order of their own, and what such matrices are called."""
GPT_OSS: dict[str, Any] = {**EXPERTS, "quantization_config": {"quant_method": "mxfp4"}}
STACK = "model.layers.0.mlp.experts."
WIDE_HEADS: dict[str, Any] = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 96}


def read(model: ModelFile, spec: TensorSpec, units: range, shapes: Any) -> list[np.ndarray]:
    arrays = [np.full(shape, 77, dtype) for dtype, shape in shapes]
    reader = model.reader(lambda count: None, 2)
    try:
        reader.read(spec, units, arrays)
    finally:
        reader.close()
    return arrays


def check_values(model: ModelFile, made: Written, exact: bool = True) -> None:
    """Every tensor has the values of the format, and slices for any number of ranks are parts of the whole."""
    reader = model.reader(lambda count: None, 1)

    def slices(spec: TensorSpec, part: Partition) -> list[np.ndarray]:
        arrays = [np.full(shape, 77, dtype) for dtype, shape in slice_shapes(spec, part)]
        reader.read(spec, spec.units_of(part), arrays)
        return arrays

    with closing(reader):
        for spec in model.specs:
            whole = slices(spec, model.config.partition(1)[0])
            parts = by_expert(whole, spec) or [whole]
            for name, arrays in zip(spec.source_names, parts, strict=True):
                expected = spec.pad(made.values[name]).astype(np.float32)
                found = arrays[0] if spec.vector else spec.weight_type.unpack(arrays)
                near = np.abs(expected) * (2.0**-23 if exact else 0) + (0 if exact else np.abs(expected).max() / 120)
                assert np.all(np.abs(found - expected) <= near), name
            for part in (part for size in (2, 3, 5) for part in model.config.partition(size)):
                units = spec.units_of(part)
                for array, all_units, stored in zip(slices(spec, part), whole, spec.arrays(), strict=True):
                    inside = slice(units.start * stored.entries, units.stop * stored.entries)
                    assert np.array_equal(array, all_units[:, inside] if stored.experts else all_units[inside]), (
                        spec.name
                    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_of_every_scheme(scheme, tmp_path):
    made = written(tmp_path / "m", scheme)
    model = open_model(str(made.folder))
    held = {spec.weight_type.name for spec in model.specs if not spec.vector and spec.layer is not None}
    assert held == {SCHEMES[scheme].held}
    assert {spec.weight_type.name for spec in model.specs if spec.layer is None and not spec.vector} == {"bf16"}
    stored = {t.stored for name, t in model.checkpoint.tensors.items() if "_proj" in name}
    assert stored == {ANY_ORDER.get(scheme, SCHEMES[scheme].held)}
    assert bool(model.requantised()) == (scheme in ANY_ORDER)
    check_values(model, made, exact=scheme not in ANY_ORDER)


@pytest.mark.parametrize("scheme", ["fp8 blocks", "int4 64 zeros", "awq 128", "mxfp4", "nvfp4", "int8"])
def test_logits_are_those_of_the_values(scheme, tmp_path):
    """But for the rounding of activations; and the same bits token by token."""
    made = written(tmp_path / "m", scheme)
    model = running.load_file(open_model(str(made.folder)), THREADS)
    plain = running.load_file(open_model(str(write_values(tmp_path / "f32", made))), THREADS)
    found, expected = running.all_logits(model, [PROMPT]), running.all_logits(plain, [PROMPT])
    assert np.array_equal(running.all_logits(model, running.cut(PROMPT, 1)), found)
    assert np.abs(found - expected).max() <= np.abs(expected).max() * (1e-4 if scheme == "fp8 blocks" else 0.05)


@pytest.mark.parametrize("scheme", ["fp8 blocks", "int4 32", "mxfp4", "nvfp4 modelopt", "gptq 64"])
def test_experts(scheme, tmp_path):
    made = written(tmp_path / "m", scheme, EXPERTS)
    check_values(open_model(str(made.folder)), made)


@pytest.mark.parametrize("scheme", ["fp8 blocks", "awq 128", "gptq 64", "int4 32", "nvfp4"])
def test_heads_that_cross_the_borders_of_groups(scheme, tmp_path):
    made = written(tmp_path / "m", scheme, {**WIDE_HEADS, "hidden_size": 384})
    check_values(open_model(str(made.folder)), made)


@pytest.mark.parametrize("scheme", ["fp8 blocks", "fp8 rows", "int8 zeros"])
def test_sizes_that_divide_by_nothing(scheme, tmp_path):
    """Heads of 20 channels cross groups within a block of 32: then values are held as float32."""
    made = written(tmp_path / "m", scheme, AWKWARD)
    model = open_model(str(made.folder))
    o_proj = next(s for s in model.specs if "o_proj" in s.name)
    assert o_proj.weight_type.name == ("f32" if scheme == "fp8 blocks" else SCHEMES[scheme].held)
    check_values(model, made)


def test_experts_that_differ_are_held_alike_and_told(tmp_path, caplog):
    """One of them was left in bfloat16: to it the others are rounded; where all are alike nothing is said."""
    made = written(tmp_path / "m", "int4 32", EXPERTS)
    open_model(str(made.folder))
    assert not caplog.messages
    prefix = f"{STACK}2.up_proj"
    for name in [name for name in made.arrays if name.startswith(prefix)]:
        del made.arrays[name]
    bits = bf16(made.values[prefix + ".weight"])
    made.arrays[prefix + ".weight"], made.values[prefix + ".weight"] = ("BF16", bits), float_of(bits, "BF16")
    made.write({**EXPERTS, "quantization_config": SCHEMES["int4 32"].config})
    model = open_model(str(made.folder))
    (warning,) = caplog.messages
    assert f"{3 * 192 * 256:,} weights of experts are int4/32 and become bf16" in warning
    spec = next(s for s in model.specs if s.experts and "up_proj" in s.name)
    arrays = read(model, spec, range(spec.units), slice_shapes(spec, model.config.partition(1)[0]))
    for name, parts in zip(spec.source_names, by_expert(arrays, spec), strict=True):
        expected = spec.pad(made.values[name])
        assert np.all(np.abs(spec.weight_type.unpack(parts) - expected) <= np.abs(expected) * 2.0**-8), name


def of_gpt_oss(folder: Path) -> Written:
    """Experts in MXFP4: rows of gate and up alternate, 32 columns in 16 bytes."""
    made = written(folder, "mxfp4", EXPERTS)
    stacks: Arrays = {}
    for target, parts in {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.items():
        for new, old in (("_blocks", ".weight_packed"), ("_scales", ".weight_scale")):
            found = [np.stack([made.arrays.pop(f"{STACK}{e}.{p}{old}")[1] for p in parts], axis=1) for e in range(4)]
            rows = np.stack(found).reshape(4, -1, found[0].shape[2])
            stacks[f"{STACK}{target}{new}"] = (
                "U8",
                rows.reshape(*rows.shape[:2], -1, 16) if new == "_blocks" else rows,
            )
    made.arrays = {name: array for name, array in made.arrays.items() if ".self_attn." not in name} | stacks
    for name in [name for name in made.values if ".self_attn." in name]:
        bits = bf16(made.values[name])
        made.arrays[name], made.values[name] = ("BF16", bits), float_of(bits, "BF16")
    made.write(GPT_OSS)
    return made


def test_stacked_experts_of_mxfp4(tmp_path):
    made = of_gpt_oss(tmp_path / "m")
    check_values(open_model(str(made.folder)), made)


def stacked(made: Written, ending: str, turn: bool = False) -> dict[str, np.ndarray]:
    """The arrays of all experts whose names end so, gate above up; they are taken out of the model."""
    found = {}
    for target, parts in {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.items():
        experts = [[made.arrays.pop(f"{STACK}{e}.{p}{ending}")[1] for p in parts] for e in range(4)]
        if experts[0][0].ndim < 2:
            found[target] = np.array(experts)[:, :, None]
        else:
            whole = np.stack([np.concatenate(each) for each in experts])
            found[target] = whole.transpose(0, 2, 1) if turn else whole
    return found


def check_stacked(made: Written, scheme: str, arrays: Arrays) -> None:
    made.arrays |= {STACK + name: array for name, array in arrays.items()}
    made.write({**EXPERTS, "quantization_config": SCHEMES[scheme].config})
    check_values(open_model(str(made.folder)), made)


@pytest.mark.parametrize("scheme", ["fp8 small blocks", "fp8 tensor"])
def test_stacked_experts_of_fp8(scheme, tmp_path):
    """As transformers keeps them: scales for blocks, or one for gate and one for up of each expert."""
    made = written(tmp_path / "m", scheme, EXPERTS)
    scales = stacked(made, ".weight_scale_inv" if "blocks" in scheme else ".weight_scale")
    arrays: Arrays = {name: ("F8_E4M3", array) for name, array in stacked(made, ".weight").items()}
    arrays |= {name + "_scale_inv": ("F32", array) for name, array in scales.items()}
    check_stacked(made, scheme, {**arrays, "down_proj_activation_scale": ("F32", np.ones((), np.float32))})


@pytest.mark.parametrize("shape", [(), (4,), (4, 1, 1)])
def test_turned_experts_of_fp8(shape, tmp_path):
    """Llama 4 of modelopt: a line for each column, and a scale for all experts or for each."""
    made = written(tmp_path / "m", "fp8 tensor", EXPERTS)
    arrays: Arrays = {name: ("F8_E4M3", array) for name, array in stacked(made, ".weight", turn=True).items()}
    stacked(made, ".weight_scale")
    for name, (_, codes) in tuple(arrays.items()):
        scales = np.linspace(0.5, 1.5, 4, dtype=np.float32)[: max(1, np.prod(shape, dtype=int))].reshape(shape) / 2000
        arrays[name + "_weight_scale"] = ("F32", scales)
        values = FLOAT8[codes.transpose(0, 2, 1)] * np.broadcast_to(scales.reshape(-1), 4).reshape(4, 1, 1)
        for part, of_part in zip(
            ("gate_proj", "up_proj") if "gate" in name else (name,),
            np.split(values, 2, axis=1) if "gate" in name else (values,),
            strict=True,
        ):
            made.values |= {f"{STACK}{e}.{part}.weight": of_part[e] for e in range(4)}
    check_stacked(made, "fp8 tensor", arrays)


def test_turned_experts_of_nvfp4(tmp_path):
    """Llama 4 of modelopt: two columns in a byte, and one factor for all experts."""
    made = written(tmp_path / "m", "nvfp4 modelopt", EXPERTS)
    codes, scales = stacked(made, ".weight", turn=True), stacked(made, ".weight_scale", turn=True)
    wholes = stacked(made, ".weight_scale_2")
    arrays: Arrays = {name: ("U8", array) for name, array in codes.items()}
    arrays |= {name + "_weight_scale": ("F8_E4M3", array) for name, array in scales.items()}
    for name, whole in wholes.items():
        arrays[name + "_weight_scale_2"] = ("F32", whole.reshape(-1)[:1])
        for e in range(4):
            for i, part in enumerate(("gate_proj", "up_proj") if "gate" in name else (name,)):
                made.values[f"{STACK}{e}.{part}.weight"] *= float(whole.reshape(-1)[0]) / float(whole[e].reshape(-1)[i])
    check_stacked(made, "nvfp4 modelopt", arrays)


def test_zero_biases_of_models_that_have_none(tmp_path):
    """AutoGPTQ writes one for each matrix; one that says something is refused."""
    zeros = {f"{UP}.bias": ("F16", np.zeros(384, np.float16))}
    made = written(tmp_path / "m", "gptq 128", changes=zeros)
    model = open_model(str(made.folder))
    assert UP + ".bias" not in model.checkpoint.tensors
    check_values(model, made)
    made.arrays[f"{UP}.bias"][1][5] = 0.5
    made.write({**SIZES, "quantization_config": SCHEMES["gptq 128"].config})
    with pytest.raises(UserError, match=r"up_proj\.bias' is not part of a llama model"):
        open_model(str(made.folder))


def test_another_type_may_be_asked_for(tmp_path):
    made = written(tmp_path / "m", "awq 64")
    model = open_model(str(made.folder), "f32")
    assert {spec.weight_type.name for spec in model.specs} == {"f32"}
    check_values(model, made)


def test_configurations_in_other_places(tmp_path):
    made, config = written(tmp_path / "m", "fp8 tensor"), {**SIZES}
    made.write(config)
    with pytest.raises(UserError, match=r"F8_E4M3.*quantization_config"):
        open_model(str(made.folder))
    (made.folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert open_model(str(made.folder)).weight_types.of("model.layers.0.mlp.up_proj.weight").name == "fp8"
    made.write({**config, "compression_config": SCHEMES["fp8 rows"].config})
    assert open_model(str(made.folder)).weight_types.of("model.layers.0.mlp.up_proj.weight").name == "fp8"


def test_the_configuration_of_the_language_model_may_say_it(tmp_path):
    """Of one that also sees, under text_config."""
    made, config = delta_net_in_fp8(tmp_path / "m", config_of("qwen3_5_moe"))
    made.write({**config, "text_config": {**config["text_config"], "quantization_config": BLOCKS}})
    model = open_model(str(made.folder))
    assert model.weight_types.default.name == "fp8"
    made.write(config)
    with pytest.raises(UserError, match=r"F8_E4M3.*quantization_config"):
        open_model(str(made.folder))


def test_scales_of_activations_are_left_aside(tmp_path):
    more = {f"model.layers.0.self_attn.k_proj.{n}": ("F32", np.ones(())) for n in ("input_scale", "k_scale")}
    made = written(
        tmp_path / "m", "fp8 tensor", changes={name: ("F32", x.astype("f4")) for name, (_, x) in more.items()}
    )
    assert not more.keys() & open_model(str(made.folder)).checkpoint.tensors.keys()


class WithFactors(gguf.GGUFWriter):
    """Writes beside every tensor in NVFP4 what it is multiplied by, and what activations were."""

    factor = np.float32(0.37)

    def add_tensor(self, name: str, tensor: np.ndarray, *rest: Any, raw_dtype: Any = None, **named: Any) -> None:
        super().add_tensor(name, tensor, *rest, raw_dtype=raw_dtype, **named)
        if raw_dtype == gguf.GGMLQuantizationType.NVFP4:
            for ending in ("scale", "input_scale"):
                super().add_tensor(name.removesuffix("weight") + ending, np.full(1, self.factor, np.float32))


def test_tensors_of_a_gguf_in_nvfp4_are_multiplied_by_factors_of_their_own(tmp_path, monkeypatch):
    blocks = golden.as_random_blocks(gguf.GGMLQuantizationType.NVFP4)
    golden.write_of_whole_blocks(tmp_path / "folder", 64)
    golden.write_gguf(tmp_path / "plain.gguf", str(tmp_path / "folder"), blocks)
    monkeypatch.setattr(gguf, "GGUFWriter", WithFactors)
    golden.write_gguf(tmp_path / "scaled.gguf", str(tmp_path / "folder"), blocks)
    models = [open_model(str(tmp_path / f"{name}.gguf"), "as-stored") for name in ("plain", "scaled")]
    for spec in models[0].specs:
        if not spec.vector and spec.weight_type.name == "nvfp4":
            shapes = slice_shapes(spec, models[0].config.partition(1)[0])
            plain, scaled = (read(model, spec, range(spec.units), shapes) for model in models)
            assert np.array_equal(plain[0], scaled[0])
            expected = spec.weight_type.unpack(plain) * WithFactors.factor
            assert np.allclose(spec.weight_type.unpack(scaled), expected, rtol=1e-6, atol=0)
    as_floats = open_model(str(tmp_path / "scaled.gguf"), "f32")
    spec = next(s for s in as_floats.specs if "up_proj" in s.name)
    shapes = slice_shapes(spec, as_floats.config.partition(1)[0])
    found = read(as_floats, spec, range(spec.units), shapes)
    held = next(s for s in models[1].specs if s.name == spec.name)
    kept = read(models[1], held, range(held.units), slice_shapes(held, models[1].config.partition(1)[0]))
    assert np.allclose(spec.weight_type.unpack(found), held.weight_type.unpack(kept), rtol=1e-6, atol=0)


OF_GGUF = [stored.name for stored in STORED_TYPES.values() if stored.ggml is not None and stored.block > 1]


@pytest.mark.parametrize("stored", [name for name in OF_GGUF if name not in ("mxfp4", "nvfp4")])
def test_scales_of_a_gguf_that_are_no_numbers_are_named(stored, tmp_path):
    """All but those that are powers of two or unsigned floats of 8 bits, of which every byte is a number to GGML."""
    kind = STORED_TYPES[stored]
    golden.write_of_whole_blocks(tmp_path / "folder", kind.block)
    blocks = golden.as_random_blocks(gguf.GGMLQuantizationType[stored.upper()])
    golden.write_gguf(tmp_path / "m.gguf", str(tmp_path / "folder"), blocks)
    up = open_model(str(tmp_path / "m.gguf")).checkpoint.tensors[UP + ".weight"]
    with (tmp_path / "m.gguf").open("r+b") as file:
        file.seek(up.offset + up.bytes - kind.block_bytes)
        file.write(b"\xff" * kind.block_bytes)
    for weights in ("as-stored", "f32"):
        with pytest.raises(UserError, match=rf"m\.gguf: tensor {UP}\.weight holds .*NaN"):
            read_up(open_model(str(tmp_path / "m.gguf"), weights))


# -- what is refused --------------------------------------------------------------------------------------------------


UP = "model.layers.1.mlp.up_proj"
GONE = ("", np.zeros(0))


def read_up(model: ModelFile) -> None:
    spec = next(s for s in model.specs if s.name == UP + ".weight")
    read(model, spec, range(spec.units), slice_shapes(spec, model.config.partition(1)[0]))


def read_all(model: ModelFile) -> None:
    for spec in model.specs:
        read(model, spec, range(spec.units), slice_shapes(spec, model.config.partition(1)[0]))


def nan_at(made: Written, ending: str, bits: int) -> tuple[str, np.ndarray]:
    dtype, array = made.arrays[UP + ending]
    damaged = np.array(array)
    damaged.view(f"u{damaged.itemsize}").reshape(-1)[-1] = bits
    return dtype, damaged


@pytest.mark.parametrize(
    ("scheme", "ending", "change", "words"),
    [
        ("fp8 blocks", ".weight_scale_inv", GONE, "is missing"),
        ("fp8 blocks", ".weight_scale_inv", ("F32", np.ones((4, 2), np.float32)), "[4, 2]"),
        ("fp8 blocks", ".weight_scale_inv", ("I32", np.ones((3, 2), np.int32)), "I32"),
        ("int4 32", ".weight_scale", GONE, "is missing"),
        ("int4 32", ".weight_scale", ("BF16", np.ones((384, 7), np.uint16)), "[384, 7]"),
        ("int4 64 zeros", ".weight_zero_point", ("I32", np.zeros((384, 4), np.int32)), "[384, 4]"),
        ("int4 32", ".weight_packed", ("I32", np.zeros(96, np.int32)), "[96]"),
        ("awq 64", ".qzeros", GONE, "is missing"),
        ("awq 64", ".scales", ("F16", np.ones((4, 383), np.float16)), "[4, 383]"),
        ("awq 64", ".qzeros", ("F32", np.ones((4, 48), np.float32)), "F32"),
        ("gptq 128", ".g_idx", ("I32", np.zeros(255, np.int32)), "[255]"),
        ("gptq 128", ".qzeros", ("I32", np.zeros((2, 47), np.int32)), "[2, 47]"),
        ("int4 64 any order", ".weight_g_idx", ("I32", np.zeros(255, np.int32)), "[255]"),
        ("int4 64 any order", ".weight_g_idx", ("I64", np.zeros(256, np.int64)), "I64"),
        ("mxfp4", ".weight_scale", ("U8", np.ones((384, 9), np.uint8)), "[384, 9]"),
        ("nvfp4", ".weight_global_scale", ("F32", np.ones(3, np.float32)), "[3]"),
        ("nvfp4", ".weight_scale", ("F8_E4M3", np.ones((384, 8), np.uint8)), "[384, 8]"),
        ("nvfp4 modelopt", ".weight_scale_2", GONE, "is missing"),
    ],
)
def test_arrays_that_do_not_fit_are_named(scheme, ending, change, words, tmp_path):
    made = written(tmp_path / "m", scheme, changes={UP + ending: change})
    with pytest.raises(UserError) as caught:
        open_model(str(made.folder))
    sentence = str(caught.value)
    assert sentence.startswith(str(made.folder))
    assert UP + ending in sentence or UP in sentence
    assert words in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("scheme", "ending", "bits"),
    [
        ("fp8 blocks", ".weight", 0x7F),
        ("fp8 rows", ".weight_scale", 0x7F80),
        ("nvfp4", ".weight_global_scale", 0),
    ],
)
def test_numbers_that_are_none_are_named(scheme, ending, bits, tmp_path):
    made = written(tmp_path / "m", scheme)
    made.arrays[UP + ending] = nan_at(made, ending, bits)
    made.write({**SIZES, "quantization_config": SCHEMES[scheme].config})
    model = open_model(str(made.folder))
    with pytest.raises(UserError, match=f"{UP}{ending}"):
        read_up(model)


def refusal(made: Written, scheme: str) -> str:
    """The sentence about a model that was changed, when it is opened or UP's weights are read."""
    made.write({**SIZES, "quantization_config": SCHEMES[scheme].config})
    with pytest.raises(UserError) as caught:
        read_up(open_model(str(made.folder)))
    assert str(caught.value).startswith(str(made.folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


NO_NUMBER = {"F32": 0x7FC00000, "F16": 0x7E00, "BF16": 0x7FC0, "F8_E4M3": 0x7F, "U8": 0xFF, "F8_E8M0": 0xFF}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_of_every_scheme_that_are_missing_damaged_or_of_another_shape(scheme, tmp_path):
    made = written(tmp_path / "m", scheme)
    endings = [name.removeprefix(UP) for name in made.arrays if name.startswith(UP) and "scale" in name]
    assert endings
    for ending in endings:
        whole = dtype, array = made.arrays.pop(UP + ending)
        assert UP in refusal(made, scheme)
        made.arrays[UP + ending] = dtype, np.concatenate([np.atleast_1d(array)] * 3)
        assert UP + ending in refusal(made, scheme)
        made.arrays[UP + ending] = whole
        made.arrays[UP + ending] = nan_at(made, ending, NO_NUMBER[dtype])
        assert UP + ending in refusal(made, scheme)
        made.arrays[UP + ending] = whole


@pytest.mark.parametrize(
    ("scheme", "codes"),
    [("int4 32", ".weight_packed"), ("awq 64", ".qweight"), ("gptq 128", ".qweight"), ("mxfp4", ".weight_packed"),
     ("mxfp4 e8m0", ".weight"), ("nvfp4", ".weight_packed")],
)  # fmt: skip
def test_scales_without_weights_are_named(scheme, codes, tmp_path):
    made = written(tmp_path / "m", scheme, changes={UP + codes: GONE})
    with pytest.raises(UserError, match=rf"{UP}\.\w+ is there without the weights") as caught:
        open_model(str(made.folder))
    assert str(caught.value).startswith(str(made.folder))


@pytest.mark.parametrize(
    ("ending", "change", "words"),
    [
        ("_scales", None, "gate_up_proj_scales is missing"),
        ("_blocks", None, "gate_up_proj_scales is there without the weights"),
        ("_scales", np.s_[:, :-1], "[4, 383, 8]"),
        ("_scales", np.s_[:3], "[3, 384, 8]"),
        ("_blocks", np.s_[..., :15], "[4, 384, 8, 15]"),
        ("_scales", 255, "gate_up_proj_scales holds NaN"),
    ],
)
def test_stacked_experts_of_mxfp4_that_are_damaged(ending, change, words, tmp_path):
    made, name = of_gpt_oss(tmp_path / "m"), f"{STACK}gate_up_proj{ending}"
    dtype, array = made.arrays.pop(name)
    if change == 255:
        array[2, 7, 3] = 255
        made.arrays[name] = dtype, array
    elif change is not None:
        made.arrays[name] = dtype, np.ascontiguousarray(array[change])
    made.write(GPT_OSS)
    with pytest.raises(UserError) as caught:
        read_all(open_model(str(made.folder)))
    assert str(caught.value).startswith(str(made.folder))
    assert STACK + "gate_up_proj" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "shape", "words"),
    [
        ("", (0,), "gate_up_proj_scale_inv is missing"),
        ("F32", (4, 3, 1), "[4, 3, 1]"),
        ("F32", (3, 1, 1), "[3, 1, 1]"),
        ("I32", (4, 1, 1), "I32"),
        ("F32", (4, 12, 4), "of which gate and up share some"),
    ],
)
def test_scales_of_stacked_experts_that_do_not_fit(dtype, shape, words, tmp_path):
    made = written(tmp_path / "m", "fp8 tensor", EXPERTS)
    stacked(made, ".weight_scale")
    made.arrays |= {STACK + name: ("F8_E4M3", array) for name, array in stacked(made, ".weight").items()}
    made.arrays[STACK + "down_proj_scale_inv"] = ("F32", np.ones((4, 1, 1), np.float32))
    if dtype:
        kind = np.int32 if dtype == "I32" else np.float32
        made.arrays[STACK + "gate_up_proj_scale_inv"] = (dtype, np.ones(shape, kind))
    blocks = {"weight_block_size": [33, 64]} if "share" in words else {}
    made.write({**EXPERTS, "quantization_config": {**SCHEMES["fp8 tensor"].config, **blocks}})
    with pytest.raises(UserError) as caught:
        open_model(str(made.folder))
    assert STACK + "gate_up" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("scheme", ["int4 32", "gptq 64"])
def test_groups_that_do_not_divide(scheme, tmp_path):
    made = written(tmp_path / "m", scheme)
    config = json.loads(json.dumps(SCHEMES[scheme].config).replace('"group_size": 32', '"group_size": 48'))
    made.write({**SIZES, "quantization_config": {**config, **({"group_size": 48} if scheme == "gptq 64" else {})}})
    with pytest.raises(UserError, match=r"model\.layers\.0\.") as caught:
        open_model(str(made.folder))
    assert ("group_size=48" in str(caught.value)) == (scheme == "gptq 64")


def test_an_order_of_columns_that_the_configuration_denies(tmp_path):
    made = written(tmp_path / "m", "gptq any order")
    made.write({**SIZES, "quantization_config": SCHEMES["gptq 128"].config})
    model = open_model(str(made.folder))
    with pytest.raises(UserError, match=r"up_proj\.g_idx.*desc_act"):
        read_up(model)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "hqq"}, "'hqq'"),
        ({"bits": 4}, "an unnamed method"),
        ({"quant_method": ["awq"]}, "['awq']"),
        ({"quant_method": "gptq", "bits": [4]}, "GPTQ in [4] bits"),
        ([1], "an unnamed method"),
        ({**SCHEMES["awq 64"].config, "version": "gemv"}, "gemv"),
        ({**SCHEMES["awq 64"].config, "group_size": 48}, "group_size=48"),
        ({**SCHEMES["awq 64"].config, "group_size": "x"}, "group_size='x'"),
        ({**SCHEMES["awq 64"].config, "group_size": 128}, "[2, 256]"),
    ],
)
def test_configurations_that_are_not_read(config, words, tmp_path):
    made = written(tmp_path / "m", "awq 64")
    made.write({**SIZES, "quantization_config": config})
    with pytest.raises(UserError) as caught:
        open_model(str(made.folder))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "config", "words"),
    [
        ("int4 32", {"quant_method": "compressed-tensors"}, "config_groups that do not say how"),
        ("int4 32", {"quant_method": "compressed-tensors", "config_groups": 5}, "config_groups that do not say how"),
        ("int4 32", {**packed_config(4, 32), "config_groups": {"a": {"weights": {"num_bits": [4]}}}}, "[4] bits"),
        ("fp8 blocks", {**BLOCKS, "weight_block_size": [128]}, "weight_block_size=[128]"),
        ("fp8 blocks", {**BLOCKS, "weight_block_size": "x"}, "weight_block_size='x'"),
    ],
)
def test_configurations_that_do_not_say_how(scheme, config, words, tmp_path):
    made = written(tmp_path / "m", scheme)
    made.write({**SIZES, "quantization_config": config})
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj") as caught:
        open_model(str(made.folder))
    assert str(caught.value).startswith(str(made.folder))
    assert words in str(caught.value)


def test_sizes_in_memory_are_those_of_the_files(tmp_path):
    """Within what the scales of padding and of zero points take more."""
    for scheme in ("fp8 blocks", "int4 128", "awq 128", "nvfp4 modelopt", "mxfp4"):
        made = written(tmp_path / scheme.replace(" ", "_"), scheme, {**SIZES, "head_dim": 128})
        model = open_model(str(made.folder))
        for spec in model.specs:
            if spec.layer is None or spec.vector:
                continue
            held = sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in spec.arrays())
            stored = model.stored_bytes(spec, range(spec.units))
            assert held <= stored * 1.04 + 64, (scheme, spec.name, held, stored)
