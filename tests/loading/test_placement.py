"""Where threads and memory are: what the system's files say, and the sentences about it."""

from dataclasses import replace
from pathlib import Path

import pytest

from mpillama.job.topology import Topology, bytes_by_node, processors_of, read_topology
from mpillama.kernels.target import prepare, requested_isa
from mpillama.loading.placement import (
    TOUCHED_BYTES,
    Placement,
    first_touch,
    place_of,
    placement_advice,
    processor_list,
    shared_cores,
)
from tests.system.mpi.launch import DEMO_MODEL, PROGRAM, run

WHOLE = Placement("n1", tuple(range(8)), 2, (), 8, (0,), (0,), {})


def two_sockets(folder: Path) -> Topology:
    """8 processors: cores 0 to 1 on each of two sockets with a node each, two hyperthreads a core."""
    for node, cpus in enumerate(("0-1,4-5", "2-3,6-7")):
        (folder / f"node/node{node}").mkdir(parents=True)
        (folder / f"node/node{node}/cpulist").write_text(cpus + "\n")
    for cpu in range(8):
        place = folder / f"cpu/cpu{cpu}/topology"
        place.mkdir(parents=True)
        (place / "physical_package_id").write_text(f"{cpu % 4 // 2}\n")
        (place / "core_id").write_text(f"{cpu % 2}\n")
    (folder / "cpu/cpufreq").mkdir()
    return read_topology(folder)


def test_sockets_nodes_and_cores_of_a_host(tmp_path):
    found = two_sockets(tmp_path)
    assert found.nodes == {0: {0, 1, 4, 5}, 1: {2, 3, 6, 7}}
    assert found.sockets_of([0, 5]) == [0]
    assert found.sockets_of([1, 2]) == [0, 1]
    assert found.nodes_of([6]) == [1]
    assert found.core_of(1) == found.core_of(5) != found.core_of(2)


def test_a_system_that_tells_nothing_has_one_node(tmp_path):
    found = read_topology(tmp_path)
    assert list(found.nodes) == [0]
    assert found.sockets_of([0, 1]) == [0]
    assert found.core_of(0) != found.core_of(1)


@pytest.mark.parametrize(("text", "listed"), [("0-3,8", [0, 1, 2, 3, 8]), ("5\n", [5]), ("", [])])
def test_lists_of_processors(text, listed):
    assert processors_of(text) == listed
    assert processor_list(listed) == text.strip()


MAPS = """\
7f0000000000 default anon=9 dirty=9 N0=9 kernelpagesize_kB=4
7f0000100000 default anon=300 dirty=300 active=0 N0=100 N1=200 kernelpagesize_kB=4
7f0000400000 default file=/lib/N.so mapped=1 N1=1 kernelpagesize_kB=2048
"""


@pytest.mark.parametrize(
    ("address", "found"),
    [
        (0x7F0000000000, {0: 9 * 4096}),
        (0x7F0000100800, {0: 100 * 4096, 1: 200 * 4096}),
        (0x7F0000400001, {1: 2 << 20}),
        (0x1000, {}),
    ],
)
def test_where_pages_lie(tmp_path, address, found):
    (tmp_path / "maps").write_text(MAPS)
    assert bytes_by_node(address, tmp_path / "maps") == found


def test_memory_that_threads_touch_is_resident():
    """The kernel's own figures of this process; a system without NUMA says nothing."""
    team = prepare(requested_isa(), 2).team
    try:
        found = first_touch(team)
    finally:
        team.close()
    assert not found or TOUCHED_BYTES <= sum(found.values()) < TOUCHED_BYTES + (8 << 20)


def test_threads_bound_to_one_core_by_openmps_variables(monkeypatch, tmp_path):
    topology = two_sockets(tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setenv("OMP_PLACES", "cores")
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    one = place_of("n1", 2, topology)
    assert one.bound == ((0, 1),)
    (sentence,) = shared_cores({4: one, 5: one})
    assert "Threads of ranks 4 and 5 on host n1 are bound to the same core (1)" in sentence
    assert "OMP_PROC_BIND=true and OMP_PLACES=cores" in sentence
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {2, 3, 6, 7})
    other = place_of("n1", 2, topology)
    assert not list(shared_cores({4: one, 5: other}))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {4, 5})  # the other hyperthreads of one's cores
    assert list(shared_cores({4: one, 5: place_of("n1", 2, topology)}))


def test_masks_that_are_too_small():
    narrow = replace(WHOLE, processors=(2, 3), core_count=2)
    (sentence,) = shared_cores({0: WHOLE, 1: narrow, 2: narrow})
    assert "Ranks 1 and 2 on host n1 are bound to the same processors (2-3), fewer than their 4 threads" in sentence
    assert not list(shared_cores({0: WHOLE, 1: narrow, 2: replace(WHOLE, processors=(4, 5))}))
    assert not list(shared_cores(dict.fromkeys(range(9), WHOLE)))  # too many everywhere, which is told as that


def test_one_rank_a_socket_is_advised():
    spread = replace(WHOLE, sockets=(0, 1), nodes=(0, 1))
    assert placement_advice([WHOLE]) == []
    (sentence,) = placement_advice([WHOLE, spread, spread])
    assert "rank 1 on host n1 are on 2 sockets" in sentence
    assert "one rank a socket" in sentence


def test_memory_far_from_its_cores_is_told():
    assert placement_advice([replace(WHOLE, memory={0: 96, 1: 4})]) == []
    (sentence,) = placement_advice([replace(WHOLE, memory={0: 50, 1: 50})])
    assert sentence.startswith("50 % of what rank 0 on host n1 touches first")


BINDING = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}


def test_doctor_and_a_run_name_the_ranks_that_share_a_core():
    doctor = run(2, *PROGRAM, "doctor", "--threads", "2", env=BINDING, all_cores=True)
    assert "Threads of ranks 0 and 1" in doctor.stdout
    words = ("--model", DEMO_MODEL, "--threads", "2", "--max-tokens", "2")
    generated = run(2, *PROGRAM, *words, env=BINDING, all_cores=True)
    assert generated.status == 0
    assert generated.stderr.count("Threads of ranks 0 and 1") == 1
