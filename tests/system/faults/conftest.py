"""Models that the runs need."""

from tests.system.mpi.conftest import demo, toy

__all__ = ["demo", "toy"]
