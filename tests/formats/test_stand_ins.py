"""What stands under a model's name and is none: every refusal says what it is and what to do."""

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from mpillama.errors import UserError
from mpillama.formats.locate import locate_model
from mpillama.loading.model_file import open_model
from tests import golden_models
from tests import tiny_models as models
from tests.formats.test_hugging_face import safetensors_bytes, write_folder

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4b8f1a2c\nsize 4976698672\n"
PAGE = b"\xef\xbb\xbf\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
ZIP = b"PK\x03\x04" + bytes(60)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_model(str(path))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "begins with the bytes" not in sentence
    return sentence


FILES: dict[str, tuple[str, bytes, str]] = {
    "git lfs": ("m.gguf", LFS, "git lfs pull"),
    "git lfs of ours": ("m.h5", LFS, "4,976,698,672 bytes"),
    "page": ("m.gguf", PAGE, "a web page"),
    "xml": ("m.m", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
    "message": ("m.gguf", b"Entry not found", "a server's message (Entry not found)"),
    "json message": ("m.h5", b'{"error": "Access to model x is restricted"}', "restricted"),
    "empty": ("m.gguf", b"", "an empty file"),
    "empty of ours": ("m.h5", b"", "an empty file"),
    "pickle": ("pytorch_model.bin", ZIP, "pickle"),
    "old pickle": ("m.bin", pickle.dumps({"weight": [1.0]}), "pickle"),
    "zip": ("m.zip", ZIP, "an archive (zip)"),
    "gzip": ("m.gguf.gz", gzip.compress(b"GGUF"), "an archive (gzip)"),
    "old ggml": ("m.bin", b"tjgg" + bytes(60), "from before GGUF"),
    "llamafile": ("m.llamafile", b"MZqFpD='\n", "llamafile"),
    "array": ("m.npy", b"\x93NUMPY\x01\x00", "NumPy"),
    "unfinished": ("m.gguf.crdownload", b"GGUF", "has not ended"),
    "cut": ("M.Q8_0.gguf.part2of3", b"\x00" * 64, "`cat M.Q8_0.gguf.part{1..3}of3 > M.Q8_0.gguf`"),
    "cut by letters": ("M.gguf-split-a", b"GGUF", "`cat M.gguf-split-* > M.gguf`"),
    "safetensors": ("model.safetensors", safetensors_bytes({"a": np.ones(3, np.float32)}), "give the folder"),
    "configuration": ("config.json", b"{}", "give the folder"),
    "tokenizer": ("tokenizer.bin", b"\x24\x71\x56\x00" + bytes(8), "--tokenizer"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_model(case, tmp_path):
    name, data, said = FILES[case]
    (tmp_path / name).write_bytes(data)
    sentence = refused(tmp_path / name)
    assert sentence.startswith(f"{tmp_path / name}: ")
    assert said in sentence


@pytest.mark.parametrize("data", [LFS, PAGE, b""], ids=["git lfs", "page", "empty"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_of_a_folder_that_is_something_else_is_named(name, data, tmp_path):
    folder = write_folder(tmp_path / "m", models.random_tensors(models.PLAIN))
    (folder / name).write_bytes(data)
    if name == "tokenizer.json" and not data:
        return  # whoever needs it says so
    assert str(folder / name) in refused(folder)


@pytest.mark.parametrize("length", [0x5A4D, 0x8B1F, 0x0280])
def test_a_header_may_have_a_length_that_looks_like_another_format(length, tmp_path):
    """The lengths are the first bytes of programs, of gzip and of pickles."""
    tensors = models.random_tensors(models.PLAIN) if length > 0x1000 else {"a": np.ones(3, np.float32)}
    folder = write_folder(tmp_path / "m", tensors)
    data = (folder / "model.safetensors").read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    padded = length.to_bytes(8, "little") + header.ljust(length) + data[8 + len(header) :]
    (folder / "model.safetensors").write_bytes(padded)
    if "a" in tensors:
        assert "is missing" in refused(folder)  # its table was read
    else:
        assert open_model(str(folder)).config.num_hidden_layers == 2


# -- folders ----------------------------------------------------------------------------------------------------------


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base", "r": 8}))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes({"a": np.ones(3, np.float32)}))


def adapter_with_configuration(folder: Path) -> None:
    adapter(folder)
    (folder / "config.json").write_text(json.dumps(dict(models.PLAIN)))


def mistral(folder: Path) -> None:
    (folder / "params.json").write_text('{"dim": 32}')
    (folder / "consolidated.safetensors").write_bytes(safetensors_bytes({"a": np.ones(3, np.float32)}))


def meta(folder: Path) -> None:
    (folder / "params.json").write_text('{"dim": 32}')
    (folder / "consolidated.00.pth").write_bytes(ZIP)


def pickles(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(dict(models.PLAIN)))
    (folder / "pytorch_model.bin").write_bytes(ZIP)


def cache(folder: Path) -> None:
    (folder / "snapshots" / "0123abcd").mkdir(parents=True)


def pieces(folder: Path) -> None:
    for number in (1, 2):
        (folder / f"m.gguf.part{number}of2").write_bytes(b"GGUF")


def several(folder: Path) -> None:
    for name in ("a.gguf", "b.gguf", "mmproj-c.gguf"):
        (folder / name).write_bytes(b"GGUF")


def other_name(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(dict(models.PLAIN)))
    (folder / "weights.safetensors").write_bytes(safetensors_bytes({"a": np.ones(3, np.float32)}))


FOLDERS: dict[Callable[[Path], None], str] = {
    adapter: "an adapter (LoRA) of some/base",
    adapter_with_configuration: "an adapter (LoRA) of some/base",
    mistral: "Mistral's own format",
    meta: "Meta's own format",
    pickles: "PyTorch pickles",
    cache: "snapshots/0123abcd",
    pieces: "`cat m.gguf.part{1..2}of2 > m.gguf`",
    several: "give one of a.gguf, b.gguf.",
    other_name: "weights.safetensors",
    lambda folder: None: "a folder without a model",
}


@pytest.mark.parametrize("make", FOLDERS)
def test_a_folder_that_is_no_model(make, tmp_path):
    make(tmp_path)
    assert FOLDERS[make] in refused(tmp_path)


@pytest.mark.parametrize("beside", ["nothing", "config.json", "mmproj"])
def test_a_folder_with_one_gguf_is_that_model(beside, tmp_path):
    path = tmp_path / "model.gguf"
    golden_models.write_gguf(path, "llama", golden_models.as_float32)
    if beside == "config.json":
        (tmp_path / "config.json").write_text("{}")
    elif beside == "mmproj":
        (tmp_path / "mmproj-model.gguf").write_bytes(b"GGUF")
    assert open_model(str(tmp_path)).path == str(path)


def test_the_parts_of_one_gguf_are_one_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=1)
    for number in range(3):
        writer.add_tensor(f"t{number}", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert Path(locate_model(str(tmp_path))).name == "m-00001-of-00003.gguf"


def test_weights_in_hugging_faces_format_go_before_a_gguf_beside_them(tmp_path):
    folder = write_folder(tmp_path / "m", models.random_tensors(models.PLAIN))
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert open_model(str(folder)).path == str(folder)


def test_a_folder_with_one_file_of_ours_is_that_model(tmp_path):
    models.write_toy(tmp_path / "m.h5")
    assert open_model(str(tmp_path)).path == str(tmp_path / "m.h5")
