"""A model with recurrent states: digests, batch, chat and server are those of a plain run, on any number of ranks."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ModelFile
from tests.server.conftest import serving
from tests.system.mpi.launch import PROGRAM, TIMEOUT, run
from tests.system.mpi.test_batch import answer, mixed_rows, write_rows
from tests.system.mpi.test_chat import talk

pytestmark = [pytest.mark.timeout(4 * TIMEOUT), pytest.mark.slow]

PROMPT = [5 + i % 40 for i in range(150)]
GREEDY = ("--temperature", "0", "--max-tokens", "40", "--logit-bias", "1=-100", "--json")


@pytest.fixture(scope="module")
def delta(model_file: ModelFile) -> Path:
    return model_file("delta", "q8_0")


def generate(ranks: int | None, model: Path, *options: str) -> dict[str, Any]:
    ids = ",".join(map(str, PROMPT))
    result = run(ranks, *PROGRAM, "--model", model, *GREEDY, "--prompt-token-ids", ids, *options)
    assert result.status == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def truth(delta: Path) -> dict[str, Any]:
    return generate(None, delta)


@pytest.mark.parametrize(
    ("ranks", "chunk", "drafts", "stages"), [(1, 1, 0, 1), (2, 7, 3, 1), (3, 64, 0, 1), (5, 256, 3, 1), (2, 256, 3, 2)]
)
def test_one_digest_for_any_ranks_chunks_and_drafts(
    ranks: int, chunk: int, drafts: int, stages: int, delta: Path, truth: dict[str, Any]
) -> None:
    options = ("--prefill-chunk", str(chunk), "--speculate", str(drafts), "--pipeline", str(stages))
    found = generate(ranks, delta, *options)
    assert (found["token_ids"], found["logits_sha256"]) == (truth["token_ids"], truth["logits_sha256"])
    assert bool(drafts) == bool(found["drafts_proposed"])


def test_a_batch_depends_on_nothing_but_its_rows(delta: Path, tmp_path: Path) -> None:
    """Ranks, drafts, a cache so small that sequences are pushed out, few snapshots: the same bytes."""
    source = write_rows(tmp_path / "in.jsonl", mixed_rows(16))
    context = ("--max-seq-len", "512")
    whole = answer(None, source, tmp_path / "1.jsonl", delta, *context)
    assert answer(2, source, tmp_path / "2.jsonl", delta, *context, "--speculate", "4") == whole
    small = ("--sequences", "3", "--cache-tokens", "512", "--prefill-chunk", "40", "--state-snapshots", "1")
    assert answer(3, source, tmp_path / "3.jsonl", delta, *context, *small) == whole


@pytest.mark.parametrize("ranks", [None, 3])
def test_a_chat_is_what_its_whole_conversation_gives(ranks: int | None, delta: Path) -> None:
    """Three turns of which the later ones begin from snapshots: as when each is computed from its first token on."""
    told = talk(ranks, delta, "hello\nand then?\nand then?\n").stdout
    apart = [talk(None, delta, "hello\n").stdout, talk(None, delta, "hello\nand then?\n").stdout]
    assert told.startswith(apart[1])
    assert apart[1].startswith(apart[0])
    assert len(told) > len(apart[1]) > len(apart[0])


def test_a_server_finds_prompts_and_forks_them(delta: Path, tmp_path: Path, truth: dict[str, Any]) -> None:
    """The second request begins from a snapshot, and so do three answers to one prompt; all are the plain run's."""
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40, "logit_bias": {"1": -100}, "model": "delta-q8_0"}
    with serving(delta, tmp_path, 2, "--no-auth", "--speculate", "2") as served:
        found = [post(served.url, body | {"n": n}) for n in (1, 1, 3)]
    texts = {choice["text"] for response in found for choice in response["choices"]}
    assert texts == {truth["text"]}
    cached = [response["usage"]["prompt_tokens_details"]["cached_tokens"] for response in found]
    assert cached[0] == 0
    assert cached[1] == 128
    assert cached[2] >= 128


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT, trust_env=False)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found
