"""A model file that one rank's host sees otherwise than rank 0's, or not at all; and who looks at it."""

import json
from pathlib import Path

import numpy as np
import pytest

from mpillama.comm.ways import RANKS_PER_HOST
from mpillama.errors import UserError
from tests.system.faults.running import SHORT, name, sabotage, statuses, the_mistake
from tests.system.mpi.launch import SCRIPTS, TIMEOUT, run

pytestmark = pytest.mark.timeout(TIMEOUT + 60)

SAYS = {
    "vanished": ("no such file", "all hosts share"),
    "forbidden": ("permission denied", "all hosts share"),
    "shorter": ("bytes on this rank's host, but rank 0 sees", "all hosts share"),
    "unreadable": ("cannot be read at byte", "was it changed"),
    "stale": ("other contents", "copy it there again"),
    "unfinished": ("other contents", "copy it there again"),
    "cut": ("cannot be read at byte", "the file ends"),
}
CASES = [
    *((3, 2, fault) for fault in SAYS),
    *(pytest.param(3, 1, fault, marks=pytest.mark.slow) for fault in ("stale", "cut")),
    pytest.param(2, 1, "vanished", marks=pytest.mark.slow),
    pytest.param(2, 1, "stale", marks=pytest.mark.slow),
    pytest.param(4, 3, "shorter", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ranks", "victim", "fault"), CASES)
def test_one_host_sees_another_file(
    ranks: int, victim: int, fault: str, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RANKS_PER_HOST, f"{victim},{ranks - victim}")
    phase = "load" if fault == "cut" else "any"
    sentence = the_mistake(sabotage(fault, ranks, victim, phase, toy, tmp_path, *SHORT))
    assert sentence.startswith(f"mpillama: {name(victim, ranks)}")
    assert str(toy) in sentence
    for words in SAYS[fault]:
        assert words in sentence.lower() or words in sentence
    assert statuses(tmp_path) == dict.fromkeys(range(ranks), 2)


def test_one_rank_of_each_host_looks_at_the_files(toy: Path, tmp_path: Path) -> None:
    """Besides that each opens those that it reads weights from, and rank 0 the table."""
    script = (SCRIPTS / "model_opens.py", tmp_path, "--model", toy, *SHORT, "--threads", "1")
    result = run(4, *script, env={RANKS_PER_HOST: "2"})
    assert result.status == 0, result.stderr
    samples, reads = zip(*(json.loads((tmp_path / f"opens-{rank}").read_text()) for rank in range(4)), strict=True)
    assert samples == (1, 0, 1, 0)
    assert reads == (1, 1, 1, 1)


@pytest.mark.parametrize("fault", ["vanished", "unreadable", "cut"])
def test_rank_0_loses_the_file_after_it_read_the_table(fault: str, toy: Path, tmp_path: Path) -> None:
    phase = "load" if fault == "cut" else "any"
    sentence = the_mistake(sabotage(fault, 3, 0, phase, toy, tmp_path, *SHORT))
    assert name(0, 3) in sentence
    assert str(toy) in sentence


# -- the samples ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, int]:
    """Three files of a model and their sizes."""
    rng, sizes = np.random.default_rng(3), {"a": 100_000, "b": 10, "c": 3_000_000}
    for file, size in sizes.items():
        (tmp_path / file).write_bytes(rng.bytes(size))
    return {str(tmp_path / file): size for file, size in sizes.items()}


@pytest.mark.parametrize("place", ["first byte", "last byte", "all of a small file", "a third of a large one"])
def test_samples_show_a_difference(place: str, shards: dict[str, int]) -> None:
    from mpillama.formats.contents import refuse_other_contents, sample_digests

    before = sample_digests(shards)
    assert np.array_equal(before, sample_digests(shards))
    files = [Path(path) for path in shards]
    file = files[1] if "small" in place else files[2]
    content = np.fromfile(file, np.uint8)
    part = {"first byte": slice(1), "last byte": slice(-1, None), "all of a small file": slice(None)}
    content[part.get(place, slice(1_000_000, 2_000_000))] ^= 1
    content.tofile(file)
    after = sample_digests(shards)
    assert len(after) == len(before)
    with pytest.raises(UserError, match=r"rank 2 of 3 on z.*other contents") as caught:
        refuse_other_contents(shards, [before, before, after], ["x", "y", "z"])
    assert str(file) in str(caught.value)
    refuse_other_contents(shards, [after, None, after], ["x", "x", "z"])


def test_files_of_other_sizes_are_refused(shards: dict[str, int]) -> None:
    from mpillama.formats.contents import sample_digests

    path = next(iter(shards))
    with pytest.raises(UserError, match="100000 bytes on this rank's host, but rank 0 sees 100001"):
        sample_digests({**shards, path: shards[path] + 1})


def test_an_empty_file_has_samples(tmp_path: Path) -> None:
    from mpillama.formats.contents import sample_digests

    (tmp_path / "empty").touch()
    assert len(sample_digests({str(tmp_path / "empty"): 0})) == 1
