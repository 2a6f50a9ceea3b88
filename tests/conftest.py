"""What all tests share: the kernels' target, and small random model files."""

import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from mpillama.kernels.target import Target, prepare, requested_isa
from tests import tiny_models as models

THREADS = 2
SYSTEM = Path(__file__).parent / "system"
"""Where every test starts programs."""

# Times of single examples say more of the machine than of the program; the rest is as Hypothesis has it here, or in CI.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

ModelFile = Callable[[str, str], Path]
"""(kind, weight type) -> path of a model file."""

WRITERS = {
    "awkward": models.write_awkward,
    "plain": models.write_plain,
    "toy": models.write_toy,
    "delta": models.write_delta,
}


def pytest_configure() -> None:
    """Let interrupts through to the programs under test: a shell's background jobs inherit that they are ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have the most slow tests: those that end a run together should be short."""
    slow = Counter(item.path for item in items if SYSTEM in item.path.parents or item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def target() -> Target:
    """The kernels of this process: the best instruction set, or the one in MPILLAMA_ISA."""
    return prepare(requested_isa(), THREADS)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    """Give the path of a model of WRITERS, written when first asked for."""
    directory = tmp_path_factory.mktemp("models")

    def path(kind: str, weight_type: str) -> Path:
        file = directory / f"{kind}-{weight_type}.h5"
        if not file.exists():
            WRITERS[kind](file, weight_type)
        return file

    return path
