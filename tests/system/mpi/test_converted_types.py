"""Native files of every type: the same bits as the file they were made from, on any number of ranks."""

from pathlib import Path
from typing import Any

import gguf
import pytest

from mpillama.comm.communicator import Communicator
from mpillama.loading.convert import convert_model
from mpillama.loading.model_file import open_model
from mpillama.quant.registry import WEIGHT_TYPES
from tests import golden_models
from tests.system.mpi.test_digest import TIMEOUT, Digests, Measure, case, measure

__all__ = ["measure"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT)]
KINDS = [kind for kind in WEIGHT_TYPES.values() if kind.ggml is not None]
QUANTISED_TO = ("q8_0", "q6_k", "q4_k", "iq4_nl", "q4_0")
AWKWARD = "llama_bias"
"""A golden model whose rows are no whole super-blocks."""


def convert(source: Path, target: Path, weights: str = "as-stored") -> Path:
    convert_model(open_model(str(source), weights), str(target), False, Communicator.alone(), lambda count: None, 2)
    return target


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What is read from another format, and from the native file made of that."""
    folder, made = tmp_path_factory.mktemp("types"), []
    for block in {max(32, kind.block) for kind in KINDS}:
        golden_models.write_of_whole_blocks(folder / str(block), block)
    for kind in KINDS:
        source = folder / f"{kind.name}.gguf"
        type_of_gguf = gguf.GGMLQuantizationType[kind.name.upper()]
        blocks = (golden_models.as_random_blocks if kind.quantised else golden_models.as_type)(type_of_gguf)
        golden_models.write_gguf(source, str(folder / str(max(32, kind.block))), blocks)
        made.append((case(source), case(convert(source, folder / f"{kind.name}.h5"), 7)))
    for weights in QUANTISED_TO:
        source = golden_models.FOLDER / AWKWARD
        native = convert(source, folder / f"{AWKWARD}-{weights}.h5", weights)
        made.append((case(source, weights=weights), case(native, 7)))
    return made


@pytest.fixture(scope="module")
def truth(measure: Measure, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> Digests:
    return measure([source for source, _ in pairs], 1)


@pytest.mark.parametrize(("ranks", "threads"), [(1, 2), (2, 1), (3, 1), (5, 1)])
def test_a_native_file_gives_the_bits_of_its_source(
    ranks: int, threads: int, measure: Measure, pairs: list[tuple[dict[str, Any], dict[str, Any]]], truth: Digests
) -> None:
    assert len(set(truth.values())) == len(pairs)
    found = measure([native for _, native in pairs], ranks, threads=threads)
    assert list(found.values()) == list(truth.values())
