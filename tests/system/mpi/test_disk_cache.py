"""The cache on disk with real ranks: one answer, whoever wrote the files, in whatever state they are."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny_models as models
from tests.conftest import ModelFile
from tests.engine.test_disk_cache import damage, files_in
from tests.server.conftest import serving
from tests.server.raw import figure
from tests.system.mpi.launch import PROGRAM, TIMEOUT, run
from tests.system.mpi.test_recurrent import post

pytestmark = [pytest.mark.timeout(4 * TIMEOUT), pytest.mark.slow]

PROMPT = [5 + i * i % 290 for i in range(200)]
GREEDY = ("--temperature", "0", "--max-tokens", "20", "--logit-bias", "1=-100", "--json")
Generate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module", params=["toy", "latent", "delta"])
def model(request: pytest.FixtureRequest, model_file: ModelFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param != "latent":
        return model_file(request.param, "q8_0")
    path = tmp_path_factory.mktemp("latents") / "latents.h5"
    models.write_random(path, models.LATENT_TOY, "q8_0", {"tokenizer.json": models.toy_tokenizer()})
    return path


def generate(ranks: int | None, model: Path, *options: str) -> dict[str, Any]:
    ids = ",".join(map(str, PROMPT))
    result = run(ranks, *PROGRAM, "--model", model, *GREEDY, "--prompt-token-ids", ids, *options)
    assert result.status == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def truth(model: Path) -> str:
    digest: str = generate(None, model)["logits_sha256"]
    return digest


def test_a_text_goes_on_on_any_number_of_ranks(model: Path, truth: str, tmp_path: Path) -> None:
    """From 2 ranks to 3, to a single one, to 3 again, and (where each has attention) to 2 stages."""
    cache = ("--cache-dir", str(tmp_path / "cache"))
    found = [generate(ranks, model, *cache) for ranks in (2, 3, None, 3)]
    if not model.name.startswith("delta"):
        found.append(generate(2, model, *cache, "--pipeline", "2"))
    assert {each["logits_sha256"] for each in found} == {truth}
    assert [each["cached_tokens"] for each in found] == [0] + [192] * (len(found) - 1)


def test_files_that_a_rank_lacks_are_made_again(model: Path, truth: str, tmp_path: Path) -> None:
    """Whatever is missing or torn for one rank alone, all compute it again, and a later run finds all."""
    cache, rng = ("--cache-dir", str(tmp_path / "cache")), np.random.default_rng(3)
    assert generate(2, model, *cache)["cached_tokens"] == 0
    for path in files_in(tmp_path)[:2]:
        damage(path, rng)
    found = [generate(2, model, *cache) for _ in range(3)]  # a torn file is seen when it is read, one after the other
    assert {each["logits_sha256"] for each in found} == {truth}
    assert found[0]["cached_tokens"] < found[2]["cached_tokens"] == 192


def test_other_types_and_another_model_find_nothing(toy: Path, tmp_path: Path) -> None:
    cache = ("--cache-dir", str(tmp_path / "cache"))
    generate(None, toy, *cache)
    assert generate(None, toy, *cache, "--kv-type", "q8")["cached_tokens"] == 0
    assert generate(None, toy, *cache)["cached_tokens"] == 192
    other = tmp_path / toy.name
    other.write_bytes(toy.read_bytes())  # written at another time
    assert generate(None, other, *cache)["cached_tokens"] == 0


def test_a_restarted_server_finds_what_clients_send_again(toy: Path, tmp_path: Path) -> None:
    """On another number of ranks, with a bound on delays; only with the same salt."""
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 20, "logit_bias": {"1": -100}, "model": "toy-q8_0"}
    found = []
    for ranks, salt in ((2, "a"), (3, "b"), (3, "a")):
        options = ("--no-auth", "--cache-dir", str(tmp_path / "cache"), "--max-token-delay", "0.01")
        with serving(toy, tmp_path, ranks, *options) as served:
            found.append(post(served.url, body | {"cache_salt": salt}))
            assert figure(served.http(), "mpillama_blocks_loaded_total") == (3 if found[2:] else 0)
            served.launch.ranks()[0].send_signal(signal.SIGTERM)
            assert served.launch.gone_within(TIMEOUT)
    assert len({each["choices"][0]["text"] for each in found}) == 1
    cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in found]
    assert cached == [0, 0, 192]


def test_a_folder_that_cannot_be_written_is_refused(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(2, *PROGRAM, "--model", toy, "--cache-dir", tmp_path / "file")
    assert result.status == 2
    (line,) = result.stderr.splitlines()
    assert "--cache-dir" in line
