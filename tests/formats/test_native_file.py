"""The native file: what is written is read, and whatever else is found is refused in one sentence."""

import hashlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xxhash
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mpillama.errors import UserError
from mpillama.formats.native.reader import NativeModel, NativeReader, TableEntry, unit_checksums
from mpillama.formats.native.table import ALIGNMENT, TYPES_OF_VERSION_1, format_version, metadata_digest, read_table
from mpillama.formats.native.writer import create_file, pack_tensor, seal_file, types_json, write_model
from mpillama.models.config import ModelConfig
from mpillama.models.tensors import TensorSpec, WeightTypes
from mpillama.quant.registry import WEIGHT_TYPES
from mpillama.quant.types.f32 import F32
from mpillama.quant.types.q8_0 import Q8_0
from tests import tiny_models as models
from tests.conftest import ModelFile
from tests.loading.table_worker import fingerprint

TINY = {
    "model_type": "llama",
    "hidden_size": 40,
    "intermediate_size": 70,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "tie_word_embeddings": True,
}
AS_FOUND = (Phase.explicit, Phase.reuse, Phase.generate)
"""No shrinking: a damaged file that makes a process hang costs its time limit again and again."""
TEXTS = {"tokenizer.json": b'{"a": "\xc3\xa4"}', "chat_template.jinja": b"{{ x }}", "generation_config.json": b"{}"}


def write_tiny(path: Path, weight_type: str = "q8_0", texts: dict[str, bytes] = TEXTS) -> None:
    models.write_random(path, TINY, weight_type, texts)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A whole model file of a few dozen kB."""
    path = tmp_path / "tiny.h5"
    write_tiny(path)
    return path


def read_slice(model: NativeModel, spec: TensorSpec, units: range, limit: int | None = None) -> list[np.ndarray]:
    """The arrays of some units."""
    arrays = [np.zeros(a.slice_shape(len(units)), a.dtype) for a in spec.arrays()]
    reader = NativeReader(model, lambda count: None, **({} if limit is None else {"limit": limit}))
    try:
        reader.read(spec, units, arrays)
    finally:
        reader.close()
    assert reader.bytes_read == sum(a.nbytes for a in arrays)
    return arrays


# -- round trip ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_type", list(WEIGHT_TYPES))
@pytest.mark.parametrize("kind", ["awkward", "plain", "toy"])
def test_every_slice_of_every_rank_is_what_was_written(model_file: ModelFile, kind, weight_type):
    config = {"awkward": models.AWKWARD, "plain": models.PLAIN, "toy": models.TOY}[kind]
    model, tensors = read_table(str(model_file(kind, weight_type))), models.random_tensors(config)
    for spec in models.specs_of(config, weight_type):
        packed = pack_tensor(spec, tensors[spec.name])
        for size in (1, 3, 7):
            for part in model.config.partition(size):
                units = spec.units_of(part)
                for found, whole in zip(read_slice(model, spec, units), packed, strict=True):
                    per_unit = len(whole) // spec.units
                    assert np.array_equal(found, whole[units.start * per_unit : units.stop * per_unit])


@pytest.mark.parametrize("weight_type", list(WEIGHT_TYPES))
def test_the_table_says_what_was_written(tmp_path, weight_type):
    path = tmp_path / "m.h5"
    write_tiny(path, weight_type)
    model, tensors = read_table(str(path)), models.random_tensors(TINY)
    assert model.config == ModelConfig.from_hf(TINY)
    assert model.config_json == TINY
    assert model.texts == TEXTS
    assert model.weight_types.default is WEIGHT_TYPES[weight_type]
    assert model.file_size == path.stat().st_size
    assert [a.name for s in model.specs for a in s.arrays()] == list(model.entries)
    for spec in model.specs:
        for array, packed in zip(spec.arrays(), pack_tensor(spec, tensors[spec.name]), strict=True):
            assert np.array_equal(model.entries[array.name].checksums, unit_checksums(packed, spec.units))


def test_datasets_are_aligned_and_apart(tiny):
    entries = sorted(read_table(str(tiny)).entries.values(), key=lambda e: e.offset)
    assert all(e.offset % ALIGNMENT == 0 for e in entries if e.bytes >= ALIGNMENT)
    assert all(a.offset + a.bytes <= b.offset for a, b in pairwise(entries))


def test_weights_lie_at_their_offsets_as_plain_bytes(tiny):
    model, tensors = read_table(str(tiny)), models.random_tensors(TINY)
    data = tiny.read_bytes()
    for spec in model.specs:
        for array, packed in zip(spec.arrays(), pack_tensor(spec, tensors[spec.name]), strict=True):
            entry = model.entries[array.name]
            assert data[entry.offset : entry.offset + entry.bytes] == packed.tobytes()


def test_the_same_model_gives_the_same_bytes(tmp_path):
    first, second = tmp_path / "a.h5", tmp_path / "b.h5"
    for path in (first, second):
        write_tiny(path)
    assert first.read_bytes() == second.read_bytes()


def test_a_model_without_texts_has_none(tmp_path):
    write_tiny(tmp_path / "m.h5", texts={})
    assert read_table(str(tmp_path / "m.h5")).texts == {}


def test_matrices_may_have_types_of_their_own(tmp_path):
    """The digest covers them, and the reader takes each tensor by its own."""
    path, name = tmp_path / "m.h5", "model.layers.0.mlp.down_proj.weight"
    types = WeightTypes(Q8_0, {name: F32})
    specs = ModelConfig.from_hf(TINY).tensors(types)
    entries = create_file(str(path), TINY, types, specs, {})
    checksums = {key: entry.checksums for key, entry in entries.items()}
    seal_file(str(path), TINY, types, entries, {}, checksums)
    model = read_table(str(path))
    assert {s.name for s in model.specs if s.split is not None and s.weight_type == F32} == {name}


def test_a_tensor_of_another_shape_is_refused_and_nothing_is_left(tmp_path):
    tensors = {**models.random_tensors(TINY), "model.norm.weight": np.ones(41, np.float32)}
    with pytest.raises(UserError, match=r"model\.norm\.weight.*\(41,\).*\(40,\)"):
        write_model(str(tmp_path / "m.h5"), TINY, Q8_0, tensors.__getitem__, {})
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_leaves_the_old_file(tiny):
    before = tiny.read_bytes()
    with pytest.raises(KeyError):
        write_model(str(tiny), TINY, Q8_0, {}.__getitem__, {})
    assert tiny.read_bytes() == before
    assert list(tiny.parent.iterdir()) == [tiny]


# -- refusals ------------------------------------------------------------------------------------------------------


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        read_table(str(path))
    sentence = str(caught.value)
    assert sentence.startswith((f"{path}: ", "The model's configuration has "))
    assert "\n" not in sentence
    return sentence


def edited(path: Path, edit: Callable[[h5py.File], Any]) -> str:
    """The refusal after a change through HDF5."""
    with h5py.File(path, "r+") as file:
        edit(file)
    return refusal(path)


def set_text(name: str, value: Any) -> Callable[[h5py.File], None]:
    """Change an attribute; text stays the kind of string that it was."""

    def edit(file: h5py.File) -> None:
        fixed = isinstance(file.attrs[name], bytes) and isinstance(value, str)
        file.attrs[name] = np.bytes_(value) if fixed else value

    return edit


def test_a_missing_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.h5")


def test_a_directory(tmp_path):
    assert "not a regular file" in refusal(tmp_path)


@pytest.mark.timeout(60)
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


def test_an_empty_file(tmp_path):
    (tmp_path / "empty").touch()
    sentence = refusal(tmp_path / "empty")
    assert "(none)" in sentence
    assert "89 48 44 46 0d 0a 1a 0a" in sentence


def test_another_kind_of_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\0\0\0 and more")
    sentence = refusal(tmp_path / "m.gguf")
    assert "47 47 55 46 03 00 00 00" in sentence
    assert "89 48 44 46 0d 0a 1a 0a" in sentence


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tiny):
    tiny.chmod(0)
    assert "permission denied" in refusal(tiny)


def test_a_path_through_a_file(tiny):
    assert "not a directory" in refusal(tiny / "model.h5")


def test_another_hdf5_file(tmp_path):
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["x"] = np.zeros(10)
    assert "format='mpillama'" in refusal(tmp_path / "m.h5")


@pytest.mark.parametrize(("version", "remedy"), [(3, "newer mpillama"), (0, "convert"), (10**9, "newer mpillama")])
def test_another_format_version(tiny, version, remedy):
    sentence = edited(tiny, set_text("format_version", version))
    assert f"version {version}" in sentence
    assert "reads versions 1 and 2" in sentence
    assert remedy in sentence


def write_version_1(path: Path, weight_type: str) -> None:
    """A file as mpillama 0.2 wrote it, by what its documentation says and nothing of the package's writer."""
    types, tensors = {"default": weight_type, "by_name": {}}, models.random_tensors(TINY)
    table, sums = [], []
    with h5py.File(path, "w") as file:
        for spec in models.specs_of(TINY, weight_type):
            for array, values in zip(spec.arrays(), pack_tensor(spec, tensors[spec.name]), strict=True):
                dataset = file.create_dataset(array.name, data=values, dtype=array.dtype)
                table.append([array.name, array.dtype, list(values.shape), dataset.id.get_offset()])
                sums += [xxhash.xxh3_64_intdigest(unit.tobytes()) for unit in np.split(values, spec.units)]
        for name, text in TEXTS.items():
            file[f"text/{name}"] = np.frombuffer(text, np.uint8)
        file["checksums"] = checksums = np.array(sums, np.uint64)
        head = ["mpillama", 1, TINY, types, table, {name: len(text) for name, text in sorted(TEXTS.items())}]
        whole = [json.dumps(head, sort_keys=True).encode(), *(text for _, text in sorted(TEXTS.items()))]
        file.attrs["format"], file.attrs["format_version"] = np.bytes_(b"mpillama"), 1
        file.attrs["config"], file.attrs["weight_types"] = (np.bytes_(json.dumps(j).encode()) for j in (TINY, types))
        digest = hashlib.sha256(b"".join([*whole, checksums.astype("<u8").tobytes()])).hexdigest()
        file.attrs["metadata_sha256"] = np.bytes_(digest.encode())


@pytest.mark.parametrize("weight_type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_files_of_version_1_are_read(tmp_path, weight_type):
    """And what is written of the same model is version 1 still, number for number."""
    write_version_1(tmp_path / "old.h5", weight_type)
    write_tiny(tmp_path / "new.h5", weight_type)
    old, new = (read_table(str(tmp_path / name)) for name in ("old.h5", "new.h5"))
    assert (old.format_version, new.format_version) == (1, 1)
    assert old.weight_types == new.weight_types
    assert old.texts == new.texts
    for spec in old.specs:
        assert all(
            map(np.array_equal, read_slice(old, spec, range(spec.units)), read_slice(new, spec, range(spec.units)))
        )
        for array in spec.arrays():
            assert np.array_equal(old.entries[array.name].checksums, new.entries[array.name].checksums)


def test_the_demo_model_is_of_version_1():
    assert read_table(str(Path(__file__).parents[2] / "data" / "demo.h5")).format_version == 1


@pytest.mark.parametrize("weight_type", [name for name in WEIGHT_TYPES if name not in TYPES_OF_VERSION_1])
def test_newer_weight_types_make_version_2(tmp_path, weight_type):
    """Which mpillama 0.2 refuses by its version: it knows no such types. A single matrix is enough."""
    write_tiny(tmp_path / "m.h5", weight_type)
    assert read_table(str(tmp_path / "m.h5")).format_version == 2
    with h5py.File(tmp_path / "m.h5") as file:
        assert file.attrs["format_version"] == 2
    mixed = WeightTypes(Q8_0, {"model.layers.0.mlp.up_proj.weight": WEIGHT_TYPES[weight_type]})
    assert format_version(mixed) == 2


def test_a_version_is_part_of_the_digest(tmp_path):
    write_tiny(tmp_path / "m.h5", "q5_0")
    assert "header is damaged" in edited(tmp_path / "m.h5", set_text("format_version", 1))


def test_an_unfinished_file(tiny):
    assert "never finished" in edited(tiny, lambda file: file.attrs.__delitem__("metadata_sha256"))


def test_a_file_whose_writer_is_still_at_work(tmp_path):
    types = WeightTypes(Q8_0)
    create_file(str(tmp_path / "m.h5"), TINY, types, ModelConfig.from_hf(TINY).tensors(types), {})
    assert "never finished" in refusal(tmp_path / "m.h5")


def test_another_digest(tiny):
    sentence = edited(tiny, set_text("metadata_sha256", "ab" * 32))
    assert "abab" in sentence
    assert "header is damaged" in sentence


@pytest.mark.parametrize("attribute", ["config", "weight_types"])
@pytest.mark.parametrize("value", ["", "{", "[]", "null", "7", '{"default": 3}', "[" * 50_000, 7, b"\xff\xfe"])
def test_attributes_that_make_no_sense(tiny, attribute, value):
    edited(tiny, set_text(attribute, value))


def test_an_unknown_weight_type(tiny):
    types = json.dumps({"default": "q9_k", "by_name": {}})
    sentence = edited(tiny, set_text("weight_types", types))
    assert "'q9_k'" in sentence
    assert "q8_0" in sentence


def test_a_configuration_that_we_do_not_run(tiny):
    config = json.dumps({**TINY, "model_type": "mamba"})
    assert "model_type='mamba'" in edited(tiny, set_text("config", config))


DOWN = "model.layers.0.mlp.down_proj.weight"


def replace(name: str, data: np.ndarray) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        del file[name]
        file[name] = data

    return edit


def test_a_missing_tensor_is_named(tiny):
    assert DOWN in edited(tiny, lambda file: file.__delitem__(DOWN))


def test_a_tensor_of_another_dtype_is_named(tiny):
    with h5py.File(tiny) as file:
        shape = file[DOWN].shape
    sentence = edited(tiny, replace(DOWN, np.zeros(shape, np.int16)))
    assert DOWN in sentence
    assert "int16" in sentence
    assert "int8" in sentence


def test_a_tensor_of_another_shape_is_named(tiny):
    sentence = edited(tiny, replace(DOWN, np.zeros((3, 3), np.int8)))
    assert DOWN in sentence
    assert "(3, 3)" in sentence


@pytest.mark.parametrize("layout", [{"chunks": True}, {"chunks": True, "compression": "gzip"}])
def test_a_tensor_that_is_not_contiguous_is_named(tiny, layout):
    def edit(file: h5py.File) -> None:
        values = file[DOWN][()]
        del file[DOWN]
        file.create_dataset(DOWN, data=values, **layout)

    assert DOWN in edited(tiny, edit)


def test_a_group_where_a_tensor_should_be(tiny):
    def edit(file: h5py.File) -> None:
        del file[DOWN]
        file.create_group(DOWN)

    edited(tiny, edit)


@pytest.mark.parametrize("checksums", [np.zeros(3, np.uint64), np.zeros((2, 2), np.uint64), np.zeros(9), np.uint64(1)])
def test_other_checksums(tiny, checksums):
    assert "checksums" in edited(tiny, replace("checksums", checksums))


def test_a_changed_text_is_seen(tiny):
    assert "header is damaged" in edited(tiny, replace("text/tokenizer.json", np.frombuffer(b"{}", np.uint8)))


def test_two_tensors_at_one_place_are_refused(tmp_path):
    """A file with a right digest whose table puts two tensors over each other."""
    path, types = tmp_path / "m.h5", WeightTypes(Q8_0)
    specs = ModelConfig.from_hf(TINY).tensors(types)
    entries = create_file(str(path), TINY, types, specs, {})
    up, gate = (entries[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("up", "gate"))
    forged = {**entries, up.spec.name: TableEntry(up.spec, gate.offset, up.checksums)}
    seal_file(str(path), TINY, types, forged, {}, {k: e.checksums for k, e in entries.items()})
    # HDF5 writes a contiguous dataset's place as two 64-bit numbers, address and size.
    there, instead = (e.offset.to_bytes(8, "little") + e.bytes.to_bytes(8, "little") for e in (up, gate))
    data = path.read_bytes()
    assert data.count(there) == 1
    path.write_bytes(data.replace(there, instead))
    refusal(path)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "hidden_size", "head_dim", "intermediate_size"])
def test_absurd_sizes_cost_nothing(tiny, worker, key):
    """A header that promises 10^9 of something is refused at once, without memory for it."""
    config = json.dumps({**TINY, key: 10**9})
    with h5py.File(tiny, "r+") as file:
        set_text("config", config)(file)
    answer = worker.ask(tiny)
    assert "mistake" in answer, answer
    assert answer["grown"] < 2**26


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["checksums", "text/tokenizer.json"])
def test_absurd_datasets_cost_nothing(tiny, worker, name):
    """A dataset of 2^36 entries that were never written: reading it would fill memory with zeros."""
    with h5py.File(tiny, "r+") as file:
        dtype = file[name].dtype
        del file[name]
        file.create_dataset(name, (2**36,), dtype, chunks=(2**20,))
    answer = worker.ask(tiny)
    assert "mistake" in answer, answer
    assert answer["grown"] < 2**26


# -- random damage ---------------------------------------------------------------------------------------------------


class Worker:
    """A process that reads tables (tests/loading/table_worker.py); every question has a time limit."""

    SECONDS = 60

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.loading.table_worker"]
        limited = ["bash", "-c", 'ulimit -v 3000000; exec "$@"', "bash", *command]
        self.process = subprocess.Popen(
            limited, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True
        )

    def ask(self, path: Path) -> dict[str, Any]:
        """What reading the table of `path` gave."""
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], self.SECONDS)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.process.kill()
        return {"failure": "no answer in time" if not ready else f"the process ended with {self.process.wait()}"}

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A fresh worker, warmed up by nothing."""
    worker = Worker()
    yield worker
    worker.close()


class Damaged:
    """A whole file, where its weights lie, and a worker that reads damaged copies."""

    def __init__(self, directory: Path):
        self.path, self.copy = directory / "whole.h5", directory / "damaged.h5"
        write_tiny(self.path)
        self.data = self.path.read_bytes()
        model = read_table(str(self.path))
        self.fingerprint = fingerprint(model)
        weights = np.zeros(len(self.data), bool)
        for entry in model.entries.values():
            weights[entry.offset : entry.offset + entry.bytes] = True
        outside = np.flatnonzero(~weights)
        data = np.frombuffer(self.data, np.uint8)
        self.metadata = outside[data[outside] != 0]  # what holds something
        self.padding = outside[data[outside] == 0]
        self.worker = Worker()

    def check(self, data: bytes) -> dict[str, Any]:
        """Read a damaged copy; anything but a refusal or the very same table is a failure."""
        self.copy.write_bytes(data)
        answer = self.worker.ask(self.copy)
        if "failure" in answer:
            self.worker.close()
            self.worker = Worker()
        assert "failure" not in answer, answer
        assert answer.get("table", self.fingerprint) == self.fingerprint
        assert answer["grown"] < 2**26
        assert "\n" not in answer.get("mistake", "")
        return answer


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Iterator[Damaged]:
    """The file that the tests below damage."""
    damaged = Damaged(tmp_path_factory.mktemp("damaged"))
    yield damaged
    damaged.worker.close()


@pytest.mark.timeout(600)
def test_every_single_byte_of_the_header_in_turn(damaged):
    """Each byte that holds something, once with all bits turned; most of them are noticed."""
    refused = 0
    for place in damaged.metadata:
        data = bytearray(damaged.data)
        data[place] ^= 0xFF
        refused += "mistake" in damaged.check(bytes(data))
    assert refused > 0.8 * len(damaged.metadata)


@pytest.mark.timeout(600)
@given(flips=st.data())
@settings(max_examples=400, deadline=None, phases=AS_FOUND)
def test_random_flips_in_the_header(damaged, flips):
    """One to four bytes, also in the padding, changed to anything."""
    data = bytearray(damaged.data)
    for _ in range(flips.draw(st.integers(1, 4))):
        places = damaged.metadata if flips.draw(st.integers(0, 4)) else damaged.padding
        place = places[flips.draw(st.integers(0, len(places) - 1))]
        data[place] ^= flips.draw(st.integers(1, 255))
    damaged.check(bytes(data))


@pytest.mark.timeout(600)
@given(cut=st.data())
@settings(max_examples=150, deadline=None, phases=AS_FOUND)
def test_random_truncations_are_refused(damaged, cut):
    length = cut.draw(st.integers(0, len(damaged.data) - 1))
    answer = damaged.check(damaged.data[:length])
    assert "mistake" in answer


@pytest.mark.timeout(120)
def test_truncation_to_every_page_and_by_one_byte_is_refused(damaged):
    for length in (*range(0, len(damaged.data), 4096), len(damaged.data) - 1):
        assert "mistake" in damaged.check(damaged.data[:length]), length


# -- reading slices --------------------------------------------------------------------------------------------------


WIDE = {**TINY, "hidden_size": 2**17, "vocab_size": 2**13, "intermediate_size": 32, "head_dim": 32}
"""4 GiB of embeddings in float32: a group of 16 rows is 8 MiB."""


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> NativeModel:
    """A model of more than 8 GiB whose file holds nothing but a few marks; the head lies beyond 2^32."""
    path, types = tmp_path_factory.mktemp("sparse") / "wide.h5", WeightTypes(F32)
    config = {**WIDE, "tie_word_embeddings": False}
    specs = ModelConfig.from_hf(config).tensors(types)
    entries = create_file(str(path), config, types, specs, {})
    seal_file(str(path), config, types, entries, {}, {k: e.checksums for k, e in entries.items()})
    model = read_table(str(path))
    with path.open("r+b") as file:
        for entry in model.entries.values():
            for unit in marked_units(entry):
                file.seek(entry.extent(range(unit, unit + 1))[0])
                file.write(mark(entry, unit).tobytes())
    assert path.stat().st_size > 2**33
    assert path.stat().st_blocks * 512 < 2**20
    return model


def marked_units(entry) -> list[int]:
    """The first, the middle and the last unit, and those around 2^31 and 2^32 of the file."""
    unit_bytes = entry.spec.entries * entry.entry_bytes
    units = entry.bytes // unit_bytes
    borders = [(2**power - entry.offset) // unit_bytes + i for power in (31, 32, 33) for i in (-1, 0, 1)]
    return sorted({0, units // 2, units - 1} | {b for b in borders if 0 <= b < units})


def mark(entry, unit: int) -> np.ndarray:
    """Four numbers that occur nowhere else."""
    return np.array([entry.offset % 9973, unit, unit % 7, 1], np.float32) + np.float32(0.5)


def test_offsets_beyond_32_bits_are_exact(sparse):
    offsets = [entry.offset for entry in sparse.entries.values()]
    assert max(offsets) > 2**32
    assert all(type(offset) is int for offset in offsets)
    assert sum(entry.bytes for entry in sparse.entries.values()) > 2**33


def test_slices_beyond_32_bits_are_read_right(sparse):
    crossed = set()
    for spec in sparse.specs:
        (array,) = spec.arrays()
        entry = sparse.entries[array.name]
        for unit in marked_units(entry):
            (found,) = read_slice(sparse, spec, range(unit, unit + 1))
            start = entry.extent(range(unit, unit + 1))[0]
            crossed |= {p for p in (31, 32, 33) if start <= 2**p < start + found.nbytes}
            assert np.array_equal(found.reshape(-1)[:4], mark(entry, unit))
            assert np.count_nonzero(found) == 4
    assert crossed == {31, 32, 33}


@pytest.mark.parametrize("limit", [1, 7, 1000, 4096, 10**9])
def test_a_slice_read_in_several_calls_is_the_same(tiny, limit, monkeypatch):
    model, calls, real = read_table(str(tiny)), [], os.preadv
    spec = next(s for s in model.specs if s.name == DOWN)
    whole = read_slice(model, spec, range(spec.units))

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(sum(map(len, buffers)))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    again = read_slice(model, spec, range(spec.units), limit)
    assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))
    assert max(calls) <= limit
    assert len(calls) == sum(-(-a.nbytes // limit) for a in whole)


def test_calls_that_return_less_than_asked_are_continued(tiny, monkeypatch):
    """As a network file system or a signal may do."""
    model, real = read_table(str(tiny)), os.preadv
    whole = read_slice(model, model.specs[0], range(model.specs[0].units))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][: 1 + offset % 97]], offset))
    again = read_slice(model, model.specs[0], range(model.specs[0].units))
    assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))


def test_an_idle_rank_reads_nothing(tiny):
    model = read_table(str(tiny))
    for spec in model.specs:
        if spec.split is not None:
            assert all(a.size == 0 for a in read_slice(model, spec, range(spec.units, spec.units)))


def test_a_reader_tells_of_every_byte(tiny):
    model, told = read_table(str(tiny)), []
    reader = NativeReader(model, told.append)
    for spec in model.specs:
        reader.read(spec, range(spec.units), [np.zeros(a.shape, a.dtype) for a in spec.arrays()])
    reader.close()
    assert sum(told) == reader.bytes_read == sum(e.bytes for e in model.entries.values())


# -- a file that changes under the reader ----------------------------------------------------------------------------


def test_a_file_that_vanished_is_a_users_mistake(tiny):
    model = read_table(str(tiny))
    tiny.unlink()
    with pytest.raises(UserError, match=r"tiny\.h5: no such file"):
        NativeReader(model, lambda count: None)


@pytest.mark.parametrize("change", [-1, 1, -10_000])
def test_a_file_of_another_size_is_a_users_mistake(tiny, change):
    model = read_table(str(tiny))
    os.truncate(tiny, model.file_size + change)
    with pytest.raises(UserError) as caught:
        NativeReader(model, lambda count: None)
    assert str(model.file_size) in str(caught.value)
    assert str(model.file_size + change) in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_a_users_mistake(tiny):
    model = read_table(str(tiny))
    spec = model.specs[-2]
    entry = model.entries[spec.arrays()[0].name]
    reader = NativeReader(model, lambda count: None)
    os.truncate(tiny, entry.offset + entry.bytes // 2)
    with pytest.raises(UserError, match=rf"tiny\.h5: tensor {entry.spec.name} .*ends at byte"):
        reader.read(spec, range(spec.units), [np.zeros(a.shape, a.dtype) for a in spec.arrays()])
    reader.close()


def test_an_error_of_the_disk_is_a_users_mistake(tiny, monkeypatch):
    def fail(*args: object) -> int:
        raise OSError(5, "Input/output error")

    model = read_table(str(tiny))
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(UserError, match=r"tiny\.h5: tensor model\.embed_tokens\.weight .*Input/output error"):
        read_slice(model, model.specs[0], range(1))


def test_the_digest_covers_everything_but_the_weights(tiny):
    """A change of any part of the table gives another digest."""
    model = read_table(str(tiny))
    types, entries = types_json(model.weight_types), dict(model.entries)
    name = next(iter(entries))
    entry = entries[name]
    moved = {**entries, name: type(entry)(entry.spec, entry.offset + 8, entry.checksums)}
    other = {**entries, name: type(entry)(entry.spec, entry.offset, entry.checksums + np.uint64(1))}
    variants = [
        (1, {**model.config_json, "rope_theta": 5.0}, types, entries, model.texts),
        (1, model.config_json, {**types, "default": "q4_0"}, entries, model.texts),
        (1, model.config_json, types, moved, model.texts),
        (1, model.config_json, types, other, model.texts),
        (1, model.config_json, types, entries, {**model.texts, "tokenizer.json": b"{}"}),
        (1, model.config_json, types, entries, {k: v for k, v in model.texts.items() if k != "tokenizer.json"}),
        (2, model.config_json, types, entries, model.texts),
    ]
    digests = {metadata_digest(*variant) for variant in variants} | {model.metadata_sha256}
    assert len(digests) == len(variants) + 1
