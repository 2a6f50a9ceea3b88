"""The server thread's side: requests wait here for progress of their tasks, which the dispatcher's thread delivers."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from mpillama.api.prompts import Prompter
from mpillama.api.reasoning import ReasoningFormat
from mpillama.api.tool_calls import ToolFormat
from mpillama.engine.sequence import Pooling
from mpillama.serve.dispatcher import Inbox
from mpillama.serve.replicas import Replica
from mpillama.serve.tasks import AskMemory, Cancel, Progress, Task
from mpillama.text.constraint import Grammars

LOADING, SERVING, DRAINING = "loading", "ok", "draining"


@dataclass(frozen=True)
class Service:
    """What the requests are answered with, once the model is loaded."""

    model: str
    names: frozenset[str]
    created: int
    max_model_len: int
    prompter: Prompter
    grammars: Grammars
    tools: ToolFormat | None
    reasoning: ReasoningFormat | None
    pooling: Pooling
    replicas: Sequence[Replica]
    capacity: int
    """Tasks that may be under way or wait."""
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


class Front:
    """Brings tasks to the dispatcher and their progress to whoever waits for it; lives in the server's event loop.

    Methods named `now_…` are for the dispatcher's thread.
    """

    def __init__(self, inbox: Inbox):
        self.inbox = inbox
        self.state = LOADING
        self.reason = "the model is being loaded"
        self.service: Service | None = None
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Queue[Progress]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- the dispatcher's thread -----------------------------------------------------------------------------------

    def now_serving(self, service: Service) -> None:
        """The model is loaded."""
        self.service, self.state, self.reason = service, SERVING, ""

    def now_draining(self, reason: str) -> None:
        """No more requests are taken."""
        if self.state != DRAINING:
            self.state, self.reason = DRAINING, f"the server is about to end ({reason})"

    def now_delivered(self, progress: list[Progress]) -> None:
        """Progress of some tasks."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._spread, progress)

    def now_ended(self) -> None:
        """Nothing more will be delivered: who still waits is told."""
        self.now_draining(self.reason or "its engines have failed")
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cut)

    # -- the server's thread ---------------------------------------------------------------------------------------

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """The server has begun."""
        self._loop = loop

    @property
    def active(self) -> int:
        """Tasks that wait or are computed."""
        return len(self._waiting)

    def open_service(self) -> Service:
        """What requests are answered with; Unavailable while loading or draining."""
        if self.state != SERVING or self.service is None:
            raise Unavailable(self.reason)
        return self.service

    def check_room(self, tasks: int) -> None:
        """QueueFull if so many more tasks are too many."""
        service = self.open_service()
        if self.active + tasks > service.capacity:
            raise QueueFull(f"{self.active} requests are under way or wait, and no more than {service.capacity} may")

    @asynccontextmanager
    async def answers(self, tasks: Sequence[Task]) -> AsyncIterator["Answers"]:
        """The tasks' progress, as long as it is wanted; their `number` is given here."""
        self.check_room(len(tasks))
        answers = Answers(self, [replace(task, number=next(self._numbers)) for task in tasks])
        try:
            yield answers
        finally:
            answers.close()

    def begin(self, task: Task, queue: "asyncio.Queue[Progress]") -> None:
        """Bring a task to the dispatcher; its progress comes into the queue."""
        self._waiting[task.number] = queue
        self.inbox.put(task)

    def end(self, number: int) -> None:
        """Nobody waits for that task any more."""
        if self._waiting.pop(number, None) is not None:
            self.inbox.put(Cancel(number))

    def ask_memory(self) -> None:
        """Let the groups tell what memory they have."""
        self.inbox.put(AskMemory())

    def _cut(self) -> None:
        reason = "the server ends before this answer is finished"
        self._spread([Progress(number, finish_reason="error", error=reason) for number in self._waiting])

    def _spread(self, progress: list[Progress]) -> None:
        for one in progress:
            queue = self._waiting.get(one.number)
            if queue is None:
                continue
            if one.finish_reason is not None:
                del self._waiting[one.number]
            queue.put_nowait(one)


class Answers:
    """The tasks of one request.

    Where several share a prompt that is worth it, the first one begins alone, so that the others find its cache blocks.
    """

    def __init__(self, front: Front, tasks: Sequence[Task]):
        self._front = front
        self._queue: asyncio.Queue[Progress] = asyncio.Queue()
        self._index = {task.number: i for i, task in enumerate(tasks)}
        self._later = list(tasks[1:]) if shares_prompt(tasks) else []
        self._left = dict(self._index)
        self._begun: set[int] = set()
        for task in tasks[: len(tasks) - len(self._later)]:
            front.begin(task, self._queue)

    async def progress(self, seconds: float) -> AsyncIterator[tuple[int, Progress]]:
        """Index of a task, and how it went on, until all are over; answers are cut after so many seconds."""
        end = time.monotonic() + seconds
        while self._left:
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    one = await self._queue.get()
            except TimeoutError:
                for number, index in self._left.items():
                    yield index, self._cut(number)
                return
            self._begin_later()
            self._begun.add(one.number)
            if one.finish_reason is not None:
                del self._left[one.number]
            yield self._index[one.number], one

    def _cut(self, number: int) -> Progress:
        if number in self._begun:
            return Progress(number, finish_reason="length")
        return Progress(number, finish_reason="error", error="the answer did not begin in time")

    def _begin_later(self) -> None:
        later, self._later = self._later, []
        for task in later:
            self._front.begin(task, self._queue)

    def close(self) -> None:
        """Cancel what is not over."""
        for number in self._index:
            self._front.end(number)


def shares_prompt(tasks: Sequence[Task]) -> bool:
    """Whether tasks have one prompt that the cache can keep a part of."""
    first = tasks[0]
    return len(tasks) > 1 and first.reuse_prefix and all(task.prompt_ids == first.prompt_ids for task in tasks)
