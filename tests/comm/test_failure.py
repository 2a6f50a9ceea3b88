"""What counts as too little memory, and what does not; what is known before MPI starts."""

import errno

import pytest

from mpillama.comm.failure import out_of_memory
from mpillama.comm.launcher import launched_first, quiet_mpi


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
