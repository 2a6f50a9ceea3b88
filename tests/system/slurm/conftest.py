"""The one-node Slurm that the tests of jobs/ submit to."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ModelFile
from tests.system.slurm.cluster import Cluster, running_cluster, why_not


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running Slurm, or a skipped test."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def toy(model_file: ModelFile) -> Path:
    """A small random model that the command line runs."""
    return model_file("toy", "q8_0")
