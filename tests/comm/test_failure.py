"""What counts as too little memory, and what does not; what is known before MPI starts."""

import errno

import pytest

from mpillama.comm.failure import out_of_memory
from mpillama.comm.launcher import (
    THREAD_LEVEL,
    ask_for_threads,
    launched_first,
    launched_here,
    launched_on_several_hosts,
    quiet_mpi,
)
from mpillama.comm.ways import OVERLAP


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 4.00 GiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        ImportError("/x/h5pl.so: failed to map segment from shared object"),
    ],
)
def test_too_little_memory_is_known_by_its_many_names(error: Exception) -> None:
    sentence = out_of_memory(error)
    assert sentence is not None
    assert sentence.startswith("out of memory")
    assert "take more nodes" in sentence


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), RuntimeError("sabotage"), ImportError("No module named 'h5py'")]
)
def test_other_errors_are_not_too_little_memory(error: Exception) -> None:
    assert out_of_memory(error) is None


def test_mpi_is_kept_quiet_unless_the_user_has_said_otherwise() -> None:
    found = {"UCX_LOG_FILE": "/tmp/ucx.log"}
    quiet_mpi(found)
    assert found == {"UCX_LOG_FILE": "/tmp/ucx.log"}
    found = {"OMPI_COMM_WORLD_SIZE": "2"}
    quiet_mpi(found)
    assert (found["UCX_LOG_FILE"], found["OMPI_MCA_osc"]) == ("stderr", "^ucx")


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"MPI_LOCALRANKID": "0"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "3"}, False),
        ({"SLURM_LOCALID": "1"}, False),
    ],
)
def test_the_first_rank_of_a_host(environment: dict[str, str], first: bool) -> None:
    assert launched_first(environment) is first


SIZES = "SLURM_STEP_TASKS_PER_NODE"


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, 1),
        ({"MPI_LOCALNRANKS": "3"}, 3),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 2),
        ({SIZES: "4", "SLURM_NODEID": "0"}, 4),
        ({SIZES: "2(x3)", "SLURM_NODEID": "2"}, 2),
        ({SIZES: "2(x3),1", "SLURM_NODEID": "3"}, 1),
        ({SIZES: "1,16(x255),8(x2)", "SLURM_NODEID": "255"}, 16),
        ({SIZES: "1,16(x255),8(x2)", "SLURM_NODEID": "256"}, 8),
        ({SIZES: "3,2", "SLURM_NODEID": "1", "SLURM_TASKS_PER_NODE": "8(x2)"}, 2),
        # mpirun, whose own helpers are the step
        ({SIZES: "1(x2)", "SLURM_NODEID": "1", "MPI_LOCALNRANKS": "5"}, 5),
        # nothing that could be relied on
        ({SIZES: "3,2", "SLURM_NODEID": "2"}, 1),
        ({SIZES: "3,2"}, 1),
        ({SIZES: "3(x", "SLURM_NODEID": "0"}, 1),
        ({"SLURM_TASKS_PER_NODE": "8", "SLURM_NODEID": "0"}, 1),
    ],
)
def test_the_ranks_of_a_host(environment: dict[str, str], ranks: int) -> None:
    assert launched_here(environment) == ranks


HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "0", "MPI_LOCALRANKID": "0"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4"}
SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({**HYDRA, "MPI_LOCALNRANKS": "4"}, False),
        ({**HYDRA, "MPI_LOCALNRANKS": "2"}, True),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, False),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "1"}, False),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "2"}, True),
        ({**SLURM, "PMIX_RANK": "0"}, False),
        # mpirun on one host of a Slurm job of several
        ({**HYDRA, "MPI_LOCALNRANKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2"}, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "2"}, False),
        ({**HYDRA, "MPI_LOCALNRANKS": "4", "MPILLAMA_RANKS_PER_HOST": "3,1"}, True),
        ({**HYDRA, "MPI_LOCALNRANKS": "4", "MPILLAMA_RANKS_PER_HOST": "4"}, False),
    ],
)
def test_threads_are_asked_for_where_there_are_several_hosts(environment: dict[str, str], several: bool) -> None:
    assert launched_on_several_hosts(environment) is several
    found = dict(environment)
    ask_for_threads(found)
    assert found == {**environment, THREAD_LEVEL: "multiple" if several else "funneled"}


@pytest.mark.parametrize(
    ("wish", "level"), [({OVERLAP: "always"}, "multiple"), ({OVERLAP: "never"}, "funneled"), ({}, "multiple")]
)
def test_what_the_user_wants_of_threads_is_asked_for(wish: dict[str, str], level: str) -> None:
    hosts = {} if wish.get(OVERLAP) == "always" else {**HYDRA, "MPI_LOCALNRANKS": "2"}
    found = {**hosts, **wish}
    ask_for_threads(found)
    assert found[THREAD_LEVEL] == level
    found = {**hosts, **wish, THREAD_LEVEL: "serialized"}
    ask_for_threads(found)
    assert found[THREAD_LEVEL] == "serialized"
