"""Quantised checkpoints of Hugging Face: every scheme in slices for ranks, its values, logits, and what is refused."""

import json
import math
from contextlib import closing
from typing import Any

import gguf
import numpy as np
import pytest

from mpillama.errors import UserError
from mpillama.loading.model_file import ModelFile, open_model
from mpillama.models.partition import Partition
from mpillama.models.tensors import TensorSpec
from mpillama.models.weights import slice_shapes
from tests import golden_models as golden
from tests import running
from tests.models.test_golden import by_expert
from tests.quantised_checkpoints import SCHEMES, SIZES, Arrays, Written, bf16, float_of, write_values, written
from tests.tiny_models import AWKWARD

THREADS = 2
PROMPT = [5, 17, 90, 3, 3, 64, 21]
EXPERTS: dict[str, Any] = {
    **SIZES, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 192,
    "num_hidden_layers": 1,
}  # fmt: skip
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
    assert stored == {"gptq with desc_act" if scheme == "gptq any order" else SCHEMES[scheme].held}
    assert bool(model.requantised()) == (scheme == "gptq any order")
    check_values(model, made, exact=scheme != "gptq any order")


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


def test_stacked_experts_of_mxfp4(tmp_path):
    """gpt-oss: rows of gate and up alternate, 32 columns in 16 bytes."""
    made = written(tmp_path / "m", "mxfp4", EXPERTS)
    prefix = "model.layers.0.mlp.experts."
    stacked: Arrays = {}
    for target, parts in {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.items():
        for new, old in (("_blocks", ".weight_packed"), ("_scales", ".weight_scale")):
            found = [np.stack([made.arrays.pop(f"{prefix}{e}.{p}{old}")[1] for p in parts], axis=1) for e in range(4)]
            rows = np.stack(found).reshape(4, -1, found[0].shape[2])
            stacked[f"{prefix}{target}{new}"] = (
                "U8",
                rows.reshape(*rows.shape[:2], -1, 16) if new == "_blocks" else rows,
            )
    made.arrays = {name: array for name, array in made.arrays.items() if ".self_attn." not in name} | stacked
    for name in [name for name in made.values if ".self_attn." in name]:
        bits = bf16(made.values[name])
        made.arrays[name], made.values[name] = ("BF16", bits), float_of(bits, "BF16")
    made.write({**EXPERTS, "quantization_config": {"quant_method": "mxfp4"}})
    check_values(open_model(str(made.folder)), made)


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


# -- what is refused --------------------------------------------------------------------------------------------------


UP = "model.layers.1.mlp.up_proj"
GONE = ("", np.zeros(0))


def nan_at(made: Written, ending: str, bits: int) -> tuple[str, np.ndarray]:
    dtype, array = made.arrays[UP + ending]
    damaged = array.copy()
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
        ("fp8 blocks", ".weight_scale_inv", 0x7FC00000),
        ("fp8 blocks", ".weight", 0x7F),
        ("fp8 rows", ".weight_scale", 0x7F80),
        ("int4 32", ".weight_scale", 0x7FC0),
        ("awq 64", ".scales", 0x7E00),
        ("gptq any order", ".scales", 0x7E00),
        ("mxfp4", ".weight_scale", 0xFF),
        ("nvfp4", ".weight_scale", 0x7F),
        ("nvfp4 modelopt", ".weight_scale_2", 0x7FC00000),
        ("nvfp4", ".weight_global_scale", 0),
    ],
)
def test_numbers_that_are_none_are_named(scheme, ending, bits, tmp_path):
    made = written(tmp_path / "m", scheme)
    made.arrays[UP + ending] = nan_at(made, ending, bits)
    made.write({**SIZES, "quantization_config": SCHEMES[scheme].config})
    model = open_model(str(made.folder))
    spec = next(s for s in model.specs if s.name == UP + ".weight")
    shapes = slice_shapes(spec, model.config.partition(1)[0])
    with pytest.raises(UserError, match=f"{UP}{ending}"):
        read(model, spec, range(spec.units), shapes)


def test_an_order_of_columns_that_the_configuration_denies(tmp_path):
    made = written(tmp_path / "m", "gptq any order")
    made.write({**SIZES, "quantization_config": SCHEMES["gptq 128"].config})
    model = open_model(str(made.folder))
    spec = next(s for s in model.specs if s.name == UP + ".weight")
    shapes = slice_shapes(spec, model.config.partition(1)[0])
    with pytest.raises(UserError, match=r"up_proj\.g_idx.*desc_act"):
        read(model, spec, range(spec.units), shapes)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "hqq"}, "'hqq'"),
        ({"bits": 4}, "an unnamed method"),
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
