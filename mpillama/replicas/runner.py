"""Requests into an engine, outputs out."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from mpillama.engine.engine import Engine, EngineCounts, Update
from mpillama.engine.sequence import EngineSequence, Request
from mpillama.errors import UserError
from mpillama.openai.body import BadRequest

SUCCESSORS = 8
"""Requests that wait beside a full engine, so that it never runs dry."""
PATIENCE = 0.5
"""Seconds without work before the other ranks are told to expect no step: most pauses are shorter."""


class Keyed(Protocol):
    """A request; a key is never used twice."""

    @property
    def key(self) -> int: ...


class KeyedOutput(Keyed, Protocol):
    """What came of the request with that key."""

    @property
    def finished(self) -> bool: ...


RequestT = TypeVar("RequestT", bound=Keyed)
OutputT = TypeVar("OutputT", bound=KeyedOutput)


class Adapter(ABC, Generic[RequestT, OutputT]):
    """What batch and server each make of requests and of the engine's updates."""

    @abstractmethod
    def prepare(self, request: RequestT) -> Request | Future[Request]:
        """The engine's request with the same key, now or once it is built; UserError or BadRequest if it cannot run."""

    @abstractmethod
    def refuse(self, request: RequestT, error: UserError | BadRequest) -> OutputT:
        """The output of a request that cannot run."""

    @abstractmethod
    def output(self, update: Update) -> OutputT | None:
        """What to tell of an update; None if nothing."""


@dataclass
class EngineStats(EngineCounts):
    """What an engine did so far, and its state, for /metrics."""

    preemptions: int = 0
    communication_seconds: float = 0.0
    running: int = 0
    waiting: int = 0
    blocks: int = 0
    blocks_used: int = 0
    blocks_saved: int = 0
    blocks_loaded: int = 0
    prompt_room: int = 0
    late_steps: int = 0
    memory: list[int] = field(default_factory=list)
    """Resident bytes of each rank, when last asked for."""


class EngineRunner(Generic[RequestT, OutputT]):
    """Runs requests on an engine that nobody else uses."""

    def __init__(self, engine: Engine, adapter: Adapter[RequestT, OutputT]):
        self.engine = engine
        self.adapter = adapter
        self._sequences: dict[int, EngineSequence] = {}
        self._preparing: dict[int, tuple[RequestT, Future[Request]]] = {}
        self._refused: list[OutputT] = []
        self._memory: list[int] = []
        self._idle_since: float | None = None
        self._resting: AbstractContextManager[None] | None = None

    @property
    def capacity(self) -> int:
        """Requests to give it at once: a few successors, not so many that another replica could do them sooner."""
        slots = self.engine.executor.slots
        return slots + min(slots, SUCCESSORS)

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing; requests may still be in preparation."""
        return self.engine.idle and not self._refused and not self._prepared()

    def submit(self, request: RequestT) -> None:
        """Begin with a request; one that cannot run has its output in the next step."""
        self._begin(request, lambda: self.adapter.prepare(request))

    def _begin(self, request: RequestT, prepare: Callable[[], Request | Future[Request]]) -> None:
        try:
            prepared = prepare()
            if isinstance(prepared, Future):
                self._preparing[request.key] = request, prepared
            else:
                self._sequences[request.key] = self.engine.submit(prepared)
        except (UserError, BadRequest) as error:
            self._refused.append(self.adapter.refuse(request, error))

    def _prepared(self) -> list[int]:
        return [key for key, (_, future) in self._preparing.items() if future.done()]

    def cancel(self, key: int) -> None:
        """Forget a request; nothing happens if it is over."""
        if preparing := self._preparing.pop(key, None):
            preparing[1].cancel()
        if sequence := self._sequences.pop(key, None):
            self.engine.cancel(sequence)

    def step(self) -> list[OutputT]:
        """Run a step if there is anything to do; after a while without, the other ranks are told to sleep."""
        if self.idle:
            self._rest()
            return []
        self.wake()
        for key in self._prepared():
            request, future = self._preparing.pop(key)
            self._begin(request, future.result)
        outputs, self._refused = self._refused, []
        for update in self.engine.step():
            if update.sequence.finished:
                del self._sequences[update.sequence.request.key]
            if (output := self.adapter.output(update)) is not None:
                outputs.append(output)
        return outputs

    def _rest(self) -> None:
        now = time.monotonic()
        self._idle_since = self._idle_since or now
        if self._resting is None and now - self._idle_since >= PATIENCE:
            self._resting = self.engine.executor.comm.idle()
            self._resting.__enter__()

    def wake(self) -> None:
        """Tell the other ranks that steps, or the end, will come."""
        resting, self._resting, self._idle_since = self._resting, None, None
        if resting is not None:
            resting.__exit__(None, None, None)

    def ask_memory(self) -> None:
        """Let all ranks of the replica report their memory; between two steps."""
        self.wake()
        self._memory = self.engine.executor.memory_per_rank()

    def stats(self) -> EngineStats:
        engine, scheduler = self.engine, self.engine.scheduler
        return EngineStats(
            **vars(engine.counts),
            preemptions=scheduler.preemptions,
            communication_seconds=engine.executor.comm.seconds,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks=engine.pool.size,
            blocks_used=engine.pool.used,
            blocks_saved=engine.disk.counts.saved if engine.disk else 0,
            blocks_loaded=engine.disk.counts.loaded if engine.disk else 0,
            prompt_room=engine.pace.room if engine.pace else engine.executor.max_tokens,
            late_steps=engine.pace.late if engine.pace else 0,
            memory=self._memory,
        )
