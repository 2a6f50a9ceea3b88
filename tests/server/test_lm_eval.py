"""lm-evaluation-harness itself, where it is installed, against a running server: its figures are the model's."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import THREADS
from tests.server.conftest import Served
from tests.system.mpi.launch import DEMO_MODEL, TIMEOUT

HARNESS = shutil.which("lm_eval") or shutil.which("lm_eval", path=str(Path(sys.executable).parent))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * TIMEOUT),
    pytest.mark.skipif(HARNESS is None, reason="lm_eval is not installed (pip install 'mpillama[clients]')"),
]

ROWS = [
    {"question": "Once upon a time", "choices": [" there was a llama", " purple of of seven"], "answer": 0},
    {"question": "The llama said", "choices": [" xyz zyx", " hello 🐫"], "answer": 1},
    {"question": "A small", "choices": [" cluster", " naïve 你好", " llama hummed"], "answer": 2},
]
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: '{{question}}'
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ''
metric_list: [{metric: acc}]
""",
    "whole": """
output_type: loglikelihood_rolling
doc_to_text: ''
doc_to_target: '{{question}}{{choices[answer]}}'
metric_list: [{metric: bits_per_byte}]
""",
    "written": """
output_type: generate_until
doc_to_text: '{{question}}'
doc_to_target: '{{choices[answer]}}'
generation_kwargs: {until: ['.'], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def samples(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """What the harness noted for each row of each task; it asks the server for tokens, too, so it needs no files."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\ntest_split: test\n"
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: tiny_{name}\n{data}{text}")
    command = [
        HARNESS, "run", "--model", "local-completions", "--batch_size", "4", "--include_path", str(folder),
        "--model_args", f"base_url={served.url}/v1/completions,model=demo,num_concurrent=2", "--log_samples",
        "--tasks", ",".join(f"tiny_{name}" for name in TASKS), "--output_path", str(folder / "out"),
    ]  # fmt: skip
    env = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, cwd=folder, timeout=TIMEOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: _samples(folder, name) for name in TASKS}


def _samples(folder: Path, name: str) -> list[dict]:
    (path,) = folder.glob(f"out/**/samples_tiny_{name}_*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


@pytest.fixture(scope="module")
def log_likelihood(target):
    """The sum of a continuation's log-probabilities by the model in this process, and whether each was the best."""
    from mpillama.formats.native.table import read_table
    from mpillama.text.tokenizer import Tokenizer
    from tests import running

    model, texts = running.load(DEMO_MODEL, THREADS), read_table(str(DEMO_MODEL)).texts
    tokenizer = Tokenizer(texts["tokenizer.json"], bos_token_id=None, eos_token_ids=(), add_bos=False)

    def of(context: str | list[int], continuation: str) -> tuple[float, bool]:
        before = tokenizer.encode(context) if isinstance(context, str) else context
        after = tokenizer.encode((context if isinstance(context, str) else "") + continuation)
        ids = after if isinstance(context, str) else [*before, *after]
        logits = running.all_logits(model, [np.array(ids)], "f16").astype(np.float64)
        rows = range(len(before) - 1, len(ids) - 1)
        found = [logits[i, ids[i + 1]] - math.log(math.fsum(np.exp(logits[i]))) for i in rows]
        return math.fsum(found), all(int(logits[i].argmax()) == ids[i + 1] for i in rows)

    return of


def test_choices_have_the_models_log_likelihoods(samples, log_likelihood):
    for row, sample in zip(ROWS, samples["choice"], strict=True):
        found = [(float(total), is_greedy == "True") for total, is_greedy in sample["filtered_resps"]]
        expected = [log_likelihood(row["question"], choice) for choice in row["choices"]]
        assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-8)
        assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
        best = max(range(len(expected)), key=lambda i: expected[i][0])
        assert sample["acc"] == (best == row["answer"])


def test_a_whole_text_begins_after_an_end_of_text(samples, log_likelihood, served):
    """The harness takes BOS; this one's id is 0, which it takes for none."""
    with served.http() as http:
        info = http.get("/tokenizer_info").json()
    (begin,), (end,) = _ids(served, info["bos_token"]), _ids(served, info["eos_token"])
    for row, sample in zip(ROWS, samples["whole"], strict=True):
        text = row["question"] + row["choices"][row["answer"]]
        expected, _ = log_likelihood([begin or end], text)
        assert float(sample["filtered_resps"][0]) == pytest.approx(expected, abs=1e-8)


def test_what_it_has_written_is_what_the_server_answers(samples, served):
    fields = {"model": "demo", "max_tokens": 12, "temperature": 0, "stop": ["."], "seed": 1234}
    for row, sample in zip(ROWS, samples["written"], strict=True):
        answer = served.client.completions.create(prompt=_ids(served, row["question"]), **fields)
        assert sample["filtered_resps"][0] == answer.choices[0].text


def _ids(served: Served, text: str) -> list[int]:
    with served.http() as http:
        return http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
