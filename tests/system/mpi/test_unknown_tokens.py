"""A token that the tokenizer knows and the model does not is told in one sentence before it reaches the model."""

import json
import shutil
from pathlib import Path

import pytest

from mpillama.loading.model_file import open_model
from mpillama.loading.texts import make_tokenizer
from tests.system.mpi.launch import PROGRAM, TIMEOUT, run

pytestmark = pytest.mark.timeout(TIMEOUT + 60)

GOLDEN = Path(__file__).parents[2] / "golden" / "llama"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has one token more; the chat template writes it before the tools' results."""
    folder = tmp_path_factory.mktemp("more") / "model"
    shutil.copytree(GOLDEN, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    known = {token["id"] for token in tokenizer["added_tokens"]} | set(tokenizer["model"]["vocab"].values())
    fillers = [i for i in range(size) if i not in known]
    like = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": i, "content": f"<filler {i}>", **like} for i in fillers]
    tokenizer["added_tokens"].append({"id": size, "content": "<pad>", **like})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert make_tokenizer(open_model(str(folder))).encode("<pad>")[-1] == size
    return folder


@pytest.mark.parametrize("ranks", [None, 3])
@pytest.mark.parametrize(
    "arguments",
    [
        ("--raw", "--prompt", "a<pad>b", "--max-tokens", "2"),
        ("--prompt-token-ids", "1,256,2", "--max-tokens", "2"),
        ("--prompt-token-ids", "1,-1,2", "--max-tokens", "2"),
    ],
)
def test_generate(model: Path, ranks: int | None, arguments: tuple[str, ...]) -> None:
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    given = [a.replace("256", str(size)) for a in arguments]
    result = run(ranks, *PROGRAM, "--model", model, "--quiet", *given)
    wrong = -1 if "1,-1,2" in arguments else size
    assert result.status == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        f"mpillama: token id {wrong} is outside the model's 0 to {size - 1}"
    )
    assert "Traceback" not in result.stderr


def test_batch_answers_the_other_rows(model: Path, tmp_path: Path) -> None:
    rows, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"id": "a", "prompt": "a<pad>b"}\n{"id": "b", "prompt": "a b"}\n')
    result = run(None, *PROGRAM, "batch", rows, out, "--model", model, "--max-tokens", "2", "--quiet")
    assert result.status in (0, 3), result.stderr
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert "is outside the model's 0 to" in first["error"]["message"]
    assert second["error"] is None


def test_perplexity_takes_the_name_of_the_token_as_text(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("the <pad> and the <pad> and " * 8)
    result = run(None, *PROGRAM, "perplexity", "--model", model, "--file", text, "--context", "16", "--json")
    assert result.status == 0, result.stderr


def test_a_chat_takes_the_name_of_the_token_as_text(model: Path) -> None:
    result = run(None, *PROGRAM, "--model", model, "--chat", "--prompt", "<pad>", "--max-tokens", "2", "--quiet")
    assert result.status == 0, result.stderr
