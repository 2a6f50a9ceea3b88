"""Models that the runs need, and all cores."""

import pytest

from tests.system.mpi.conftest import demo, toy
from tests.system.mpi.launch import WORKERS

__all__ = ["demo", "toy"]


@pytest.fixture(autouse=True)
def all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bind no job to one core: a rank that waits for its core for two seconds looks like one that was stopped."""
    monkeypatch.setenv(WORKERS, "1")
