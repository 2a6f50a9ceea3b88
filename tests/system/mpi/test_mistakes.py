"""A user's mistake gives status 2 and exactly one sentence, whatever the number of ranks."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpillama.formats.native.table import read_table
from tests.conftest import ModelFile
from tests.system.mpi.launch import PROGRAM, TIMEOUT, Result, run

pytestmark = pytest.mark.timeout(TIMEOUT + 60)

RANKS = pytest.mark.parametrize("ranks", [None, 3])


def check(result: Result, *fragments: str) -> None:
    """One sentence that holds all fragments, in any case, and nothing else."""
    assert result.status == 2, result.stderr
    assert result.stdout == ""
    lines = result.words.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("mpillama: ")
    for fragment in fragments:
        assert fragment.lower() in lines[0].lower()


# -- the command line -------------------------------------------------------------------------------------------------

BEFORE_MPI: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown option": (("--modell", "x"), "--modell"),
    "unknown command": (("generat",), "generat"),
    "no threads": (("--threads", "0"), "--threads"),
    "chat and raw": (("--chat", "--raw"), "--raw"),
}
"""Some of those that tests/cli/test_main.py has in one process."""


@pytest.mark.parametrize("ranks", [None, 3])
@pytest.mark.parametrize("mistake", BEFORE_MPI)
def test_command_line(mistake: str, ranks: int | None) -> None:
    arguments, fragment = BEFORE_MPI[mistake]
    check(run(ranks, *PROGRAM, *arguments), fragment)


@RANKS
@pytest.mark.parametrize("name", ["none.txt", ""])
def test_a_text_that_cannot_be_read_is_told_before_the_model_is_loaded(
    ranks: int | None, name: str, tmp_path: Path
) -> None:
    result = run(ranks, *PROGRAM, "perplexity", "--model", tmp_path / "none.h5", "--file", tmp_path / name)
    check(result, f"--file {tmp_path / name}: ")


@RANKS
def test_unusable_instruction_set(ranks: int | None, toy: Path) -> None:
    check(run(ranks, *PROGRAM, "--model", toy, env={"MPILLAMA_ISA": "avx9"}), "MPILLAMA_ISA=avx9", "generic")


# -- the model file ---------------------------------------------------------------------------------------------------


def missing(directory: Path, toy: Path) -> Path:
    return directory / "none.h5"


def folder(directory: Path, toy: Path) -> Path:
    return directory


def text(directory: Path, toy: Path) -> Path:
    (directory / "model.txt").write_text("no model at all")
    return directory / "model.txt"


def empty(directory: Path, toy: Path) -> Path:
    (directory / "empty.h5").touch()
    return directory / "empty.h5"


def truncated(directory: Path, toy: Path) -> Path:
    (directory / "half.h5").write_bytes(toy.read_bytes()[: toy.stat().st_size // 2])
    return directory / "half.h5"


FILES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "missing": (missing, "no such file"),
    "folder": (folder, "a folder without a model"),
    "text": (text, "no model that mpillama knows"),
    "empty": (empty, "an empty file"),
    "truncated": (truncated, "truncated"),
}


@RANKS
@pytest.mark.parametrize("kind", FILES)
def test_model_file(kind: str, ranks: int | None, toy: Path, tmp_path: Path) -> None:
    make, fragment = FILES[kind]
    path = make(tmp_path, toy)
    check(run(ranks, *PROGRAM, "--model", path, "--quiet"), str(path), fragment)


@pytest.mark.parametrize("kind", FILES)
def test_file_to_inspect(kind: str, toy: Path, tmp_path: Path) -> None:
    make, fragment = FILES[kind]
    path = make(tmp_path, toy)
    check(run(None, *PROGRAM, "inspect", path), str(path), fragment)


@RANKS
def test_model_without_tokenizer(ranks: int | None, model_file: ModelFile) -> None:
    model = model_file("awkward", "q8_0")
    check(run(ranks, *PROGRAM, "--model", model, "--quiet"), str(model), "tokenizer.json")


@RANKS
def test_model_that_returns_nan(ranks: int | None, toy: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.h5"
    shutil.copy(toy, damaged)
    entry = read_table(str(toy)).entries["model.norm.weight"]
    with damaged.open("r+b") as file:
        file.seek(entry.offset)
        file.write(np.full(3, np.nan, np.float32).tobytes())
    check(run(ranks, *PROGRAM, "--model", damaged, "--quiet"), str(damaged), "NaN")


# -- what only the model can tell -------------------------------------------------------------------------------------

WITH_MODEL: dict[str, tuple[tuple[str, ...], str]] = {
    "prompt too long": (("--prompt", "once upon a time", "--max-seq-len", "3"), "context"),
    "context too long": (("--max-seq-len", "100000"), "--max-seq-len"),
    "empty input": (("--prompt", "-"), "empty"),
    "id beyond the vocabulary": (("--prompt-token-ids", "1,320"), "320"),
    "id beyond 64 bits": (("--prompt-token-ids", "1,99999999999999999999"), "99999999999999999999"),
    "negative id": (("--prompt-token-ids=-1,2",), "-1"),
    "biased id beyond the vocabulary": (("--logit-bias", "320=1"), "320"),
}
ON_SEVERAL_RANKS = ("prompt too long", "context too long", "empty input", "id beyond the vocabulary")


@pytest.mark.parametrize("mistake", WITH_MODEL)
def test_with_model(mistake: str, toy: Path) -> None:
    arguments, fragment = WITH_MODEL[mistake]
    check(run(None, *PROGRAM, "--model", toy, "--quiet", *arguments), fragment)


@pytest.mark.parametrize("mistake", ON_SEVERAL_RANKS)
def test_with_model_on_several_ranks(mistake: str, toy: Path) -> None:
    arguments, fragment = WITH_MODEL[mistake]
    check(run(3, *PROGRAM, "--model", toy, "--quiet", *arguments), fragment)


@RANKS
def test_logits_to_a_folder_that_does_not_exist(ranks: int | None, toy: Path, tmp_path: Path) -> None:
    target = tmp_path / "none" / "logits.npy"
    options = ("--model", toy, "--max-tokens", "2", "--json", "--logits-out", target)
    check(run(ranks, *PROGRAM, *options), str(target))


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_input_that_is_not_unicode(errors: str, toy: Path) -> None:
    options = ("--model", toy, "--max-tokens", "2", "--quiet", "--prompt", "-")
    check(run(None, *PROGRAM, *options, stdin=b"caf\xe9", env={"PYTHONIOENCODING": f"utf-8:{errors}"}), "UTF-8")


def test_prompt_that_is_not_unicode(toy: Path) -> None:
    prompt = b"caf\xe9".decode(errors="surrogateescape")
    check(run(None, *PROGRAM, "--model", toy, "--quiet", "--prompt", prompt), "unicode")
