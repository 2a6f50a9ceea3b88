"""`convert`, `verify`, `--verify`, `perplexity` and `tokenize`, as a user starts them."""

import json
import shutil
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from mpillama.errors import UserError
from mpillama.formats.checkpoints import read_checkpoint
from mpillama.formats.native.table import read_table
from tests import golden_models
from tests import tiny_models as models
from tests.formats.test_importance import importance_for
from tests.system.mpi.launch import PROGRAM, SCRIPTS, TIMEOUT, run, started

pytestmark = pytest.mark.timeout(TIMEOUT + 60)
GOLDEN = golden_models.FOLDER
GREEDY = ("--temperature", "0", "--max-tokens", "1", "--prompt-token-ids", "5,6,7,8,9,10,11,12,13", "--json")
"""One token: formats differ in their tokenizers, and so in where a text ends."""


def convert(ranks: int | None, source: Path, target: Path, *options: str) -> None:
    result = run(ranks, *PROGRAM, "convert", source, target, *options)
    assert result.status == 0, result.stderr
    assert str(target) in result.stdout


def digest(ranks: int | None, *options: str | Path) -> str:
    result = run(ranks, *PROGRAM, *options, *GREEDY)
    assert result.status == 0, result.stderr
    found: str = json.loads(result.stdout)["logits_sha256"]
    return found


def refused(ranks: int | None, *arguments: str | Path) -> str:
    result = run(ranks, *PROGRAM, *arguments)
    assert (result.status, result.stdout) == (2, ""), result
    assert result.stderr.count("\n") == 1
    return result.stderr


# -- convert --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "weights"), [("llama_bias", "q4_k"), ("qwen3_moe", "as-stored")])
def test_any_number_of_ranks_writes_the_same_bytes(family: str, weights: str, tmp_path: Path) -> None:
    for ranks in (None, 2, 3, 5):
        convert(ranks, GOLDEN / family, tmp_path / f"{ranks}.h5", "--weights", weights)
    first = (tmp_path / "None.h5").read_bytes()
    assert all((tmp_path / f"{ranks}.h5").read_bytes() == first for ranks in (2, 3, 5))
    assert not list(tmp_path.glob("*converting*"))


def test_importance_is_used_alike_on_any_number_of_ranks(tmp_path: Path) -> None:
    """Also where ranks cut the columns; and it changes the file."""
    path = importance_for("llama_bias", tmp_path / "importance.gguf")
    for ranks in (None, 3):
        convert(ranks, GOLDEN / "llama_bias", tmp_path / f"{ranks}.h5", "--weights", "q4_k", "--importance", str(path))
    convert(None, GOLDEN / "llama_bias", tmp_path / "without.h5", "--weights", "q4_k")
    files = [(tmp_path / name).read_bytes() for name in ("None.h5", "3.h5", "without.h5")]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("family", ["llama_yarn", "mistral", "qwen2", "mixtral"])
def test_the_converted_file_gives_the_same_bits_as_the_source(family: str, tmp_path: Path) -> None:
    convert(2, GOLDEN / family, tmp_path / "m.h5", "--weights", "q8_0")
    expected = digest(None, "--model", GOLDEN / family, "--weights", "q8_0")
    assert digest(None, "--model", tmp_path / "m.h5", "--verify") == expected
    assert digest(3, "--model", tmp_path / "m.h5", "--verify") == expected


def test_a_gguf_and_a_dllama_file_convert_to_the_same_bits(tmp_path: Path) -> None:
    golden_models.write_gguf(tmp_path / "m.gguf", "qwen3", golden_models.as_float32)
    golden_models.write_dllama(tmp_path / "m.m", "qwen3")
    expected = digest(None, "--model", GOLDEN / "qwen3", "--weights", "q8_0")
    for source in ("m.gguf", "m.m"):
        convert(3, tmp_path / source, tmp_path / "m.h5", "--weights", "q8_0", "--force")
        assert digest(2, "--model", tmp_path / "m.h5") == expected


@pytest.mark.parametrize("ranks", [None, 3])
def test_targets_that_are_refused(ranks: int | None, tmp_path: Path) -> None:
    source = GOLDEN / "llama"
    (tmp_path / "there.h5").write_bytes(b"precious")
    assert "--force" in refused(ranks, "convert", source, tmp_path / "there.h5")
    assert (tmp_path / "there.h5").read_bytes() == b"precious"
    assert "no folder" in refused(ranks, "convert", source, tmp_path / "none" / "m.h5")
    assert "is a folder" in refused(ranks, "convert", source, tmp_path)
    convert(ranks, source, tmp_path / "there.h5", "--force")
    assert read_table(str(tmp_path / "there.h5")).config.num_hidden_layers == 2


def test_what_could_not_be_run_afterwards_is_not_written(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "m.h5"
    shutil.copytree(GOLDEN / "llama", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rope_interleaved": True}))
    assert "rope_interleaved=True" in refused(None, "convert", source, target)
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").unlink()
    assert "tokenizer" in refused(2, "convert", source, target)
    assert not list(tmp_path.glob("m.h5*"))


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_full_disk_leaves_nothing(ranks: int | None, tmp_path: Path) -> None:
    """A bound on the size of files stands in for a full disk: both make a write fail half-way."""
    arguments = ("40000", "convert", GOLDEN / "llama", tmp_path / "m.h5")
    result = run(ranks, SCRIPTS / "limited.py", *arguments)
    assert (result.status, result.stdout) == (2, ""), result
    assert "cannot be written" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_killed_conversion_leaves_no_file_that_looks_whole(tmp_path: Path) -> None:
    source = write_large(tmp_path / "source")
    with started(2, *PROGRAM, "convert", source, tmp_path / "m.h5", "--weights", "q4_0") as launch:
        end = time.monotonic() + TIMEOUT
        while not (left := list(tmp_path.glob("m.h5.converting-*"))):
            assert time.monotonic() < end
            assert launch.process.poll() is None
            time.sleep(0.005)
        time.sleep(0.2)
        launch.kill()
    assert not (tmp_path / "m.h5").exists(), "the conversion was over before it was killed"
    with pytest.raises(UserError, match=r"never finished|damaged"):
        read_table(str(left[0]))


def write_large(folder: Path) -> Path:
    """A checkpoint whose conversion takes a second or two."""
    config = {**models.PLAIN, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    shapes = {s.name: s.source_shape for s in models.specs_of(config)}
    rng = np.random.default_rng(1)
    folder.mkdir()
    save_file({n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(models.toy_tokenizer())
    return folder


# -- verify ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [None, 3])
def test_verify_names_the_tensor_and_the_bytes(ranks: int | None, tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    convert(None, GOLDEN / "qwen3_moe", path)
    whole = run(ranks, *PROGRAM, "verify", path)
    assert (whole.status, whole.stderr) == (0, "")
    assert "all checksums agree" in whole.stdout
    name = "model.layers.1.mlp.experts.up_proj.weight"
    entry = read_table(str(path)).entries[name]
    place = entry.offset + entry.bytes - 5  # in the last expert
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    found = run(ranks, *PROGRAM, "verify", path, "--json")
    assert found.status == 1
    (difference,) = json.loads(found.stdout)["differences"]
    assert difference["tensor"] == name
    assert difference["first_byte"] <= place <= difference["last_byte"]
    sentence = refused(ranks, "--model", path, "--verify", *GREEDY)
    assert name in sentence
    assert str(difference["first_byte"]) in sentence


def write_shards(folder: Path) -> Path:
    """The golden Qwen 3 MoE in two files."""
    tensors = golden_models.family_tensors("qwen3_moe")
    shutil.copytree(GOLDEN / "qwen3_moe", folder)
    (folder / "model.safetensors").unlink()
    placed = {name: f"part{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in ("part0.safetensors", "part1.safetensors"):
        save_file({name: tensors[name] for name in placed if placed[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


@pytest.mark.parametrize("ranks", [None, 3])
@pytest.mark.parametrize("kind", ["gguf", "folder", "dllama"])
def test_verify_checks_what_can_be_checked_of_other_formats(kind: str, ranks: int | None, tmp_path: Path) -> None:
    path = tmp_path / {"gguf": "m.gguf", "folder": "shards", "dllama": "m.m"}[kind]
    if kind == "gguf":
        q8_0 = golden_models.as_type(gguf.GGMLQuantizationType.Q8_0)
        golden_models.write_gguf(path, "qwen3_moe", q8_0)
    elif kind == "dllama":
        golden_models.write_dllama(path, "qwen3_moe")
    else:
        write_shards(path)
    whole = run(ranks, *PROGRAM, "verify", path)
    assert (whole.status, whole.stderr) == (0, "")
    assert "finite values" in whole.stdout
    assert "no checksums" in whole.stdout
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    checkpoint = read_checkpoint(str(path))
    tensor = checkpoint.tensors[name]
    size = tensor.type.row_bytes(tensor.shape[1])
    place = tensor.offset + 3 * size  # in the fourth row, its scale or its first value
    with Path(checkpoint.files[tensor.file]).open("r+b") as file:
        file.seek(place)
        file.write(np.array(np.nan, {"q8_0": np.float16, "f32": np.float32}[tensor.stored]).tobytes())
    found = run(ranks, *PROGRAM, "verify", path, "--json")
    assert found.status == 1
    report = json.loads(found.stdout)
    assert report["checked"] == ["sizes", "table", "finite values"]
    assert report["bytes"] == sum(t.bytes for t in checkpoint.tensors.values())
    wanted = {"tensor": tensor.name, "file": checkpoint.files[tensor.file], "first_byte": place}
    assert report["differences"] == [{**wanted, "last_byte": place + size - 1}]
    told = run(ranks, *PROGRAM, "verify", path)
    assert (told.status, told.stderr) == (1, "")
    assert f"bytes {place} to {place + size - 1} hold numbers that are not finite" in told.stdout


def test_verify_is_refused_for_formats_without_checksums() -> None:
    assert "no checksums" in refused(None, "--model", GOLDEN / "llama", "--verify", *GREEDY)


# -- perplexity and tokenize ----------------------------------------------------------------------------------------


def test_perplexity_depends_on_neither_ranks_nor_batch(demo: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time, there was a llama named Max who lived on the cluster. " * 20)
    options = ("perplexity", "--model", demo, "--file", text, "--context", "64", "--json")
    one_by_one = ("--prefill-chunk", "50")
    found = [json.loads(run(*case).stdout) for case in (
        (None, *PROGRAM, *options), (3, *PROGRAM, *options), (2, *PROGRAM, *options, *one_by_one),
        (None, *PROGRAM, *options, "--prefill-chunk", "1000"),
    )]  # fmt: skip
    assert all(f == found[0] for f in found)
    assert 1 < found[0]["perplexity"] < 20
    assert found[0]["tokens"] == 31 * found[0]["windows"]
    assert found[0]["windows"] % 4 != 0, "the last step shall have fewer windows"


def test_perplexity_mistakes(demo: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("short")
    assert "--context" in refused(None, "perplexity", "--model", demo, "--file", text)
    assert "no such file" in refused(None, "perplexity", "--model", demo, "--file", tmp_path / "none")


def test_tokenize(demo: Path) -> None:
    result = run(None, *PROGRAM, "tokenize", "Once upon a time", "--model", demo, "--json")
    assert result.status == 0, result.stderr
    rows = json.loads(result.stdout)
    assert "".join(row["piece"] for row in rows[1:]) == "Once upon a time"
    assert rows[0]["piece"] == "<|begin|>"


def test_a_type_without_kernels_is_told_with_its_memory(tmp_path: Path) -> None:
    golden_models.write_of_whole_blocks(tmp_path / "folder", 256)
    blocks = golden_models.as_random_blocks(gguf.GGMLQuantizationType.IQ2_XXS)
    golden_models.write_gguf(tmp_path / "m.gguf", str(tmp_path / "folder"), blocks)
    result = run(2, *PROGRAM, "convert", tmp_path / "m.gguf", tmp_path / "m.h5")
    assert result.status == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert "iq2_xxs" in line
    assert "q6_k" in line
    assert "MB in memory" in line
