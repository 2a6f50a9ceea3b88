"""Folders in Hugging Face's layout: tables against what was written, refusals, and damage."""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mpillama.errors import UserError
from mpillama.formats import hugging_face as safetensors_table
from mpillama.formats.checkpoint import Checkpoint
from mpillama.formats.checkpoints import read_checkpoint
from mpillama.formats.hugging_face import read_hugging_face
from mpillama.models.config import ModelConfig
from mpillama.quant.types.bf16 import round_to_bfloat16
from tests import tiny_models as models
from tests.formats.checking import mangled, refusal, values, within_bounds

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.float32, "F16": np.float16}
Q = "model.layers.0.self_attn.q_proj.weight"


def as_bytes(values: np.ndarray, dtype: str) -> bytes:
    return round_to_bfloat16(values).tobytes() if dtype == "BF16" else values.astype(DTYPES[dtype]).tobytes()


def safetensors_bytes(tensors: Mapping[str, np.ndarray], dtype: str = "F32") -> bytes:
    """A file, written from the format's description."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        added = as_bytes(tensor, dtype)
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [len(data), len(data) + len(added)]}
        data += added
    return with_header(header) + data


def with_header(header: Any) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def write_folder(
    folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] = models.PLAIN, dtype: str = "F32"
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    (folder / WEIGHTS).write_bytes(safetensors_bytes(tensors, dtype))
    return folder


def write_shards(folder: Path, shards: Iterable[Mapping[str, np.ndarray]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(models.PLAIN)))
    placed, shards = {}, list(shards)
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / name).write_bytes(safetensors_bytes(tensors))
        placed.update(dict.fromkeys(tensors, name))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def read(folder: Path) -> Checkpoint:
    return read_hugging_face(str(folder))


def refused(folder: Path) -> str:
    return refusal(lambda: read(folder), folder)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", models.random_tensors(models.PLAIN))


# -- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_one_file(tmp_path, dtype):
    tensors = models.random_tensors(models.PLAIN)
    folder = write_folder(tmp_path / "m", tensors, dtype=dtype)
    checkpoint = read_checkpoint(str(folder))
    assert checkpoint.kind == "hugging_face"
    assert checkpoint.config_json == models.PLAIN
    assert ModelConfig.from_hf(checkpoint.config_json).blocks[0].attention.head_dim == 32
    assert checkpoint.files == (str(folder / WEIGHTS),)
    assert checkpoint.file_sizes == ((folder / WEIGHTS).stat().st_size,)
    assert {name: t.shape for name, t in checkpoint.tensors.items()} == {n: t.shape for n, t in tensors.items()}
    for name, tensor in tensors.items():
        stored = checkpoint.tensors[name]
        assert (stored.name, stored.stored, stored.interleaved) == (name, dtype.lower(), 0)
        assert np.allclose(values(checkpoint, name), tensor, rtol=2**-8, atol=1e-7)


def test_a_file_of_the_safetensors_package(tmp_path):
    tensors = {name: tensor.astype(np.float16) for name, tensor in models.random_tensors(models.PLAIN).items()}
    folder = write_folder(tmp_path / "m", {})
    save_file(tensors, folder / WEIGHTS)
    checkpoint = read(folder)
    assert checkpoint.tensors.keys() == tensors.keys()
    assert all(np.array_equal(values(checkpoint, name), tensor) for name, tensor in tensors.items())


def test_shards(tmp_path):
    tensors = models.random_tensors(models.PLAIN)
    parts = [dict(list(tensors.items())[i::3]) for i in range(3)]
    checkpoint = read(write_shards(tmp_path / "m", parts))
    assert len(checkpoint.files) == 3
    assert all(checkpoint.tensors[name].file == number for number, part in enumerate(parts) for name in part)
    assert all(np.array_equal(values(checkpoint, name), tensor) for name, tensor in tensors.items())


def test_a_link_to_a_file_elsewhere(plain, tmp_path):
    (plain / WEIGHTS).rename(tmp_path / "blob")
    (plain / WEIGHTS).symlink_to(tmp_path / "blob")
    assert Q in read(plain).tensors


def test_rotary_frequencies_are_passed_over(tmp_path):
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}
    tensors = {**models.random_tensors(models.PLAIN), **inverse}
    assert read(write_folder(tmp_path / "one", tensors)).tensors.keys() == tensors.keys() - inverse.keys()
    assert read(write_shards(tmp_path / "many", [tensors])).tensors.keys() == tensors.keys() - inverse.keys()


def experts(names: Mapping[str, str], rows: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {name: rng.standard_normal(rows[kind]).astype(np.float32) for name, kind in names.items()}


MIXTRAL = {**models.PLAIN, "model_type": "mixtral"}
SHAPES = {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}


def test_mixtrals_names(tmp_path):
    short = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    prefix = "model.layers.7.block_sparse_moe."
    tensors = experts({f"{prefix}experts.{e}.{s}.weight": kind for e in range(3) for s, kind in short.items()}, SHAPES)
    tensors[f"{prefix}gate.weight"] = np.ones((3, 4), np.float32)
    checkpoint = read(write_folder(tmp_path / "m", tensors, MIXTRAL))
    assert checkpoint.tensors["model.layers.7.mlp.gate.weight"].shape == (3, 4)
    for expert in range(3):
        for name, kind in short.items():
            found = values(checkpoint, f"model.layers.7.mlp.experts.{expert}.{kind}.weight")
            assert np.array_equal(found, tensors[f"{prefix}experts.{expert}.{name}.weight"])
    assert len(checkpoint.tensors) == 10


@pytest.mark.parametrize("box", ["mlp", "block_sparse_moe"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_stacked_experts(tmp_path, box, dtype):
    rng = np.random.default_rng(6)
    both = rng.integers(-9, 9, (3, 12, 4)).astype(np.float32)
    down = rng.integers(-9, 9, (3, 4, 6)).astype(np.float32)
    prefix = f"model.layers.0.{box}.experts."
    tensors = {f"{prefix}gate_up_proj": both, f"{prefix}down_proj": down}
    checkpoint = read(write_folder(tmp_path / "m", tensors, MIXTRAL, dtype))
    expected = {"gate_proj": both[:, :6], "up_proj": both[:, 6:], "down_proj": down}
    assert len(checkpoint.tensors) == 9
    for kind, stacked in expected.items():
        for expert in range(3):
            name = f"model.layers.0.mlp.experts.{expert}.{kind}.weight"
            assert checkpoint.tensors[name].name == name
            assert np.array_equal(values(checkpoint, name), stacked[expert])


@pytest.mark.parametrize("shape", [(3, 5, 4), (6, 4), (1, 3, 2, 4), (5000, 2, 1)])
def test_stacked_experts_of_another_shape(tmp_path, shape):
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": np.zeros(shape, np.float32)}
    assert "gate_up_proj" in refused(write_folder(tmp_path / "m", tensors))


# -- texts ----------------------------------------------------------------------------------------------------------


def test_texts(plain):
    texts = {"tokenizer.json": b'{"\xc3\xa4": 1}', "chat_template.jinja": b"{{ x }}", "generation_config.json": b"{}"}
    texts["tokenizer_config.json"] = b'{"chat_template": "another"}'
    for name, text in texts.items():
        (plain / name).write_bytes(text)
    (plain / "README.md").write_text("not this")
    assert read(plain).texts == texts


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ ä }}", "{{ ä }}"),
        ([{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}], "b"),
        ([{"name": "tool_use", "template": "a"}], "a"),
        ([{"name": "tool_use", "template": "a"}, {"name": "rag", "template": "b"}], None),
        ([["default", "a"], {"name": ["x"]}, 7], None),
        (None, None),
        (7, None),
        ("", None),
    ],
)
def test_the_template_of_an_older_checkpoint(plain, template, expected):
    (plain / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    found = read(plain).texts.get("chat_template.jinja")
    assert found == (expected.encode() if expected else None)


def test_without_texts(plain):
    assert read(plain).texts == {}


def test_a_tokenizer_configuration_that_is_no_json(plain):
    (plain / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json" in refused(plain)


# -- refusals -------------------------------------------------------------------------------------------------------


def test_a_missing_folder(tmp_path):
    assert "no such file" in refused(tmp_path / "none")


def test_a_folder_without_configuration(tmp_path):
    assert "config.json" in refused(tmp_path)
    assert "config.json" in refusal(lambda: read_checkpoint(str(tmp_path)), tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}"])
def test_a_configuration_that_makes_no_sense(plain, text):
    (plain / "config.json").write_bytes(text)
    assert "config.json" in refused(plain)


@pytest.mark.timeout(60)
def test_a_pipe_is_not_waited_for(plain):
    (plain / "config.json").unlink()
    os.mkfifo(plain / "config.json")
    assert "not a regular file" in refused(plain)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_text_beyond_all_measure(plain, name):
    with (plain / name).open("ab") as file:
        file.truncate(2**40)
    assert name in refused(plain)


@pytest.mark.parametrize(
    ("added", "named"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes'"),
        ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, "'hqq'"),
        ({"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}, "'mlx'"),
        ({"quantization": {"bits": 4}}, "'mlx'"),
        ({"compression_config": {"quant_method": "sparse"}}, "'sparse'"),
        ({"quantization_config": [1]}, "quantised"),
    ],
)
def test_quantised_weights_are_refused_by_their_method(tmp_path, added, named):
    folder = write_folder(tmp_path / "m", {}, {**models.PLAIN, **added})
    assert named in refused(folder)


def test_an_empty_quantisation_is_none(tmp_path):
    config = {**models.PLAIN, "quantization_config": None}
    assert read(write_folder(tmp_path / "m", {"a": np.ones(3, np.float32)}, config)).config_json == config


def test_a_model_of_more_than_text(tmp_path):
    assert "'llama4'" in refused(write_folder(tmp_path / "m", {}, {"model_type": "llama4", "text_config": {}}))


def test_no_weights(plain):
    (plain / WEIGHTS).unlink()
    assert INDEX in refused(plain)


def test_a_missing_shard_is_named(tmp_path):
    folder = write_shards(tmp_path / "m", [{"a": np.ones(3, np.float32)}, {"b": np.ones(3, np.float32)}])
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refused(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "", ".", "..", "a\0b", 7, None, ["x"]])
def test_an_index_that_leaves_the_folder(tmp_path, name):
    folder = write_shards(tmp_path / "m", [{"a": np.ones(3, np.float32)}])
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert "weight_map" in refused(folder)


@pytest.mark.parametrize("found", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}])
def test_an_index_without_a_map(tmp_path, found):
    folder = write_shards(tmp_path / "m", [{"a": np.ones(3, np.float32)}])
    (folder / INDEX).write_text(json.dumps(found))
    assert "weight_map" in refused(folder)


def test_an_index_that_names_another_tensor(tmp_path):
    folder = write_shards(tmp_path / "m", [{"a": np.ones(3, np.float32)}])
    placed = {"a": "model-00001-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    assert "'b'" in refused(folder)


def test_a_tensor_in_two_shards(tmp_path):
    folder = write_shards(tmp_path / "m", [{"a": np.ones(3, np.float32)}, {"b": np.ones(3, np.float32)}])
    both = safetensors_bytes({"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)})
    (folder / "model-00002-of-00002.safetensors").write_bytes(both)
    assert "'a' appears twice" in refused(folder)


def test_a_tensor_under_both_names(tmp_path):
    names = ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight")
    tensors = {name: np.ones((2, 2), np.float32) for name in names}
    assert "appears twice" in refused(write_folder(tmp_path / "m", tensors, MIXTRAL))


@pytest.mark.parametrize(
    ("dtype", "width"), [("F64", 8), ("I64", 8), ("U8", 1), ("F8_E4M3", 1), ("BOOL", 1), ("F3_NEW", 1)]
)
def test_another_dtype_is_refused_by_name(plain, dtype, width):
    header = {"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * width]}}
    (plain / WEIGHTS).write_bytes(with_header(header) + bytes(2 * width))
    sentence = refused(plain)
    assert dtype in sentence
    assert "'x'" in sentence
    assert "BF16" in sentence


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry([2], 0, 8), "b": entry([2], 4, 12)},  # overlapping
        {"a": entry([2], 0, 8), "b": entry([2], 0, 8)},
        {"a": entry([2], 0, 8), "b": entry([4], 8, 24)},  # past the end
        {"a": entry([4], 0, 16), "b": entry([0], 16, 16)},  # without values
        {"a": entry([2], 8, 16)},  # a hole
        {"a": entry([3], 0, 16)},  # of another size
        {"a": entry([2**62, 2**62], 0, 16)},
        {"a": entry([2**63, 2], 0, 0)},
        {"a": entry([-4], 0, 16)},
        {"a": entry([-2, -2], 0, 16)},
        {"a": entry([4.0], 0, 16)},
        {"a": entry([4], 16, 0)},
        {"a": entry([4], -16, 0)},
        {"a": entry(None, 0, 16)},
        {"a": entry([4], 0, 16, None)},
        {"a": entry([4], 0, 16, "F33")},
        {"a": ["F32", [4], [0, 16]]},
        {"a": 7},
        [],
        b"",
        b"null",
        b"{" * 1000,
        b'{"a":' * 10_000,
        b"\xff" * 20,
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    ],
)
def test_headers_that_make_no_sense(plain, header):
    (plain / WEIGHTS).write_bytes(with_header(header) + bytes(16))
    assert WEIGHTS in refused(plain)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001])
def test_the_length_of_a_header_is_not_believed(plain, length):
    data = (plain / WEIGHTS).read_bytes()
    (plain / WEIGHTS).write_bytes(length.to_bytes(8, "little") + data[8:])
    assert within_bounds(lambda: read(plain)) is None


def test_without_safetensors_the_sentence_says_what_to_install(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"pip install 'mpillama\[convert\]'"):
        safetensors_table.read_safetensors_table(str(plain / WEIGHTS), 0)


def test_one_file_of_a_checkpoint(plain):
    assert "folder" in refusal(lambda: read_checkpoint(str(plain / WEIGHTS)), plain)


# -- random damage --------------------------------------------------------------------------------------------------

SMALL = {Q: np.ones((4, 4), np.float32), "model.layers.0.mlp.experts.down_proj": np.ones((2, 3, 4), np.float32)}
SMALL_FILE = safetensors_bytes(SMALL)


@pytest.mark.timeout(600)
@given(data=mangled(SMALL_FILE, len(SMALL_FILE) - 160))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_damage_to_a_file(tmp_path, data):
    folder = write_folder(tmp_path / "m", {})
    (folder / WEIGHTS).write_bytes(data)
    within_bounds(lambda: read(folder))


@pytest.mark.timeout(600)
@given(damage=st.data(), name=st.sampled_from(["config.json", INDEX, "tokenizer_config.json"]))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_damage_to_a_text(tmp_path, damage, name):
    folder = write_shards(tmp_path / "m", [{"a": np.ones(3, np.float32)}, {"b": np.ones(3, np.float32)}])
    (folder / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default", "template": "x"}]}')
    text = (folder / name).read_bytes()
    (folder / name).write_bytes(damage.draw(mangled(text, len(text))))
    within_bounds(lambda: read(folder))


def test_every_truncation_is_refused(plain):
    (plain / WEIGHTS).write_bytes(SMALL_FILE)
    for length in range(len(SMALL_FILE)):
        (plain / WEIGHTS).write_bytes(SMALL_FILE[:length])
        refused(plain)
