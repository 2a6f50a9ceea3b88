"""The output file: whole lines, on disk when it says so, continued only by what began it."""

import json
import resource
from pathlib import Path

import pytest

from mpillama.batch.journal import Journal
from mpillama.batch.results import Provenance
from mpillama.errors import UserError

CAME_FROM = Provenance("model", "options", "1")


def result(number: int, came_from: Provenance = CAME_FROM) -> bytes:
    fields = {"line": number, "custom_id": f"id{number}", "error": None, "provenance": came_from.as_json()}
    return json.dumps(fields).encode() + b"\n"


def open_journal(path: Path, came_from: Provenance = CAME_FROM, now=None, before=None) -> Journal:
    return Journal(str(path), came_from, now or {}, before or {})


def written(path: Path, numbers: list[int]) -> None:
    journal = open_journal(path)
    for number in numbers:
        journal.append(number, f"id{number}", result(number), False)
    journal.close()


def test_results_are_found_again(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    written(path, [3, 1])
    journal = open_journal(path)
    assert journal.finished == {3: "id3", 1: "id1"}
    journal.append(2, "id2", result(2), True)
    assert path.read_bytes().count(b"\n") == 2
    journal.flush(now=True)
    assert path.read_bytes() == result(3) + result(1) + result(2)
    journal.close()


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_end_is_cut_off(tmp_path: Path, cut: int):
    path = tmp_path / "out.jsonl"
    written(path, [1, 2])
    path.write_bytes(path.read_bytes()[:-cut])
    journal = open_journal(path)
    assert journal.finished == {1: "id1"}
    assert journal.repaired == len(result(2)) - cut
    journal.append(2, "id2", result(2), False)
    journal.close()
    assert path.read_bytes() == result(1) + result(2)


def test_an_end_of_zeros_is_cut_off(tmp_path: Path):
    """A file system may have given room before the bytes came."""
    path = tmp_path / "out.jsonl"
    written(path, [1])
    path.write_bytes(path.read_bytes() + bytes(500))
    open_journal(path).close()
    assert path.read_bytes() == result(1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"garbage\n" + result(1), "line 1 is no result, but others follow"),
        (b'{"a": 1}\n', "no result of"),
        (result(1, Provenance("other", "options", "1")), "another model"),
        (result(1, Provenance("model", "other", "1")), r"other options \(seed was 1 and is 2\)"),
    ],
)
def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        open_journal(path, now={"seed": 2}, before={"seed": 1})
    assert path.read_bytes() == content


def test_another_version_may_continue(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    written(path, [1])
    journal = open_journal(path, Provenance("model", "options", "2"))
    assert list(journal.finished) == [1]
    journal.close()


def test_two_jobs_do_not_write_one_file(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    first = open_journal(path)
    with pytest.raises(UserError, match="another job"):
        open_journal(path)
    first.close()
    open_journal(path).close()


def test_a_full_disk_keeps_what_was_whole(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    written(path, [1])
    journal = open_journal(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number in range(2, 200):
        journal.append(number, f"id{number}", result(number), False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 1000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            journal.flush(now=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == result(1)
    journal.flush(now=True)
    journal.close()
    assert path.read_bytes().count(b"\n") == 199


def test_an_output_in_no_folder_is_a_mistake(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be written"):
        open_journal(tmp_path / "none" / "out.jsonl")
