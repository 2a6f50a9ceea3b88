"""The cache on disk: what left memory is found again, also by other ranks and runs, and never something else."""

import errno
import gc
import os
import threading
import time
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mpillama.engine import cache_folder
from mpillama.engine.cache_folder import CacheFolder, FolderSettings, Place
from mpillama.engine.engine import Engine
from mpillama.formats import cache_file
from mpillama.models.cache import KVCache
from mpillama.models.cache_layout import Coverage, Layout
from mpillama.models.config import ModelConfig
from mpillama.models.partition import Division
from mpillama.text.tokenizer import Tokenizer
from tests import running
from tests import tiny_models as models
from tests.conftest import THREADS, ModelFile
from tests.engine.test_engine import alone, check_company, make_request, new_engine, run_to_the_end

PLENTY = 1 << 30
MODEL = "0123456789abcdef" * 2
EIGHT_LAYERS = {"num_hidden_layers": 8}


@pytest.fixture(scope="module", params=["toy", "latent", "delta"])
def model(request, model_file: ModelFile, tmp_path_factory):
    if request.param != "latent":
        return running.load(model_file(request.param, "q8_0"), THREADS)
    path = tmp_path_factory.mktemp("latents") / "latents.h5"
    models.write_random(path, models.LATENT_TOY, "q8_0")
    return running.load(path, THREADS)


@pytest.fixture(scope="module")
def toy_model(model_file: ModelFile):
    return running.load(model_file("toy", "q8_0"), THREADS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(models.toy_tokenizer(), bos_token_id=models.BOS, eos_token_ids=(models.EOS,), add_bos=True)


def open_folder(path: Path, executor, limit: int = PLENTY, name: str = MODEL) -> CacheFolder:
    model = executor.model
    return folder_of(path, model.config, model.part, executor.cache, limit=limit, name=name)


def folder_of(path, config, part, cache, kv_type="f16", limit=PLENTY, name=MODEL) -> CacheFolder:
    """The folder of a rank that has a `part` of a model."""
    settings = FolderSettings(path, name, limit)
    return CacheFolder(
        settings, cache, partial(Coverage.of_rank, config, part), partial(_layout, config, part, kv_type)
    )


def _layout(config, part, kv_type, kind, coverage) -> Layout:
    return Layout(config, part, kv_type, kind, coverage)


def closed(engine: Engine) -> Engine:
    """Save all that is in memory, as at the end of a run."""
    engine.save_cache()
    engine.executor.end(0)
    return engine


def files_in(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def test_answers_do_not_depend_on_what_comes_from_files(model, tokenizer, tmp_path):
    """A pool so small that texts leave it all the time; then another run, which begins with their files."""
    for seed in (1, 2):
        engine = check_company(
            model, tokenizer, seed, speculate=3, blocks=6, states=12, open_folder=partial(open_folder, tmp_path)
        )
        closed(engine)
        assert engine.disk.counts.loaded > 0
        assert engine.disk.counts.saved > 0
    assert files_in(tmp_path)
    assert all(path.suffix in (".kv", ".state") for path in files_in(tmp_path))


def test_a_restarted_run_goes_on_where_the_last_one_ended(model, tokenizer, tmp_path):
    prompt = np.random.default_rng(4).integers(5, models.TOY_VOCABULARY, 230).tolist()
    first, second = make_request(0, prompt, 12), make_request(0, prompt, 12)
    engine = new_engine(model, tokenizer, open_folder=partial(open_folder, tmp_path))
    engine.submit(first)
    run_to_the_end(engine)
    closed(engine)
    engine = new_engine(model, tokenizer, open_folder=partial(open_folder, tmp_path))
    sequence = engine.submit(second)
    run_to_the_end(engine)
    closed(engine)
    assert sequence.cached_tokens == 192
    assert engine.disk.counts.loaded == 3 + bool(model.config.has_state)
    assert engine.disk.counts.lacked == 0
    assert first.on_logits.digest.hexdigest() == second.on_logits.digest.hexdigest()
    assert engine.pool.available == 8


def test_another_model_or_salt_finds_nothing(toy_model, tokenizer, tmp_path):
    from dataclasses import replace

    prompt = list(range(5, 205))
    engine = new_engine(toy_model, tokenizer, open_folder=partial(open_folder, tmp_path))
    engine.submit(make_request(0, prompt, 2))
    run_to_the_end(engine)
    closed(engine)
    for name, salt, cached in (("f" * 32, "", 0), (MODEL, "somebody", 0), (MODEL, "", 192)):
        engine = new_engine(toy_model, tokenizer, open_folder=partial(open_folder, tmp_path, name=name))
        sequence = engine.submit(replace(make_request(0, prompt, 2), cache_salt=salt))
        run_to_the_end(engine)
        engine.executor.end(0)
        assert sequence.cached_tokens == cached


def damage(path: Path, rng: np.random.Generator) -> None:
    """Leave a file as a killed writer, a full disk or a bad sector would."""
    data, way = bytearray(path.read_bytes()), rng.integers(6)
    place = int(rng.integers(len(data)))
    if way == 0:
        path.unlink()
        return
    if way == 1:
        data = data[:place]
    elif way == 2:
        data[place] ^= 1 << int(rng.integers(8))
    elif way == 3:
        data[place : place + 512] = bytes(min(512, len(data) - place))
    elif way == 4:
        data = bytearray(len(data))
    else:
        others = [p for p in path.parent.parent.rglob("*") if p.is_file() and p != path and p.suffix == path.suffix]
        data = others[int(rng.integers(len(others)))].read_bytes()  # a whole file, of another text
    path.write_bytes(data)


def test_two_hundred_torn_files_never_give_a_wrong_answer(model, tokenizer, tmp_path):
    """What is damaged is computed again, and written again."""
    rng, damaged, loaded = np.random.default_rng(9), 0, 0
    prompts = [rng.integers(5, models.TOY_VOCABULARY, int(n)).tolist() for n in rng.integers(130, 250, 4)]
    truth = [alone(model, tokenizer, make_request(i, prompt, 5))[1] for i, prompt in enumerate(prompts)]
    while damaged < 70:
        engine = new_engine(model, tokenizer, blocks=16, states=16, open_folder=partial(open_folder, tmp_path))
        requests = [make_request(i, prompt, 5) for i, prompt in enumerate(prompts)]
        for request in requests:
            engine.submit(request)
        run_to_the_end(engine)
        closed(engine)
        loaded += engine.disk.counts.loaded
        assert [request.on_logits.digest.hexdigest() for request in requests] == truth
        files = files_in(tmp_path)
        for path in rng.permutation(np.array(files, object))[: len(files) // 2]:
            damage(path, rng)
            damaged += 1
    assert loaded > 0


def numbered(config: ModelConfig, part, kv_type: str, places: int) -> KVCache:
    """A cache whose numbers tell layer, array, place and unit, whoever holds it."""
    cache = KVCache(config, part, places, kv_type, places)
    for kind in ("block", "state"):
        layout = Layout(config, part, kv_type, kind, Coverage.of_rank(config, part, kind))
        for place in range(places):
            for run, view in layout.views(cache.layers, place):
                for unit, of_unit in zip(run.units, view, strict=True):
                    rng = np.random.default_rng([*run.key, place, unit, kind == "state"])
                    of_unit[...] = rng.integers(-100, 100, of_unit.shape)
    return cache


SHAPES = {
    "heads": {**models.AWKWARD, **EIGHT_LAYERS},
    "latents": {**models.LATENT_TOY, **EIGHT_LAYERS, "first_k_dense_replace": 8},
    "states": {**models.DELTA_TOY, **EIGHT_LAYERS},
    "index keys": {
        **models.BLOCK_SPARSE_TOY,
        **EIGHT_LAYERS,
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 4,
        "mlp_layer_types": None,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kv_type", ["f16", "q8", "q4"])
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 1), (3, 1)), ((3, 1), (2, 1)), ((1, 1), (11, 1)), ((11, 1), (4, 1)), ((4, 2), (3, 1)), ((3, 1), (6, 3))],
)
def test_files_are_split_anew(shape, kv_type, before, after, tmp_path):
    """Written by some ranks and stages, read by others; ranks that share a head, or have none, included."""
    config = ModelConfig.from_hf(SHAPES[shape])
    for ranks, stages in (before, after):
        parts = config.partition(Division(ranks, stages=stages))
        wanted = [numbered(config, part, kv_type, 2) for part in parts]
        if (ranks, stages) == before:
            folders = [folder_of(tmp_path, config, p, c, kv_type) for p, c in zip(parts, wanted, strict=True)]
            for folder in folders:
                for kind in ("block", "state"):
                    folder.save(Place(kind, 1, b"d" * 16), time.time_ns())
                folder.close(lambda: None)
        for part, found in zip(parts, wanted, strict=True):
            cache = KVCache(config, part, 2, kv_type, 2)
            folder = folder_of(tmp_path, config, part, cache, kv_type)
            for kind in ("block", "state"):
                assert folder.holds(kind, b"d" * 16)
                assert folder.load(Place(kind, 0, b"d" * 16))
            folder.close(lambda: None)
            for layer, of_layer in zip(cache.layers, found.layers, strict=True):
                assert all(np.array_equal(a[0], b[1]) for a, b in zip(layer, of_layer, strict=True))


def test_a_part_that_nobody_wrote_is_missed(tmp_path):
    config = ModelConfig.from_hf(SHAPES["heads"])
    for part in config.partition(3)[:2]:
        folder = folder_of(tmp_path, config, part, numbered(config, part, "f16", 1))
        folder.save(Place("block", 0, b"d" * 16), time.time_ns())
        folder.close(lambda: None)
    for part, has in zip(config.partition(2), (True, False), strict=True):
        folder = folder_of(tmp_path, config, part, KVCache(config, part, 1, "f16"))
        assert folder.holds("block", b"d" * 16) == has
        assert folder.load(Place("block", 0, b"d" * 16)) == has
        folder.close(lambda: None)


def test_what_one_file_has_filled_a_torn_one_does_not_spoil(tmp_path):
    """Rank 0 of 2 finds its second head in one file, and heads on both sides of it in the next one, which is torn."""
    config = ModelConfig.from_hf({**models.AWKWARD, "num_attention_heads": 8, "num_key_value_heads": 8})
    key = config.blocks[0].attention.kv_split
    own, digest = config.partition(2)[0], b"d" * 16
    assert list(own[key]) == [0, 1, 2, 3]
    files = {}
    for ranks, rank in ((8, 1), (1, 0), (8, 0), (8, 2), (8, 3)):
        part = config.partition(ranks)[rank]
        writer = folder_of(tmp_path, config, part, numbered(config, part, "f16", 1))
        writer.save(Place("block", 0, digest), time.time_ns())
        writer.close(lambda: None)
        files[ranks, rank] = writer._path("block", digest)
    tear(writer, files[1, 0], digest, unit=1)
    reader = folder_of(tmp_path, config, own, KVCache(config, own, 1, "f16"))
    reader._others = lambda kind, digest: list(files.values())  # by name they come in another order
    assert reader.load(Place("block", 0, digest))
    reader.close(lambda: None)
    for found, right in zip(reader.cache.layers, numbered(config, own, "f16", 1).layers, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(found, right, strict=True))


def tear(folder: CacheFolder, path: Path, digest: bytes, unit: int) -> None:
    """Spoil a unit's record in the first stripe of a file."""
    file = folder._open(path, "block", digest)
    run = next(iter(file.layout.runs.values()))
    start = file._records_start + run.offset + run.bytes * (unit - run.units.start)
    file.close()
    data = bytearray(path.read_bytes())
    data[start : start + run.bytes] = bytes(run.bytes)
    path.write_bytes(data)


def one_block(path: Path, limit: int = PLENTY, name: str = MODEL) -> CacheFolder:
    config = ModelConfig.from_hf(models.AWKWARD)
    (part,) = config.partition(1)
    return folder_of(path, config, part, numbered(config, part, "f16", 1), limit=limit, name=name)


def test_a_folder_that_the_system_refuses_to_look_into_is_empty(tmp_path, caplog):
    """As one that belongs to somebody else; here its name is too long."""
    folder, place = one_block(tmp_path, name="m" * 300), Place("block", 0, b"d" * 16)
    assert not folder.holds("block", place.digest)
    assert not folder.load(place)
    folder.save(place, time.time_ns())
    folder.close(lambda: None)
    assert folder.off
    assert "cannot be written" in caplog.text


def test_a_file_that_may_not_be_deleted_keeps_no_other_one(tmp_path, monkeypatch):
    for number in range(3):
        folder = one_block(tmp_path)
        folder.save(Place("block", 0, bytes([number]) * 16), 10**18 + number)
        folder.close(lambda: None)
    oldest, *others = sorted(files_in(tmp_path), key=lambda path: path.stat().st_mtime_ns)
    unlink = Path.unlink

    def refuse(path, missing_ok=False):
        if path == oldest:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    one_block(tmp_path, limit=oldest.stat().st_size * 5 // 4).close(lambda: None)
    assert files_in(tmp_path) == [oldest]
    assert others


@pytest.mark.parametrize("deleted", ["the file", "its folder"])
def test_what_others_delete_meanwhile_is_no_error(deleted, tmp_path, monkeypatch):
    written = []

    def write(path, *arguments):
        written.append(path)
        if deleted == "its folder" and len(written) == 1:
            path.parent.rmdir()
        size = cache_file.write_cache_file(path, *arguments)
        if deleted == "the file":
            path.unlink()
        return size

    monkeypatch.setattr(cache_folder, "write_cache_file", write)
    folder = one_block(tmp_path)
    folder.save(Place("block", 0, b"d" * 16), time.time_ns())
    folder.close(lambda: None)
    assert not folder.off
    assert len(files_in(tmp_path)) == (deleted == "its folder")


def test_too_little_memory_for_a_copy_drops_it(tmp_path, monkeypatch):
    folder = one_block(tmp_path)

    def none(*arguments):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(cache_folder.np, "empty", none)
        folder.save(Place("block", 0, b"d" * 16), time.time_ns())
    folder.save(Place("block", 0, b"e" * 16), time.time_ns())
    folder.close(lambda: None)
    assert [path.name[:32] for path in files_in(tmp_path)] == [(b"e" * 16).hex()]


def test_who_waits_for_a_slow_disk_shows_that_files_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_folder, "MOST_PENDING", 1)
    monkeypatch.setattr(cache_folder, "TICK", 0.01)

    def slow(*arguments):
        time.sleep(0.05)
        return cache_file.write_cache_file(*arguments)

    monkeypatch.setattr(cache_folder, "write_cache_file", slow)
    folder, told = one_block(tmp_path), []
    for number in range(4):
        folder.save(Place("block", 0, bytes([number]) * 16), time.time_ns(), partial(told.append, number))
    folder.close(lambda: None)
    assert told == [1, 2, 3]
    assert len(files_in(tmp_path)) == 4


def test_an_abandoned_folder_keeps_neither_thread_nor_memory(tmp_path, monkeypatch):
    """It ends after the file that it is at."""
    may_go_on = threading.Event()

    def write(*arguments):
        may_go_on.wait(20)
        return cache_file.write_cache_file(*arguments)

    monkeypatch.setattr(cache_folder, "write_cache_file", write)
    folder = one_block(tmp_path)
    for number in range(3):
        folder.save(Place("block", 0, bytes([number]) * 16), time.time_ns())
    folder.abandon()
    folder.save(Place("block", 0, b"d" * 16), time.time_ns())
    thread, cache = folder._thread, weakref.ref(folder.cache)
    may_go_on.set()
    thread.join(20)
    assert not thread.is_alive()
    del folder
    gc.collect()
    assert cache() is None
    assert len(files_in(tmp_path)) <= 1


def test_the_files_that_were_used_longest_ago_make_room(toy_model, tokenizer, tmp_path):
    """The beginning of a text goes after its end; what is read is used."""
    prompts = [np.random.default_rng(i).integers(5, 300, 200).tolist() for i in range(6)]
    for number, prompt in enumerate(prompts):
        engine = new_engine(toy_model, tokenizer, open_folder=partial(open_folder, tmp_path))
        for each in {number: prompt, 0: prompts[0]}.values():
            engine.submit(make_request(0, each, 2))
            run_to_the_end(engine)
        closed(engine)
    sizes = [path.stat().st_size for path in files_in(tmp_path)]
    assert len(sizes) == 18
    (tmp_path / "keep").write_bytes(bytes(10_000))
    limit = 9 * sizes[0]
    closed(new_engine(toy_model, tokenizer, open_folder=partial(open_folder, tmp_path, limit=limit)))
    assert sum(path.stat().st_size for path in files_in(tmp_path) if path.suffix == ".kv") <= limit
    assert (tmp_path / "keep").exists()
    engine = new_engine(toy_model, tokenizer, open_folder=partial(open_folder, tmp_path))
    cached = []
    for prompt in prompts:
        cached.append(engine.submit(make_request(0, prompt, 2)))
        run_to_the_end(engine)
    engine.executor.end(0)
    assert [s.cached_tokens for s in cached] == [192, 0, 0, 0, 128, 192]


def test_a_full_disk_is_told_once_and_all_goes_on(toy_model, tokenizer, tmp_path, monkeypatch, caplog):
    written, pwritev = [], os.pwritev

    def full(fd, buffers, offset):
        if len(written) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(fd)
        return pwritev(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", full)
    engine = check_company(toy_model, tokenizer, 1, speculate=0, blocks=6, open_folder=partial(open_folder, tmp_path))
    closed(engine)
    assert engine.executor.folder.off
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "No space left" in caplog.text
    assert len(files_in(tmp_path)) == 2
    assert not list(tmp_path.rglob(f"*{cache_file.NEW}"))


def test_what_is_too_much_to_be_written_is_dropped_unless_somebody_waits(toy_model, tokenizer, tmp_path, monkeypatch):
    """A slow disk holds no step up."""
    monkeypatch.setattr(cache_folder, "MOST_PENDING", 1)
    write = cache_folder.write_cache_file

    def slow(*arguments):
        time.sleep(0.02)
        return write(*arguments)

    monkeypatch.setattr(cache_folder, "write_cache_file", slow)
    engine = new_engine(toy_model, tokenizer, slots=1, open_folder=partial(open_folder, tmp_path))
    for i in range(8):
        engine.submit(make_request(0, np.random.default_rng(i).integers(5, 300, 200).tolist(), 2))
    run_to_the_end(engine)
    in_memory = [digest for _, digest in engine.pool.known()]
    closed(engine)
    stored = {path.name[:32] for path in files_in(tmp_path)}
    assert len(stored) < 24
    assert {digest.hex() for digest in in_memory} <= stored
