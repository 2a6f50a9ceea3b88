"""Simulated hosts, or a skipped test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.hosts.network import Hosts, running_hosts, why_not
from tests.system.mpi.conftest import demo, toy

__all__ = ["demo", "toy"]


def _hosts(folder: Path, count: int) -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with running_hosts(folder, count) as hosts:
        yield hosts


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[Hosts]:
    yield from _hosts(tmp_path, 2)


@pytest.fixture
def four_hosts(tmp_path: Path) -> Iterator[Hosts]:
    yield from _hosts(tmp_path, 4)
