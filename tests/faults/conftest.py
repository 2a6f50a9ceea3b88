"""Models that the runs need."""

from tests.mpi.conftest import demo, toy

__all__ = ["demo", "toy"]
