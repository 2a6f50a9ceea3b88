"""Reading from file systems that fail for a moment, change their files, or allow nothing but reading."""

import errno
import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mpillama.errors import UserError
from mpillama.formats import reading
from mpillama.formats.native.reader import NativeReader
from mpillama.formats.native.table import read_table
from mpillama.formats.reading import BORDER_BYTES, PAUSES, PIECE_BYTES, ReadStoppedError, SourceFile, cut_extent
from tests import tiny_models as models
from tests.conftest import ModelFile

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.bin"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAUSES", (0.0,) * len(PAUSES))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged, also after a test that has set logging up."""
    monkeypatch.setattr(logging.getLogger("mpillama"), "propagate", True)
    caplog.set_level(logging.WARNING, "mpillama")
    return caplog


def failing(times: int, number: int) -> Callable[..., int]:
    """A preadv that fails so many times first."""
    real, left = os.preadv, [times]

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(number, os.strerror(number))
        return real(fd, buffers, offset)

    return preadv


def read(file: SourceFile, offset: int = 100, count: int = 1000) -> bytes:
    buffer = bytearray(count)
    file.read(memoryview(buffer), offset, "some.weight")
    return bytes(buffer)


# -- pieces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 4096, BORDER_BYTES - 1, BORDER_BYTES, 7 * PIECE_BYTES + 12345, 2**36 + 5])
@pytest.mark.parametrize("count", [0, 1, BORDER_BYTES, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2**33 + 77])
def test_pieces_cover_the_extent_and_meet_at_borders(offset: int, count: int) -> None:
    pieces = list(cut_extent(offset, count))
    assert sum(size for _, size in pieces) == count
    assert all(0 < size <= PIECE_BYTES for _, size in pieces)
    for (start, size), (following, _) in pairwise(pieces):
        assert start + size == following
        assert following % BORDER_BYTES == 0
    assert not pieces or pieces[0][0] == offset


def test_a_tensor_of_many_pieces_is_whole(model_file: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    model = read_table(str(model_file("toy", "q8_0")))
    spec = model.specs[0]
    whole = [np.zeros(a.shape, a.dtype) for a in spec.arrays()]
    small = [np.zeros(a.shape, a.dtype) for a in spec.arrays()]
    reader = NativeReader(model, lambda count: None)
    reader.read(spec, range(spec.units), whole)
    monkeypatch.setattr(reading, "PIECE_BYTES", 3 * 512)
    monkeypatch.setattr(reading, "BORDER_BYTES", 512)
    assert len(list(cut_extent(model.entries[spec.name].offset, whole[0].nbytes))) > 8
    reader.read(spec, range(spec.units), small)
    reader.close()
    assert all(np.array_equal(a, b) for a, b in zip(whole, small, strict=True))
    assert whole[0].any()


# -- errors that pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT])
def test_errors_that_pass_are_tried_again_and_told(
    number: int, source: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    file = SourceFile(str(source), len(CONTENT))
    monkeypatch.setattr(os, "preadv", failing(len(PAUSES), number))
    assert read(file) == CONTENT[100:1100]
    assert len(warnings.records) == len(PAUSES)
    sentence = warnings.records[0].getMessage()
    assert "tensor some.weight at byte 100" in sentence
    assert os.strerror(number) in sentence
    file.check_unchanged()
    file.close()


@pytest.mark.parametrize(("number", "tries"), [(errno.EIO, len(PAUSES) + 1), (errno.EBADF, 1)])
def test_errors_that_last_end_after_a_bounded_number_of_tries(
    number: int, tries: int, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = SourceFile(str(source), len(CONTENT))
    asked = []

    def preadv(*arguments: object) -> int:
        asked.append(arguments)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(UserError, match=rf"model\.bin: tensor some\.weight .* byte 100: {os.strerror(number)}"):
        read(file)
    assert len(asked) == tries
    file.close()


def test_opening_is_tried_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = reading.open_for_reading, [2]

    def opened(path: str) -> int:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path)

    monkeypatch.setattr(reading, "open_for_reading", opened)
    file = SourceFile(str(source), len(CONTENT))
    assert read(file) == CONTENT[100:1100]
    file.close()


def test_a_stale_handle_is_opened_again_by_name(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that restarted gives the same file another number."""
    file = SourceFile(str(source), len(CONTENT))
    times, fd = source.stat(), file.fd
    other = source.with_name("other")
    other.write_bytes(CONTENT[::-1])
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(source)
    monkeypatch.setattr(os, "preadv", failing(1, errno.ESTALE))
    assert read(file) == CONTENT[::-1][100:1100]
    assert file.fd == fd
    assert not os.get_inheritable(fd)
    file.close()


def test_another_file_behind_a_stale_handle_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SourceFile(str(source), len(CONTENT))
    other = source.with_name("other")
    other.write_bytes(CONTENT)
    os.utime(other, ns=(0, 0))
    other.replace(source)
    monkeypatch.setattr(os, "preadv", failing(1, errno.ESTALE))
    with pytest.raises(UserError, match="changed while it was read"):
        read(file)
    file.close()


def test_no_file_behind_a_stale_handle_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SourceFile(str(source), len(CONTENT))
    source.unlink()
    monkeypatch.setattr(os, "preadv", failing(1, errno.ESTALE))
    with pytest.raises(UserError, match="vanished while it was read"):
        read(file)
    file.close()


def test_a_stopped_reader_tries_no_more(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SourceFile(str(source), len(CONTENT))
    file.stop()
    with pytest.raises(ReadStoppedError):
        read(file)
    file.close()


# -- files that change ----------------------------------------------------------------------------------------------


def test_a_file_written_to_is_noticed_at_the_end(source: Path) -> None:
    file = SourceFile(str(source), len(CONTENT))
    file.check_unchanged()
    with source.open("r+b") as writer:
        writer.write(b"!")
    os.utime(source, ns=(1, 1))  # the clock of some file systems is coarse
    with pytest.raises(UserError, match=r"model\.bin: changed while it was read"):
        file.check_unchanged()
    file.close()


def test_a_file_without_a_name_is_read_to_its_end(source: Path) -> None:
    file = SourceFile(str(source), len(CONTENT))
    source.unlink()
    assert read(file) == CONTENT[100:1100]
    file.check_unchanged()
    file.close()


# -- nothing but reading --------------------------------------------------------------------------------------------


def read_all(path: Path) -> None:
    model = read_table(str(path))
    reader = NativeReader(model, lambda count: None, verify=True)
    for spec in model.specs:
        reader.read(spec, range(spec.units), [np.zeros(a.shape, a.dtype) for a in spec.arrays()])
    reader.close()
    assert reader.bytes_read > 0


def test_a_file_that_another_process_has_locked_is_read(tmp_path: Path) -> None:
    path = tmp_path / "toy.h5"
    models.write_toy(path)
    with path.open("r+b") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        script = "import sys; from tests.formats.test_reading import read_all, Path; read_all(Path(sys.argv[1]))"
        done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_file_in_a_folder_for_reading_only(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    models.write_toy(folder / "toy.h5")
    (folder / "toy.h5").chmod(0o444)
    folder.chmod(0o555)
    try:
        read_all(folder / "toy.h5")
    finally:
        folder.chmod(0o755)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount")
def test_a_file_on_a_mount_for_reading_only(tmp_path: Path) -> None:
    models.write_toy(tmp_path / "toy.h5")
    script = (
        f"mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path} || exit 77; "
        f"touch {tmp_path}/new && exit 78; "
        f"{sys.executable} -c 'import sys; from tests.formats.test_reading import read_all, Path; "
        f"read_all(Path(sys.argv[1]))' {tmp_path / 'toy.h5'}"
    )
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=60)
    if done.returncode in (1, 77) and "permitted" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr}")
    assert done.returncode == 0, done.stderr
