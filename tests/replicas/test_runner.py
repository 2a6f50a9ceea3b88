"""Requests into a real engine, on a replica that may fail."""

from concurrent.futures import Future
from dataclasses import dataclass

import pytest

from mpillama.comm.watchdog import Watch
from mpillama.engine.engine import Engine, Update
from mpillama.engine.executor import Executor
from mpillama.engine.sequence import Request
from mpillama.errors import UserError
from mpillama.replicas import runner as runner_module
from mpillama.replicas.replica import LocalReplica
from mpillama.replicas.router import Router
from mpillama.replicas.runner import Adapter, EngineRunner
from mpillama.text.sampling_params import SamplingParams
from mpillama.text.tokenizer import Tokenizer
from tests import running
from tests import tiny_models as models
from tests.conftest import THREADS, ModelFile

LONGEST = 256


@dataclass(frozen=True)
class Asked:
    """A request; what it is prepared with may take time."""

    key: int
    prompt: list[int]
    preparation: Future | None = None


@dataclass(frozen=True)
class Told:
    key: int
    tokens: list[int]
    error: str | None = None
    finished: bool = False


class PlainAdapter(Adapter[Asked, Told]):
    def prepare(self, request: Asked) -> Request | Future[Request]:
        return request.preparation or engine_request(request)

    def refuse(self, request: Asked, error: Exception) -> Told:
        return Told(request.key, [], str(error), finished=True)

    def output(self, update: Update) -> Told:
        return Told(update.sequence.request.key, update.token_ids, finished=update.sequence.finished)


def engine_request(asked: Asked) -> Request:
    params = SamplingParams(temperature=0.0, seed=1, max_tokens=5, ignore_eos=True)
    return Request(asked.prompt, params, asked.key)


@pytest.fixture(scope="module")
def model(model_file: ModelFile):
    return running.load(model_file("toy", "q8_0"), THREADS)


@pytest.fixture
def runner(model) -> EngineRunner[Asked, Told]:
    tokenizer = Tokenizer(models.toy_tokenizer(), bos_token_id=models.BOS, eos_token_ids=(models.EOS,), add_bos=True)
    return EngineRunner(Engine(Executor(model, LONGEST, "f16", 48, 2, 8), tokenizer), PlainAdapter())


def run(runner: EngineRunner[Asked, Told]) -> dict[int, list[int]]:
    """The tokens of each request once all have finished."""
    found: dict[int, list[int]] = {}
    while not runner.idle:
        for told in runner.step():
            found[told.key] = found.get(told.key, []) + told.tokens
    return found


def test_outputs_are_those_of_their_requests(runner):
    for key in (3, 4, 5):
        runner.submit(Asked(key, [1, 5 + key]))
    assert runner.stats().waiting == 3
    found = run(runner)
    assert {key: len(tokens) for key, tokens in found.items()} == {3: 5, 4: 5, 5: 5}
    stats = runner.stats()
    assert (stats.running, stats.sampled_tokens, stats.blocks) == (0, 15, 8)
    assert stats.memory == []
    runner.ask_memory()
    assert len(runner.stats().memory) == 1


def test_a_request_that_cannot_run_is_told(runner):
    runner.submit(Asked(1, [5] * (LONGEST + 1)))
    assert not runner.idle
    (told,) = runner.step()
    assert (told.key, told.finished, "context" in told.error) == (1, True, True)
    assert runner.idle


def test_the_engine_goes_on_while_a_request_is_prepared(runner):
    slow, wrong = Future(), Future()
    runner.submit(Asked(1, [7], slow))
    runner.submit(Asked(2, [8], wrong))
    runner.submit(Asked(3, [9]))
    assert sorted(run(runner)) == [3]
    slow.set_result(engine_request(Asked(1, [7])))
    wrong.set_exception(UserError("no such grammar"))
    assert not runner.idle
    assert sorted(run(runner)) == [1, 2]


def test_a_cancelled_request_ends_in_preparation_and_under_way(runner):
    preparing = Future()
    runner.submit(Asked(1, [7], preparing))
    runner.submit(Asked(2, [8]))
    runner.step()
    runner.cancel(1)
    runner.cancel(2)
    runner.cancel(3)
    assert preparing.cancelled()
    assert runner.idle


def test_other_ranks_are_told_of_a_long_pause_once_and_of_its_end(runner, monkeypatch):
    told = []

    class Idle:
        def __enter__(self):
            told.append("idle")

        def __exit__(self, *error):
            told.append("back")

    monkeypatch.setattr(runner.engine.executor.comm, "idle", Idle)
    runner.step()
    assert told == []
    monkeypatch.setattr(runner_module, "PATIENCE", 0.0)
    runner.step()
    runner.step()
    assert told == ["idle"]
    runner.submit(Asked(1, [7]))
    runner.step()
    assert told == ["idle", "back"]
    runner.wake()
    assert told == ["idle", "back"]


def break_down(runner, monkeypatch) -> None:
    def broken(segments):
        raise MemoryError("no more")

    monkeypatch.setattr(runner.engine.executor, "issue", broken)


def test_an_exception_ends_a_replica_that_may_fail(runner, monkeypatch):
    replica = LocalReplica(runner, range(1), Watch())
    routing = Router([replica], None, "start again.")
    routing.submit(Asked(1, [7]))
    break_down(runner, monkeypatch)
    assert routing.step() == []
    assert (replica.failure, replica.ready, replica.idle) == ("this rank: MemoryError: no more", False, True)
    assert runner.engine.executor.abandoned
    with pytest.raises(UserError, match="no more; start again"):
        routing.step()


def test_an_exception_ends_a_job_of_one_replica(runner, monkeypatch):
    routing = Router([LocalReplica(runner, range(1))], None, "start again.")
    routing.submit(Asked(1, [7]))
    break_down(runner, monkeypatch)
    with pytest.raises(MemoryError):
        routing.step()
