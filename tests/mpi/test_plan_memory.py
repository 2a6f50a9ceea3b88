"""What `plan` says a rank needs is what a run takes."""

import json
from pathlib import Path

import pytest

from mpillama.files.native_writer import create_file, seal_file
from mpillama.layout.weight_types import WEIGHT_TYPES
from mpillama.model.config import ModelConfig
from mpillama.model.tensors import WeightTypes, tensor_specs
from tests import models
from tests.mpi.launch import PROGRAM, TIMEOUT, run

pytestmark = [pytest.mark.timeout(TIMEOUT + 60), pytest.mark.slow]

HOLLOW = {
    **models.TOY,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
CONTEXT = 1024


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 MB of weights that are all zero: holes in the file, memory like any other once they are read."""
    path, types = tmp_path_factory.mktemp("hollow") / "hollow.h5", WeightTypes(WEIGHT_TYPES["f16"])
    texts = {"tokenizer.json": models.toy_tokenizer()}
    entries = create_file(str(path), HOLLOW, types, tensor_specs(ModelConfig.from_hf(HOLLOW), types), texts)
    seal_file(str(path), HOLLOW, types, entries, texts, {name: e.checksums for name, e in entries.items()})
    return path


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_run_takes_what_was_planned(ranks: int, hollow: Path) -> None:
    sizes = ("--model", hollow, "--max-seq-len", str(CONTEXT), "--kv-type", "f32", "--json")
    plan = json.loads(run(None, *PROGRAM, "plan", *sizes, "--ranks-per-node", str(ranks)).stdout)
    prompt = ",".join(["7"] * (CONTEXT - 2))
    ran = run(ranks, *PROGRAM, *sizes, "--prompt-token-ids", prompt, "--max-tokens", "1", "--temperature", "0")
    assert ran.status == 0, ran.stderr
    taken = json.loads(ran.stdout)["rss_bytes_per_rank"]
    assert taken == [pytest.approx(rank["total"], rel=0.05) for rank in plan["ranks"]]
