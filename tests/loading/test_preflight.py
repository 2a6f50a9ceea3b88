"""Limits on memory as the system writes them, and the context that fits."""

import os
from pathlib import Path

import pytest

from mpillama.cli.options import ChatOptions
from mpillama.comm.communicator import Communicator
from mpillama.engine.cache_folder import MOST_PENDING
from mpillama.errors import UserError
from mpillama.job.host_memory import (
    WINDOW_BYTES,
    available_bytes,
    cgroup_rooms,
    process_room,
    refuse_small_host,
    spare_shared_memory,
)
from mpillama.job.start import join
from mpillama.loading.model_file import open_model
from mpillama.loading.settings import EngineSettings
from mpillama.models.partition import Division
from tests.system.mpi.launch import DEMO_MODEL

GIB = 1 << 30


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_every_memory_group_above_the_process_counts(tmp_path):
    """cgroup v2: limits of the job and of the step; a group without a limit does not count."""
    root, member = tmp_path / "cgroup", tmp_path / "self"
    member.write_text("0::/slurm/job_1/step_0\n")
    write(root / "slurm", memory__max="max\n", memory__current="5\n")
    write(root / "slurm/job_1", memory__max=f"{8 * GIB}\n", memory__current=f"{3 * GIB}\n")
    write(root / "slurm/job_1/step_0", memory__max=f"{6 * GIB}\n", memory__current=f"{3 * GIB}\n")
    write(root / "slurm/job_1/step_0", memory__stat=f"anon 7\ninactive_file {GIB}\n")
    assert sorted(cgroup_rooms(root, member)) == [4 * GIB, 5 * GIB]
    assert available_bytes(root, member) <= 4 * GIB


def test_the_older_groups(tmp_path):
    root, member = tmp_path / "cgroup", tmp_path / "self"
    member.write_text("5:cpu,cpuacct:/x\n4:memory:/job\n")
    write(root / "memory", memory__limit_in_bytes=f"{(1 << 63) - 4096}\n", memory__usage_in_bytes="1\n")
    write(root / "memory/job", memory__limit_in_bytes=f"{2 * GIB}\n", memory__usage_in_bytes=f"{GIB}\n")
    assert list(cgroup_rooms(root, member)) == [GIB]


@pytest.mark.parametrize(("ranks", "refused"), [(1, False), (2, False), (3, True)])
def test_a_memory_group_too_small_for_python_is_told_at_once(ranks, refused, tmp_path):
    root, member = tmp_path / "cgroup", tmp_path / "self"
    member.write_text("0::/job/step\n")
    write(root / "job", memory__max="150000000\n", memory__current="0\n")
    write(root / "job/step", memory__max="max\n", memory__current="0\n")
    if not refused:
        refuse_small_host(ranks, tmp_path, root, member)
        return
    with pytest.raises(UserError, match=r"limited to 150 MB .* need 192 MB for 3 ranks"):
        refuse_small_host(ranks, tmp_path, root, member)


def small_file_system(monkeypatch, size, free):
    """All have so many MB, of which some are free."""
    numbers = {"f_bsize": 1000, "f_frsize": 1000, "f_blocks": 1000 * size, "f_bfree": 1000 * free}
    found = os.statvfs_result((*numbers.values(), 1000 * free, 9, 9, 9, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda folder: found)


@pytest.mark.parametrize(
    ("size", "free", "words"),
    [
        (64, 64, ""),
        (12, 12, ""),
        (0, 0, ""),
        (11, 11, "holds 11 MB, .* need 12 MB"),
        (64, 5, "has 5 of 64 MB free.*remove what killed jobs have left"),
    ],
)
def test_shared_memory_that_is_too_small_or_full(size, free, words, monkeypatch, tmp_path):
    """One without a limit says that it has none at all."""
    small_file_system(monkeypatch, size, free)
    if not words:
        refuse_small_host(3, tmp_path, tmp_path, tmp_path / "none")
        return
    with pytest.raises(UserError, match=rf"{tmp_path} on host .* {words}"):
        refuse_small_host(3, tmp_path, tmp_path, tmp_path / "none")


@pytest.mark.parametrize("ranks", [2, 64])
def test_sums_have_room_in_shared_memory(ranks):
    """What they take is not noticed before it is written to."""
    from mpillama.comm.shared_memory import CAPACITY
    from mpillama.kernels.shared_sum import window_bytes

    needed = window_bytes(ranks, CAPACITY, several_hosts=True)
    assert 0.98 * WINDOW_BYTES * (ranks + 1) < needed <= WINDOW_BYTES * (ranks + 1)


@pytest.mark.parametrize(
    ("free", "ranks", "spared"), [(1000, 16, False), (64, 2, False), (64, 12, True), (16, 2, True)]
)
def test_ucx_lays_no_files_into_small_shared_memory(free, ranks, spared, monkeypatch, tmp_path):
    small_file_system(monkeypatch, 1000, free)
    found: dict[str, str] = {}
    spare_shared_memory(ranks, found, tmp_path)
    assert found == ({"UCX_TLS": "^posix"} if spared else {})
    found = {"UCX_TLS": "tcp"}
    spare_shared_memory(ranks, found, tmp_path)
    assert found == {"UCX_TLS": "tcp"}


def test_slurms_grant(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "512")
    assert available_bytes(tmp_path, tmp_path / "none") == 512 << 20
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")
    assert available_bytes(tmp_path, tmp_path / "none") > 512 << 20


def test_a_process_without_a_limit_has_room():
    assert process_room() > 0


@pytest.fixture(scope="module")
def preflight(target):
    from mpillama.loading import preflight

    return preflight


def test_what_waits_for_the_disk_counts(preflight):
    world, file = join(Communicator.alone().mpi, 1, 60.0), open_model(str(DEMO_MODEL))
    kinds = EngineSettings(), EngineSettings(cache_dir="x"), ChatOptions(quiet=True), ChatOptions(session="talk.json")
    needs = [preflight.rank_needs(file, world, settings, 256, Division(1)) for settings in kinds]
    world.free()
    for without, kept in (needs[:2], needs[2:]):
        assert kept.fixed - without.fixed == MOST_PENDING + without.per_block
        assert kept.per_block == without.per_block > 0


def test_the_longest_context_of_a_host(preflight):
    host = preflight.Host("n1", fixed=10 * GIB, per_block=GIB, available=13 * GIB + 5)
    assert host.longest_context == 3 * 64
    assert host.need(3 * 64) <= host.available < host.need(3 * 64 + 1)
    assert preflight.Host("n1", 10 * GIB, GIB, 9 * GIB).longest_context < 0
