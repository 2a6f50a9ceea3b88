"""The engine's thread and the server's: outputs to whoever waits for them, until the server shuts down."""

import asyncio
import time
from collections.abc import Callable

import pytest

from mpillama.errors import UserError
from mpillama.job.deadline import Deadline, StopRequest
from mpillama.replicas.router import Router
from mpillama.server.async_engine import DRAINING, AsyncEngine
from mpillama.server.engine_loop import EngineLoop, Shutdown
from mpillama.server.engine_requests import Output, ServerRequest
from mpillama.text.sampling_params import SamplingParams
from tests.replicas.scripted import ScriptedReplica


def request(key: int) -> ServerRequest:
    return ServerRequest([1, 2], SamplingParams(seed=1), key=key)


def finish(asked: ServerRequest) -> Output:
    return Output(asked.key, [5], "five", finish_reason="stop")


class Server:
    """The engine's thread on scripted replicas; `told` is what it said of the end."""

    def __init__(self, *replicas: ScriptedReplica, grace: float = 5.0, deadline: Deadline | None = None):
        self.stop, self.told = StopRequest(), list[str]()
        self.engine = AsyncEngine()
        router = Router(replicas, None, "start the server again.")
        shutdown = Shutdown(self.stop, deadline or Deadline(None), grace)
        self.loop = EngineLoop(router, self.engine, shutdown, self.told.append)

    def run(self, act: Callable[[asyncio.Queue[Output]], None]) -> list[Output]:
        """All that came into a queue while the thread ran."""
        return asyncio.run(self._run(act))

    async def _run(self, act: Callable[[asyncio.Queue[Output]], None]) -> list[Output]:
        queue: asyncio.Queue[Output] = asyncio.Queue()
        self.engine.attach(asyncio.get_running_loop())
        act(queue)
        try:
            await asyncio.to_thread(self.loop.run)
        finally:
            await asyncio.sleep(0)
            self.outputs = [queue.get_nowait() for _ in range(queue.qsize())]
        return self.outputs


def test_answers_finish_after_a_signal():
    server = Server(ScriptedReplica(finish))

    def act(queue):
        for key in range(3):
            server.engine.submit(request(key), queue)
        server.stop.name = "SIGTERM"

    outputs = server.run(act)
    assert [(output.key, output.finish_reason) for output in outputs] == [(0, "stop"), (1, "stop"), (2, "stop")]
    assert server.told == ["SIGTERM"]
    assert (server.engine.status, "SIGTERM" in server.engine.reason) == (DRAINING, True)


def test_answers_that_take_longer_than_the_grace_are_cut():
    server = Server(ScriptedReplica(lambda asked: Output(asked.key, [5])), grace=0.2)

    def act(queue):
        server.engine.submit(request(1), queue)
        server.stop.name = "SIGTERM"

    began = time.monotonic()
    *_, last = server.run(act)
    assert (last.finish_reason, last.error) == ("error", "the server ends before this answer is finished")
    assert time.monotonic() - began < 30


def test_the_end_of_the_job_is_announced_in_time():
    now = [0.0]
    server = Server(ScriptedReplica(finish), grace=5.0, deadline=Deadline(100.0, clock=lambda: now[0]))

    def act(queue):
        now[0] = 95.5

    assert server.run(act) == []
    assert server.told == ["the end of the job's time"]


def test_a_cancelled_answer_is_forgotten():
    replica = ScriptedReplica(finish)
    server = Server(replica)

    def act(queue):
        server.engine.submit(request(1), queue)
        server.engine.submit(request(2), queue)
        server.engine.cancel(1)
        server.engine.cancel(77)
        server.stop.name = "SIGTERM"

    assert [output.key for output in server.run(act)] == [2]
    assert replica.cancelled == [1]


def test_without_a_replica_left_who_waits_is_told():
    server = Server(ScriptedReplica(finish, fails=1))
    with pytest.raises(UserError, match=r"no replica is left: out of memory; start the server again\."):
        server.run(lambda queue: server.engine.submit(request(1), queue))
    assert [output.finish_reason for output in server.outputs] == ["error"]


class Streaming(ScriptedReplica):
    """Gives its outputs one a step, and fails once it has none left."""

    def __init__(self, outputs: list[Output], capacity: int):
        super().__init__(finish, capacity)
        self.outputs = iter(outputs)

    def step(self) -> list[Output]:
        output = next(self.outputs, None) if self.queue and not self.failure else None
        self.failure = "disk" if self.queue and output is None else None
        return [output] if output else []


def test_an_answer_that_begins_again_elsewhere_goes_on_where_it_was():
    first = Output(1, [5, 6], "ab", prompt_logprobs=("p",))
    again = [Output(1, [5], "a", prompt_logprobs=("p",)), Output(1, [6, 7], "bc", first_token=1, first_character=1)]
    last = Output(1, [8], "d", finish_reason="stop", first_token=3, first_character=3)
    server = Server(Streaming([first], 3), Streaming([*again, last], 2))

    def act(queue):
        server.engine.submit(request(1), queue)
        server.stop.name = "SIGTERM"

    outputs = server.run(act)
    assert [(list(o.token_ids), o.text) for o in outputs] == [([5, 6], "ab"), ([], ""), ([7], "c"), ([8], "d")]
    assert [output.prompt_logprobs for output in outputs] == [("p",), (), (), ()]


def test_a_request_that_was_still_prepared_when_the_engines_ended_is_told():
    """Else it would wait for as long as the HTTP server waits for its connections."""
    server = Server(ScriptedReplica(finish))

    async def ask_late() -> Output:
        late: asyncio.Queue[Output] = asyncio.Queue()
        server.stop.name = "SIGTERM"
        await server._run(lambda queue: None)
        server.engine.submit(request(7), late)
        async with asyncio.timeout(5):
            return await late.get()

    output = asyncio.run(ask_late())
    assert (output.key, output.finish_reason) == (7, "error")
    assert "the server ends" in (output.error or "")
    assert server.engine.active == 0
