"""A server's life in a job: where it is found, how it ends, replicas that fail, and the client."""

import json
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.server.conftest import PACED, Served, serving
from tests.system.mpi.launch import DEMO_MODEL, PROGRAM, SCRIPTS, TIMEOUT, run, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 120)]

LONG = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "max_tokens": 600,
    "temperature": 0.9,
    "extra_body": {"ignore_eos": True},
}
END_SECONDS = 60.0


def wait_until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + END_SECONDS
    while not condition():
        assert time.monotonic() < end, f"not {what} in time"
        time.sleep(0.02)


def ends(served: Served) -> tuple[int, str]:
    """The status and what was said, once the server has ended by itself."""
    try:
        status = served.launch.process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end in time; stderr: {served.launch.stderr()}") from None
    return status, served.launch.stderr()


class Reader(threading.Thread):
    """Reads a stream to its end, or its failure."""

    def __init__(self, client: openai.OpenAI, **fields: Any):
        super().__init__(daemon=True)
        self.stream = client.chat.completions.create(**{**LONG, **fields}, stream=True)
        self.text = ""
        self.finish_reason: str | None = None
        self.failure: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            for chunk in self.stream:
                self.text += chunk.choices[0].delta.content or ""
                self.finish_reason = chunk.choices[0].finish_reason
        except openai.APIError as error:
            self.failure = error


def test_the_rendezvous_file_is_private_and_goes_with_the_server(tmp_path: Path) -> None:
    with serving(DEMO_MODEL, tmp_path, 2, "--api-key", "auto") as served:
        found = json.loads(served.rendezvous.read_text())
        assert stat.S_IMODE(served.rendezvous.stat().st_mode) == 0o600
        assert found["url"] == served.url
        assert found["model"] == "demo"
        assert len(found["key"]) >= 32
        assert str(found["port"]) in found["ssh"]
        assert found["ssh"].startswith("ssh ")
        assert served.http().get("/v1/models").status_code == 200
        served.launch.ranks()[0].send_signal(signal.SIGTERM)
        status, said = ends(served)
        assert (status, "Traceback" in said) == (0, False), said
        assert found["key"] not in said
        assert not served.rendezvous.exists()
        assert served.launch.gone_within(END_SECONDS)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_running_answers_finish_before_the_end(tmp_path: Path, number: signal.Signals) -> None:
    with serving(DEMO_MODEL, tmp_path, 2, program=PACED) as served:
        readers = [Reader(served.client, seed=i) for i in range(6)]
        wait_until(lambda: all(reader.text for reader in readers), "streaming")
        for process in served.launch.ranks().values():  # as launchers do
            process.send_signal(number)
        wait_until(lambda: served.http().get("/health").status_code == 503, "draining")
        with pytest.raises(openai.InternalServerError) as refused:
            served.client.chat.completions.create(**LONG)
        assert (refused.value.status_code, "Retry-After" in refused.value.response.headers) == (503, True)
        for reader in readers:
            reader.join(END_SECONDS)
        assert [reader.finish_reason for reader in readers] == ["length"] * 6
        status, said = ends(served)
        assert (status, f"{number.name}: no more requests" in said) == (0, True), said


def test_answers_that_take_longer_than_the_grace_are_cut(tmp_path: Path, toy: Path) -> None:
    fields = {"model": toy.stem, "max_tokens": 8000}
    with serving(toy, tmp_path, 2, "--grace", "0.5") as served:
        reader = Reader(served.client, **fields)
        wait_until(lambda: reader.text, "streaming")
        served.launch.ranks()[0].send_signal(signal.SIGUSR1)
        reader.join(END_SECONDS)
        assert "the server ends before this answer is finished" in str(reader.failure)
        assert ends(served)[0] == 0


def test_the_server_ends_in_time(tmp_path: Path) -> None:
    with serving(DEMO_MODEL, tmp_path, None, "--time-limit", "4", "--grace", "2") as served:
        status, said = ends(served)
        assert (status, "the end of the job's time: no more requests" in said) == (0, True), said


def test_an_answer_that_takes_too_long_is_cut_with_its_reason(tmp_path: Path, toy: Path) -> None:
    with serving(toy, tmp_path, None, "--request-timeout", "4", program=PACED) as served:
        fields = {"model": toy.stem, "max_tokens": 8000, "stream": False}
        answer = served.client.chat.completions.create(**{**LONG, **fields})
        assert answer.choices[0].finish_reason == "length"
        assert 0 < answer.usage.completion_tokens < 8000


def test_a_second_server_leaves_the_first_ones_file(tmp_path: Path) -> None:
    """Each removes its own file only."""
    with serving(DEMO_MODEL, tmp_path, None) as served:
        mine = served.rendezvous.read_text()
        served.rendezvous.write_text(mine.replace("demo", "other"))
        served.launch.ranks()[0].send_signal(signal.SIGTERM)
        assert ends(served)[0] == 0
        assert served.rendezvous.exists()


def test_idle_ranks_rest(served: Served) -> None:
    """None of them takes as much as a third of a core while nothing is asked."""
    served.client.chat.completions.create(**{**LONG, "max_tokens": 3})
    time.sleep(1.0)
    processes = list(served.launch.ranks().values())
    before = [sum(p.cpu_times()[:2]) for p in processes]
    time.sleep(2.0)
    assert max(sum(p.cpu_times()[:2]) - b for p, b in zip(processes, before, strict=True)) < 2.0 / 3


# -- replicas ---------------------------------------------------------------------------------------------------------


def answers_of(served: Served, count: int = 12) -> list[str]:
    readers = [Reader(served.client, seed=i, max_tokens=120) for i in range(count)]
    for reader in readers:
        reader.join(END_SECONDS)
        assert reader.failure is None, reader.failure
    return [reader.text for reader in readers]


@pytest.fixture(scope="module")
def expected(served: Served) -> list[str]:
    return answers_of(served)


def steps_of(served: Served) -> dict[str, float]:
    lines = served.http().get("/metrics").text.splitlines()
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines if line.startswith("mpillama_steps_total{")}


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 2), (4, 2)])
def test_groups_share_the_requests(tmp_path: Path, expected: list[str], ranks: int, replicas: int) -> None:
    with serving(DEMO_MODEL, tmp_path, ranks, "--replicas", str(replicas)) as served:
        wait_until(lambda: all(g["ready"] for g in served.http().get("/health").json()["groups"]), "ready")
        assert answers_of(served) == expected
        assert len([steps for steps in steps_of(served).values() if steps > 50]) == replicas
        served.launch.ranks()[0].send_signal(signal.SIGTERM)
        assert ends(served)[0] == 0


@pytest.mark.parametrize(
    ("ranks", "replicas", "culprit", "kind"), [(2, 2, 0, "bug"), (2, 2, 1, "memory"), (4, 2, 3, "disk")]
)
def test_a_group_that_fails_is_taken_out_and_its_answers_go_on(
    tmp_path: Path, expected: list[str], ranks: int, replicas: int, culprit: int, kind: str
) -> None:
    """In mid-stream: what was sent stays, the rest comes from another group, the same to the last character."""
    file = tmp_path / "server.json"
    program = (SCRIPTS / "failing_ranks.py", str(culprit), "40", kind, "serve", "--model", DEMO_MODEL, "--port", "0")
    with started(ranks, *program, "--rendezvous", file, "--replicas", str(replicas)) as launch:
        wait_until(lambda: file.exists() or launch.process.poll() is not None, "serving")
        assert launch.process.poll() is None, launch.stderr()
        served = Served(json.loads(file.read_text())["url"], None, file, launch)
        wait_until(lambda: all(g["ready"] for g in served.http().get("/health").json()["groups"]), "ready")
        assert answers_of(served) == expected
        groups = served.http().get("/health").json()["groups"]
        failed = [group for group in groups if group["failure"]]
        assert len(failed) == 1
        assert culprit in failed[0]["ranks"]
        assert f"rank {culprit} of {ranks}" in failed[0]["failure"]
        assert "mpillama_replicas_failed 1.0" in served.http().get("/metrics").text
        assert answers_of(served, 4) == expected[:4]
        launch.ranks()[0].send_signal(signal.SIGTERM)
        assert ends(served)[0] == 0, launch.stderr()


def test_without_a_group_left_all_ends_and_clients_are_told(tmp_path: Path) -> None:
    file = tmp_path / "server.json"
    program = (SCRIPTS / "failing_ranks.py", "0,1", "30", "bug", "serve", "--model", DEMO_MODEL, "--port", "0")
    with started(2, *program, "--rendezvous", file, "--replicas", "2") as launch:
        wait_until(lambda: file.exists() or launch.process.poll() is not None, "serving")
        served = Served(json.loads(file.read_text())["url"], None, file, launch)
        wait_until(lambda: all(g["ready"] for g in served.http().get("/health").json()["groups"]), "ready")
        reader = Reader(served.client, seed=1)
        reader.join(END_SECONDS)
        assert "the server ends before this answer is finished" in str(reader.failure)
        status, said = ends(served)
        assert (status, said.count("no replica is left")) == (2, 1), said


# -- mistakes and the client ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--replicas", "3"), "2 ranks do not divide"),
        (("--api-key", "with blank"), "API key"),
        (("--api-key-file", "/nowhere"), "--api-key-file"),
        (("--no-auth", "--api-key", "x"), "exclude each other"),
        (("--rendezvous", "/nowhere/file"), "--rendezvous"),
    ],
)
def test_mistakes_are_one_sentence(options: tuple[str, ...], words: str) -> None:
    ran = run(2, *PROGRAM, "serve", "--port", "0", *options)
    assert (ran.status, ran.stdout, ran.stderr.count("\n")) == (2, "", 1), ran.stderr
    assert words in ran.stderr


def test_the_client_talks_by_the_rendezvous_file(served: Served, tmp_path: Path) -> None:
    ask = ("--max-tokens", "12", "--temperature", "0", "--prompt", "Tell me a story.")
    words = ("client", "--rendezvous", served.rendezvous)
    answer = run(None, *PROGRAM, *words, *ask)
    fields = {**LONG, "max_tokens": 12, "temperature": 0}
    assert answer.stdout == served.client.chat.completions.create(**fields).choices[0].message.content + "\n"
    talk = run(None, *PROGRAM, *words, *ask[:4], stdin=b"Tell me a story.\n/reset\nTell me a story.\n")
    assert (talk.status, talk.stdout, talk.stderr) == (0, answer.stdout * 2, ""), "a pipe is not asked for lines"
    gone = tmp_path / "gone.json"
    gone.write_text(served.rendezvous.read_text().replace(served.url.rsplit(":")[-1], "1"))
    missed = run(None, *PROGRAM, "client", "--rendezvous", gone, "--prompt", "x")
    assert (missed.status, missed.stderr.count("\n"), "does not answer" in missed.stderr) == (2, 1, True), missed.stderr


def test_the_client_gives_the_key(tmp_path: Path) -> None:
    with serving(DEMO_MODEL, tmp_path, None, env={"MPILLAMA_API_KEY": "sesame"}) as served:
        assert httpx.get(f"{served.url}/v1/models").status_code == 401
        words = ("client", "--prompt", "Hello.", "--max-tokens", "3")
        assert run(None, *PROGRAM, *words, "--rendezvous", served.rendezvous).status == 0
        without = run(None, *PROGRAM, *words, "--url", served.url)
        assert (without.status, "Authorization" in without.stderr) == (2, True), without.stderr
        assert psutil.pid_exists(served.launch.process.pid)


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (4, 2)])
def test_a_long_pause_is_no_failure(tmp_path: Path, ranks: int, replicas: int) -> None:
    """Ranks wait for work longer than for one another."""
    with serving(DEMO_MODEL, tmp_path, ranks, "--replicas", str(replicas), "--timeout", "4") as served:
        time.sleep(8.0)
        answers = [served.client.chat.completions.create(**{**LONG, "max_tokens": 5}) for _ in range(2 * replicas)]
        assert all(answer.usage.completion_tokens == 5 for answer in answers)
