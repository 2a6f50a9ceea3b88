"""The server thread's side: HTTP requests wait here for outputs, which the engine's thread delivers."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from queue import SimpleQueue

from mpillama.engine.sequence import Pooling
from mpillama.openai.prompts import Prompter
from mpillama.openai.reasoning import AnswerFormat
from mpillama.openai.tool_calls import ToolFormat
from mpillama.replicas.replica import Replica
from mpillama.server.engine_requests import EngineRouter, Output, ServerRequest
from mpillama.text.constraint import Grammars

LOADING, SERVING, DRAINING = "loading", "ok", "draining"


@dataclass(frozen=True)
class ServerState:
    """What requests are answered with, once the model is loaded."""

    model: str
    names: frozenset[str]
    created: int
    max_model_len: int
    prompter: Prompter
    grammars: Grammars
    tools: ToolFormat | None
    reasoning: AnswerFormat | None
    pooling: Pooling
    replicas: Sequence[Replica[ServerRequest, Output]]
    capacity: int
    """Answers that may be under way or wait."""
    hidden_size: int
    """Numbers of an embedding."""
    asker: str = ""
    """Who asks, by a digest of the key that was shown; "" without one."""
    generates: bool = True
    """Whether the model has an output head; without one it makes embeddings only."""

    def salt(self, given: str | None) -> str:
        """What the asker's cache blocks are shared under: the key, and what the request says."""
        return f"{self.asker}/{given}" if given else self.asker


class Unavailable(Exception):  # noqa: N818 - named as its status is
    """No request can be taken now."""


class QueueFull(Exception):  # noqa: N818 - named as its status is
    """Too many requests wait."""


class AnswerFailed(Exception):  # noqa: N818 - told to the client, nothing of ours is broken
    """The engine could not finish an answer."""


class AnswerRefused(AnswerFailed):
    """An answer that can never be finished, such as one whose grammar is too complex."""


class ClientGone(Exception):  # noqa: N818 - nobody is left to be told
    """The client has closed its connection, or does not read."""


@dataclass
class _Waiting:
    """Who waits for a request's outputs, and how much of its answer was delivered."""

    queue: "asyncio.Queue[Output]"
    tokens: int = 0
    characters: int = 0

    def deliver(self, output: Output) -> None:
        """Pass on what is new: after a replica failed, another one begins the answer again."""
        self.queue.put_nowait(output.after(self.tokens, self.characters))
        self.tokens = max(self.tokens, output.first_token + len(output.token_ids))
        self.characters = max(self.characters, output.first_character + len(output.text))


class AsyncEngine:
    """Brings requests to the engine's thread and outputs to whoever waits for them; lives in the server's event loop.

    Methods named `now_…` are for the engine's thread, which calls what is in `inbox` with its router.
    """

    def __init__(self) -> None:
        self.inbox: SimpleQueue[Callable[[EngineRouter], None]] = SimpleQueue()
        self.status = LOADING
        self.reason = "the model is being loaded"
        self.state: ServerState | None = None
        self._keys = itertools.count()
        self._waiting: dict[int, _Waiting] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = False

    # -- the engine's thread ---------------------------------------------------------------------------------------

    def now_serving(self, state: ServerState) -> None:
        self.state, self.status, self.reason = state, SERVING, ""

    def now_draining(self, reason: str) -> None:
        """No more requests are taken."""
        if self.status != DRAINING:
            self.status, self.reason = DRAINING, f"the server is about to end ({reason})"

    def now_delivered(self, outputs: list[Output]) -> None:
        self._in_loop(lambda: self._deliver(outputs))

    def now_ended(self) -> None:
        """Nothing more will be delivered: who still waits is told."""
        self.now_draining(self.reason or "its engines have failed")
        self._in_loop(self._cut)

    def _in_loop(self, action: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action)

    # -- the server's thread ---------------------------------------------------------------------------------------

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    @property
    def active(self) -> int:
        """Requests that wait or are computed."""
        return len(self._waiting)

    def open_state(self) -> ServerState:
        """What requests are answered with; Unavailable while loading or draining."""
        if self.status != SERVING or self.state is None:
            raise Unavailable(self.reason)
        return self.state

    def check_room(self, count: int) -> None:
        """QueueFull if so many more requests are too many."""
        capacity = self.open_state().capacity
        if self.active + count > capacity:
            raise QueueFull(f"{self.active} requests are under way or wait, and no more than {capacity} may")

    @asynccontextmanager
    async def generate(self, requests: Sequence[ServerRequest]) -> AsyncIterator["Answers"]:
        """The outputs of the requests, which get their keys here, as long as they are wanted."""
        self.check_room(len(requests))
        answers = Answers(self, [replace(request, key=next(self._keys)) for request in requests])
        try:
            yield answers
        finally:
            answers.close()

    def submit(self, request: ServerRequest, queue: "asyncio.Queue[Output]") -> None:
        """Bring a request to the engine's thread; its outputs come into the queue."""
        self._waiting[request.key] = _Waiting(queue)
        if self._ended:  # while it was prepared
            self._cut()
        else:
            self.inbox.put(lambda router: router.submit(request))

    def cancel(self, key: int) -> None:
        """Nobody waits for that request any more."""
        if self._waiting.pop(key, None) is not None:
            self.inbox.put(lambda router: router.cancel(key))

    def ask_memory(self) -> None:
        self.inbox.put(lambda router: router.ask_memory())

    def _cut(self) -> None:
        self._ended = True
        reason = "the server ends before this answer is finished"
        self._deliver([Output(key, finish_reason="error", error=reason) for key in self._waiting])

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            if waiting := self._waiting.get(output.key):
                waiting.deliver(output)
                if output.finished:
                    del self._waiting[output.key]


class Answers:
    """The answers of one HTTP request.

    Where several share a prompt that is worth it, the first one begins alone, so that the others find its cache blocks.
    """

    def __init__(self, engine: AsyncEngine, requests: Sequence[ServerRequest]):
        self._engine = engine
        self._queue: asyncio.Queue[Output] = asyncio.Queue()
        self._index = {request.key: i for i, request in enumerate(requests)}
        self._later = list(requests[1:]) if shares_prompt(requests) else []
        self._left = dict(self._index)
        self._begun: set[int] = set()
        for request in requests[: len(requests) - len(self._later)]:
            engine.submit(request, self._queue)

    async def outputs(self, seconds: float) -> AsyncIterator[tuple[int, Output]]:
        """Index of a request, and how it went on, until all are over; answers are cut after so many seconds."""
        end = time.monotonic() + seconds
        while self._left:
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    output = await self._queue.get()
            except TimeoutError:
                for key, index in self._left.items():
                    yield index, self._cut(key)
                return
            self._begin_later()
            self._begun.add(output.key)
            if output.finished:
                del self._left[output.key]
            yield self._index[output.key], output

    def _cut(self, key: int) -> Output:
        if key in self._begun:
            return Output(key, finish_reason="length")
        return Output(key, finish_reason="error", error="the answer did not begin in time")

    def _begin_later(self) -> None:
        later, self._later = self._later, []
        for request in later:
            self._engine.submit(request, self._queue)

    def close(self) -> None:
        """Cancel what is not over."""
        for key in self._index:
            self._engine.cancel(key)


def shares_prompt(requests: Sequence[ServerRequest]) -> bool:
    """Whether requests have one prompt that the cache can keep a part of."""
    first = requests[0]
    return len(requests) > 1 and first.reuse_prefix and all(r.prompt_ids == first.prompt_ids for r in requests)
