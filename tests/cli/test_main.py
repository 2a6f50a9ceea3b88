"""The program's entrance: mistakes that are told before MPI starts, and commands that cannot be imported."""

import shlex
import subprocess
import sys
from typing import NoReturn

import pytest

from mpillama.__main__ import import_command, main
from mpillama.comm.failure import DELIVERY_SECONDS, LONGEST_TURN
from mpillama.errors import UserError


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A package is not installed."""
    monkeypatch.delitem(sys.modules, "mpillama.cli.client", raising=False)
    monkeypatch.setitem(sys.modules, request.param, None)


@pytest.mark.parametrize("without", ["httpx"], indirect=True)
@pytest.mark.usefixtures("without")
def test_an_optional_package_that_is_missing_is_named_with_its_remedy() -> None:
    with pytest.raises(UserError, match=r"client needs the package httpx: pip install 'mpillama\[serve\]'\."):
        import_command("client")


@pytest.mark.parametrize("without", ["mpillama.redaction"], indirect=True)
@pytest.mark.usefixtures("without")
def test_a_module_of_the_package_that_is_missing_is_a_failure() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"mpillama\.redaction"):
        import_command("client")


BEFORE_A_MODEL = """
import mpillama.cli.generate, psutil
from mpi4py import MPI
from mpillama.kernels.isa import choose_isa, host_features
from mpillama.kernels.library import load
load(choose_isa("", host_features()).name)
print(psutil.Process().memory_info().rss)
"""


@pytest.mark.slow
def test_a_rank_without_a_model_takes_little_memory() -> None:
    """The program, MPI and its kernels: 74 MB with MPICH; 110 are allowed."""
    done = subprocess.run([sys.executable, "-c", BEFORE_A_MODEL], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 110e6


MISTAKES = {
    "unknown option": ("--modell x", "--modell"),
    "unknown command": ("generat", "generat"),
    "unknown value": ("--kv-type q9", "q9"),
    "not a number": ("--max-tokens many", "many"),
    "missing value": ("--model", "--model"),
    "too many arguments": ("inspect a.h5 b.h5", "b.h5"),
    "too few arguments": ("inspect", "file"),
    "no tokens": ("--max-tokens 0", "--max-tokens"),
    "no tokens in chat": ("chat --max-tokens 0", "--max-tokens"),
    "no threads": ("--threads 0", "--threads is 0"),
    "negative threads": ("--threads -2", "--threads is -2"),
    "no threads for doctor": ("doctor --threads 0", "--threads is 0"),
    "negative timeout": ("--timeout -1", "--timeout is -1"),
    "short timeout": ("--timeout 0.5", "--timeout is 0.5"),
    "timeout not a number": ("--timeout nan", "--timeout is nan"),
    "chat and raw": ("--chat --raw", "--raw"),
    "bias without value": ("--logit-bias 17", "'17'"),
    "bias of no number": ("--logit-bias 1=2 3=much", "'3=much'"),
    "infinite bias": ("--logit-bias 3=inf", "logit_bias"),
    "negative temperature": ("--temperature -1", "temperature"),
    "temperature not a number": ("--temperature nan", "temperature"),
    "top_p above 1": ("--top-p 1.5", "top_p"),
    "negative top_k": ("--top-k -1", "top_k"),
    "negative seed": ("--seed -1", "seed"),
    "empty stop": ("--stop ''", "stop"),
    "ids that are no numbers": ("--prompt-token-ids 1,two", "1,two"),
    "no ids": ("--prompt-token-ids=", "--prompt-token-ids"),
    "no prompt": ("--prompt= --model none.h5", "prompt is empty"),
    "no context": ("--max-seq-len 0", "--max-seq-len is 0"),
    "negative context": ("--max-seq-len -5", "--max-seq-len is -5"),
    "no chunk": ("chat --prefill-chunk 0", "--prefill-chunk is 0"),
    "negative chunk": ("--prefill-chunk -5", "--prefill-chunk is -5"),
    "no layers": ("--layers 0", "--layers is 0"),
    "no interval": ("--monitor 0", "--monitor is 0"),
    "negative interval": ("--monitor -1", "--monitor is -1"),
    "floor of no number": ("--memory-floor much", "--memory-floor 'much'"),
    "negative drafts": ("chat --speculate -1", "--speculate is -1"),
    "negative drafts of batch": ("batch in out --speculate -1", "--speculate is -1"),
    "no sequences": ("batch in out --sequences 0", "--sequences is 0"),
    "no cache": ("batch in out --cache-tokens 0", "--cache-tokens is 0"),
    "no ranks": ("batch in out --tensor-parallel 0", "--tensor-parallel is 0"),
    "time of no number": ("batch in out --time-limit soon", "--time-limit 'soon'"),
    "small window": ("perplexity --context 1", "--context is 1"),
    "long stride": ("perplexity --context 4 --stride 9", "--stride is 9"),
    "no model to measure": ("bench", "--shape"),
    "no steps": ("bench --shape llama-3.2-1b --decode 0", "--decode is 0"),
    "no batch": ("bench --shape llama-3.2-1b --batch 1 0", "--batch is 0"),
    "no replicas": ("serve --replicas 0", "--replicas is 0"),
    "no sequences of serve": ("serve --sequences 0", "--sequences is 0"),
    "negative temperature of serve": ("serve --temperature -1", "temperature"),
    "half of TLS": ("serve --tls-key x", "go together"),
    "body of no number": ("serve --body-limit much", "--body-limit 'much'"),
    "negative grace": ("serve --grace -1", "--grace is -1"),
    "negative queue": ("serve --queue -1", "--queue is -1"),
    "no nodes": ("plan --shape llama-3.2-1b --nodes 0", "--nodes is 0"),
    "ranks of no drafts": ("--draft-ranks first", "--draft-ranks first says nothing without --draft-model or --mtp"),
    "ranks of no drafts of serve": ("serve --speculate 2 --draft-ranks first", "says nothing without --draft-model"),
    "plan of ranks of no drafts": (
        "plan --shape llama-3.2-1b --speculate 2 --draft-ranks first",
        "--draft-ranks first says nothing without --draft-model",
    ),
    "share of no drafts": (
        "plan --shape llama-3.2-1b --acceptance 0.7",
        "--acceptance 0.7 says nothing without --speculate or --draft-model",
    ),
    "prompts of drafts": (
        "bench --model a.h5 --speculate 2 --prefill 64",
        "--prefill and --context say nothing of drafts",
    ),
    "context of drafts": (
        "bench --model a.h5 --draft-model b.h5 --context 64",
        "--prefill and --context say nothing of drafts",
    ),
    "no share": ("plan --shape llama-3.2-1b --speculate 2 --acceptance 7", "--acceptance is 7"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_before_anything_starts(
    mistake: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = MISTAKES[mistake]

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is imported")  # MPI and commands come by import_module

    monkeypatch.setattr("mpillama.__main__.import_module", refuse)
    assert main(shlex.split(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("mpillama: ")
    assert words in line


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_stays_until_the_first_has_said_that_the_host_is_too_small(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Open MPI's launcher ends all ranks with the first that leaves, whose words or not."""

    def refuse(ranks: int) -> NoReturn:
        raise UserError(f"too small for {ranks}")

    said = []
    monkeypatch.setattr("mpillama.__main__.refuse_small_host", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: said.append((seconds, capsys.readouterr().err)))
    monkeypatch.setenv("MPI_LOCALRANKID", str(rank))
    for name in ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    assert end.value.code == 2
    first = [(DELIVERY_SECONDS, "mpillama: too small for 2\n")], [(LONGEST_TURN, "")]
    assert said == first[rank]
