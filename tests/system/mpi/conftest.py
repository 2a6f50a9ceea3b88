"""Models that whole runs need."""

from pathlib import Path

import pytest

from tests.conftest import ModelFile
from tests.system.mpi.launch import DEMO_MODEL


@pytest.fixture(scope="session")
def toy(model_file: ModelFile) -> Path:
    """A small random model that the command line runs."""
    return model_file("toy", "q8_0")


@pytest.fixture(scope="session")
def demo() -> Path:
    """The model that comes with mpillama."""
    assert DEMO_MODEL.exists(), f"{DEMO_MODEL} is missing: `python data/train_demo.py` makes it"
    return DEMO_MODEL
