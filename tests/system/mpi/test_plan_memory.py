"""What `plan` says a rank needs is what a run takes, what it checks before loading, and what it logs and tells."""

import json
import re
from pathlib import Path

import pytest

from mpillama.formats.native.writer import create_file, seal_file
from mpillama.loading.memory import RESERVE, SHARED_WINDOW_BYTES
from mpillama.models.config import ModelConfig
from mpillama.models.tensors import WeightTypes
from mpillama.quant.registry import WEIGHT_TYPES
from tests import tiny_models as models
from tests.system.mpi.launch import PROGRAM, TIMEOUT, run

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
RECURRENT = {
    **models.DELTA_TOY,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "moe_intermediate_size": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 256,
}
"""Three slots for states of 17 MB each, beside 340 MB of weights."""
FOR_PYTHON = 20e6
"""What Python, MPI and their threads keep differs so much between starts; what the model takes is exact."""
SAME = ("weights", "kv_cache", "states", "buffers")


@pytest.fixture(scope="module")
def hollow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Up to 400 MB of weights that are all zero: holes in the file, memory like any other once they are read."""
    path, types, config = (
        tmp_path_factory.mktemp("hollow") / "hollow.h5",
        WeightTypes(WEIGHT_TYPES["f16"]),
        request.param,
    )
    texts = {"tokenizer.json": models.toy_tokenizer()}
    entries = create_file(str(path), config, types, ModelConfig.from_hf(config).tensors(types), texts)
    seal_file(str(path), config, types, entries, texts, {name: e.checksums for name, e in entries.items()})
    return path


@pytest.mark.parametrize(
    ("hollow", "ranks"),
    [(HOLLOW, 1), (HOLLOW, 2), (HOLLOW, 3), (RECURRENT, 1), (RECURRENT, 2)],
    indirect=["hollow"],
    ids=["attention, 1 rank", "attention, 2", "attention, 3", "recurrent, 1", "recurrent, 2"],
)
def test_a_run_takes_what_was_planned(ranks: int, hollow: Path, tmp_path: Path) -> None:
    sizes = ("--model", hollow, "--max-seq-len", str(CONTEXT), "--kv-type", "f32", "--threads", "1", "--json")
    plan = json.loads(run(None, *PROGRAM, "plan", *sizes, "--ranks-per-node", str(ranks)).stdout)
    prompt = ",".join(["7"] * (CONTEXT - 2))
    options = ("--max-tokens", "1", "--temperature", "0", "--log-dir", tmp_path)
    ran = run(ranks, *PROGRAM, *sizes, "--prompt-token-ids", prompt, *options)
    assert ran.status == 0, ran.stderr
    found, planned = json.loads(ran.stdout), plan["ranks"]
    windows = (ranks - 1) * SHARED_WINDOW_BYTES  # of the others, counted in every process that maps them
    expected = [pytest.approx(rank["total"] + windows, rel=0.05, abs=FOR_PYTHON) for rank in planned]
    assert found["rss_bytes_per_rank"] == expected
    for told, rank in zip(found["memory_bytes_per_rank"], planned, strict=True):
        assert [told[name] for name in SAME] == [rank[name] for name in SAME]
    needs = [sum(rank[name] for name in (*SAME, "tokenizer")) + RESERVE for rank in planned]
    assert logged_need(tmp_path) == pytest.approx(sum(needs), abs=5e5)  # printed in MB


def logged_need(folder: Path) -> float:
    """The bytes that the check before loading asked for."""
    texts = [path.read_text() for path in folder.iterdir()]
    (need,) = {match[1] for text in texts if (match := re.search(r"ranks of this host need ([0-9.]+) GB", text))}
    return 1e9 * float(need)
