"""What counts as too little memory, and what does not."""

import errno

import pytest

from mpillama.comm.failure import out_of_memory


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
