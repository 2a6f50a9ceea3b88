"""The scripts of jobs/ are submitted for real."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from mpillama.cli.options import COMMANDS
from tests.golden_models import FOLDER
from tests.system.mpi.launch import PROGRAM, ROOT, TIMEOUT, run
from tests.system.slurm.cluster import Cluster, Job, free_port, mpi_is_mpich

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 1300)]  # the first one may have to install Slurm

JOBS = ROOT / "jobs"
GREEDY = ("--temperature", "0", "--max-tokens", "12")
PROMPT = "Once * upon"
REQUESTS = 500
"""Some five seconds of work, so that a signal comes in the midst of it."""


def needs(command: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(command not in COMMANDS, reason=f"{command} is not in this version")


@pytest.fixture(scope="module")
def launch(request: pytest.FixtureRequest) -> dict[str, str]:
    """Parameters that choose a launcher."""
    if request.param == "srun" and not mpi_is_mpich():
        pytest.skip("srun --mpi=pmi2 starts ranks of MPICH, but mpirun is another's")
    return {"mpirun": {}, "mpirun -n": {"LAUNCH": "mpirun -n 3"}, "srun": {"LAUNCH": "srun --mpi=pmi2"}}[request.param]


@pytest.mark.parametrize("launch", ["mpirun", "mpirun -n", "srun"], indirect=True)
def test_generate_gives_the_answer_of_one_rank(
    slurm: Cluster, toy: Path, tmp_path: Path, launch: dict[str, str]
) -> None:
    alone = run(None, *PROGRAM, "generate", "--model", toy, "--json", *GREEDY, "--prompt", PROMPT)
    options = " ".join(("--json", *GREEDY))
    job = slurm.submit(JOBS / "generate.sbatch", tmp_path, MODEL=toy, PROMPT=PROMPT, ARGS=options, **launch)
    assert job.wait_for_end() == ("COMPLETED", 0), job.errors
    assert _answer(job.output) == _answer(alone.stdout)


def _answer(output: str) -> tuple[list[int], str]:
    found = json.loads(output)
    return found["token_ids"], found["logits_sha256"]


def test_a_rank_knows_from_srun_how_many_are_on_its_host(slurm: Cluster) -> None:
    """Before MPI starts, which a host that is too small would not survive."""
    told = "from mpillama.comm import launcher as l; print(l.launched_size()[1], l.launched_here(), l.launched_first())"
    lines = slurm.call("srun", "--mpi=none", "--ntasks=3", sys.executable, "-c", told).splitlines()
    assert sorted(lines) == ["3 3 False", "3 3 False", "3 3 True"]


def test_generate_takes_words_after_the_script(slurm: Cluster, toy: Path, tmp_path: Path) -> None:
    """And `sbatch --export=NAME` does not keep the environment from the ranks."""
    words = ("--quiet", *GREEDY, "--prompt", PROMPT)
    alone = run(None, *PROGRAM, "--model", toy, *words)
    streams = (f"--output={tmp_path}/%j.out", f"--error={tmp_path}/%j.err")
    script = ("sbatch", "--parsable", "--ntasks-per-node=2", "--export=MODEL,VENV", *streams, JOBS / "generate.sbatch")
    job = Job(slurm, slurm.call(*script, *words, MODEL=toy).strip(), tmp_path)
    assert job.wait_for_end() == ("COMPLETED", 0), job.errors
    assert job.output == alone.stdout


def test_a_planned_script_runs(slurm: Cluster, toy: Path, tmp_path: Path) -> None:
    script = tmp_path / "planned.sbatch"
    options = ("--ranks-per-node", "2", "--max-seq-len", "64", "--sbatch", script)
    assert run(None, *PROGRAM, "plan", "--model", toy, *options).status == 0
    job = slurm.submit(script, tmp_path, ARGS=" ".join(("--json", *GREEDY)))
    assert job.wait_for_end() == ("COMPLETED", 0), job.errors
    assert json.loads(job.output)["ranks"] == 2


def test_convert_writes_the_same_file_as_one_rank(slurm: Cluster, tmp_path: Path) -> None:
    source, alone, target = FOLDER / "llama", tmp_path / "alone.h5", tmp_path / "target.h5"
    assert run(None, *PROGRAM, "convert", source, alone, "--weights", "q8_0").status == 0
    parameters = {"SOURCE": source, "TARGET": target, "WEIGHTS": "q8_0"}
    job = slurm.submit(JOBS / "convert.sbatch", tmp_path, **parameters)
    assert job.wait_for_end() == ("COMPLETED", 0), job.errors
    assert target.read_bytes() == alone.read_bytes()
    again = slurm.submit(JOBS / "convert.sbatch", tmp_path, **parameters)
    assert again.wait_for_end() == ("FAILED", 2), again.errors
    assert "--force" in again.errors


@pytest.mark.parametrize(("script", "words"), [("convert.sbatch", "set SOURCE"), ("batch.sbatch", "set INPUT")])
def test_what_is_not_given_is_said(slurm: Cluster, tmp_path: Path, script: str, words: str) -> None:
    job = slurm.submit(JOBS / script, tmp_path)
    assert job.wait_for_end() == ("FAILED", 2), job.errors
    assert words in job.errors


def test_chat_talks_on_nodes_of_its_own(slurm: Cluster, toy: Path) -> None:
    """A question through a pipe; the nodes are given back."""
    options = ("--quiet", *GREEDY)
    alone = run(None, *PROGRAM, "chat", "--model", toy, *options, stdin=b"hello\n")
    done = subprocess.run(
        ["bash", str(JOBS / "chat.sh"), "--ntasks=2"],
        env=slurm.environment(MODEL=toy, ARGS=" ".join(options)),
        cwd=ROOT,
        input=b"hello\n",
        capture_output=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(errors="replace") == alone.stdout
    assert b"Relinquishing" in done.stderr


@needs("batch")
@pytest.mark.parametrize("launch", ["mpirun", "srun"], indirect=True)
def test_batch_is_stopped_half_way_and_finishes(
    slurm: Cluster, toy: Path, tmp_path: Path, launch: dict[str, str]
) -> None:
    """Stopped as before the end of its time, it puts itself back, goes on, and every request is answered once."""
    asked, answers = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    asked.write_text("".join(_request(number) for number in range(REQUESTS)))
    parameters = {"MODEL": toy, "INPUT": asked, "OUTPUT": answers, **launch}
    job = slurm.submit(JOBS / "batch.sbatch", tmp_path, **parameters)
    job.wait_until(lambda: answers.exists() and answers.stat().st_size > 0, "the first answer")
    job.signal("USR1")
    job.wait_until(lambda: int(job.show("Restarts")) == 1, "put back into the queue")
    done = len(answers.read_text().splitlines())
    assert 0 < done < REQUESTS
    assert job.wait_for_end() == ("COMPLETED", 0), job.errors
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sorted(row["custom_id"] for row in rows) == sorted(f"r{number}" for number in range(REQUESTS))
    assert not any(row.get("error") for row in rows)
    assert not answers.with_name("answers.jsonl.idle").exists()


def _request(number: int) -> str:
    """Requests of different lengths, so that answers come one after another however many run together."""
    row = {"id": f"r{number}", "prompt": f"Once {number}", "max_tokens": 20 + number % 7 * 30, "temperature": 0}
    return json.dumps(row) + "\n"


@needs("batch")
def test_a_cancelled_batch_stays_cancelled(slurm: Cluster, toy: Path, tmp_path: Path) -> None:
    asked, answers = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    asked.write_text("".join(_request(number) for number in range(REQUESTS)))
    job = slurm.submit(JOBS / "batch.sbatch", tmp_path, MODEL=toy, INPUT=asked, OUTPUT=answers)
    job.wait_until(lambda: answers.exists() and answers.stat().st_size > 0, "the first answer")
    slurm.call("scancel", job.number)
    assert job.wait_for_end()[0] == "CANCELLED"
    assert job.show("Restarts") == "0"


@needs("batch")
def test_a_batch_that_gets_nowhere_is_not_put_back(slurm: Cluster, toy: Path, tmp_path: Path) -> None:
    """Asked to stop while its launcher still starts, before any answer: nobody listens to the signal yet."""
    asked, answers, launcher = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl", tmp_path / "slow-mpirun"
    asked.write_text(_request(0))
    launcher.write_text("#!/bin/sh\nexec sleep 120\n")
    launcher.chmod(0o755)
    parameters = {"MODEL": toy, "INPUT": asked, "OUTPUT": answers, "IDLE": "1", "LAUNCH": launcher}
    job = slurm.submit(JOBS / "batch.sbatch", tmp_path, **parameters)
    job.wait_until(lambda: "start 0" in job.errors, "the start")
    job.signal("USR1")
    assert job.wait_for_end() == ("FAILED", 1), job.errors
    assert "not put back into the queue" in job.errors
    assert job.show("Restarts") == "0"


@needs("serve")
def test_serve_answers_and_finishes(slurm: Cluster, toy: Path, tmp_path: Path) -> None:
    port, rendezvous = free_port(), tmp_path / "server.json"
    job = slurm.submit(JOBS / "serve.sbatch", tmp_path, MODEL=toy, PORT=str(port), RENDEZVOUS=rendezvous)
    job.wait_until(rendezvous.exists, "the rendezvous file")
    key = json.loads(rendezvous.read_text())["key"]
    assert _http_status(f"http://127.0.0.1:{port}/") == 200
    assert _http_status(f"http://127.0.0.1:{port}/v1/models") == 401
    assert _http_status(f"http://127.0.0.1:{port}/v1/models", key) == 200
    words = ("client", "--rendezvous", rendezvous, *GREEDY, "--prompt", PROMPT)
    answer, alone = (run(None, *PROGRAM, *command) for command in (words, _chat_alone(toy)))
    assert (answer.status, answer.stdout) == (0, alone.stdout), answer.stderr
    job.signal("USR1")
    assert job.wait_for_end() == ("COMPLETED", 0), job.errors
    assert not rendezvous.exists()
    assert key not in job.errors + job.output


def _chat_alone(model: Path) -> tuple[str | Path, ...]:
    return ("generate", "--model", model, "--chat", "--quiet", *GREEDY, "--prompt", PROMPT)


def _http_status(address: str, key: str = "") -> int:
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:  # an answer all the same
        return refused.code
