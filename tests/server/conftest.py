"""Servers under test: real ones, on ranks of their own."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from tests.conftest import ModelFile
from tests.system.mpi.launch import DEMO_MODEL, PROGRAM, SCRIPTS, TIMEOUT, Launch, started

PACED = (SCRIPTS / "failing_ranks.py", "0", "0", "paced")
"""The program with steps that take 5 ms at least, so that an answer is long under way on any machine."""


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    key: str | None
    rendezvous: Path
    launch: Launch

    @property
    def client(self) -> openai.OpenAI:
        """The client that users have."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, timeout=60)

    def http(self) -> httpx.Client:
        """A plain client."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)


Serving = Callable[..., AbstractContextManager[Served]]


@contextmanager
def serving(
    model: Path,
    folder: Path,
    ranks: int | None,
    *options: str,
    env: dict[str, str] | None = None,
    program: Sequence[str | Path] = PROGRAM,
) -> Iterator[Served]:
    """Run `serve` until the end of the block; `rendezvous` is written when it answers."""
    file = folder / f"server-{time.monotonic_ns()}.json"
    words = ("serve", "--model", model, "--port", "0", "--rendezvous", file, *options)
    with started(ranks, *program, *words, env=env) as launch:
        end = time.monotonic() + TIMEOUT
        while not file.exists():
            assert time.monotonic() < end, launch.stderr()
            assert launch.process.poll() is None, launch.stderr()
            time.sleep(0.05)
        found = json.loads(file.read_text())
        yield Served(found["url"], found["key"], file, launch)


@pytest.fixture(scope="session")
def toy(model_file: ModelFile) -> Path:
    """A small random model."""
    return model_file("toy", "q8_0")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The demo model on two ranks."""
    with serving(DEMO_MODEL, tmp_path_factory.mktemp("served"), 2) as server:
        yield server
