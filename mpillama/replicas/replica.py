"""Ranks that hold a whole model, as rank 0 sees them, and the loop of their leaders."""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic

from mpillama.comm.mailbox import Mailbox
from mpillama.comm.watchdog import PeerFailedError, Watch
from mpillama.replicas.runner import EngineRunner, EngineStats, OutputT, RequestT


@dataclass(frozen=True)
class Failed:
    """A rank of the sender's replica has failed."""

    sentence: str


@dataclass(frozen=True)
class End:
    """The job is over."""

    status: int


def wait_for_end(mailbox: Mailbox, watch: Watch, error: Exception) -> int:
    """What a rank does whose replica has failed, but for rank 0; returns the exit status that rank 0 sends."""
    sentence = give_up(error, watch)
    if not isinstance(error, PeerFailedError):
        mailbox.send(0, Failed(sentence))
    mailbox.watch(0)
    while True:
        for _, message in mailbox.receive():
            if isinstance(message, End):
                return message.status
        mailbox.wait(0.02)


def give_up(error: Exception, watch: Watch) -> str:
    """Tell the other ranks of the replica, and say in a sentence what went wrong."""
    if isinstance(error, PeerFailedError):
        return f"{error} has given up"
    watch.tell_gone()
    where = watch.aborter.where if watch.aborter else "this rank"
    return f"{where}: {type(error).__name__}: {' '.join(str(error).split())}"


def end_job(mailbox: Mailbox, status: int) -> None:
    """Rank 0 lets all ranks go: leaders of replicas, and those of failed replicas, which it may not have heard of."""
    for rank in range(1, mailbox.size):
        mailbox.send(rank, End(status))


REPORT_SECONDS = 0.1
"""How old rank 0's statistics of a replica may be while it computes and has no output."""


@dataclass(frozen=True)
class Ready:
    """A leader's model is loaded; it wants so many requests at once."""

    capacity: int


@dataclass(frozen=True)
class Cancel:
    """Nobody wants that request's output any more."""

    key: int


@dataclass(frozen=True)
class AskMemory:
    """The wish to know the resident bytes of every rank."""


@dataclass(frozen=True)
class Report(Generic[OutputT]):
    """What a leader tells after a step."""

    outputs: list[OutputT]
    stats: EngineStats


class Replica(ABC, Generic[RequestT, OutputT]):
    """Ranks that hold a whole model; `requests` are under way there, `failure` says why it takes no more."""

    def __init__(self, ranks: range, capacity: int = 0):
        self.ranks = ranks
        self.capacity = capacity
        self.failure: str | None = None
        self.stats = EngineStats()
        self.requests: dict[int, RequestT] = {}

    @property
    def ready(self) -> bool:
        return self.capacity > 0 and self.failure is None

    @property
    def room(self) -> int:
        """Requests that it wants beside those under way; negative if it has more than that."""
        return self.capacity - len(self.requests)

    @property
    def idle(self) -> bool:
        """Whether a step would compute nothing in this process."""
        return True

    @abstractmethod
    def send(self, message: RequestT | Cancel | AskMemory) -> None:
        """Tell its leader to begin with a request, to forget one, or to bring the memory in `stats` up to date."""

    @abstractmethod
    def step(self) -> list[OutputT]:
        """Compute if that is for this process to do; the outputs since the last call."""


class LocalReplica(Replica[RequestT, OutputT]):
    """The replica that this process leads; without the `watch` of its ranks an exception ends the job."""

    def __init__(self, runner: EngineRunner[RequestT, OutputT], ranks: range, watch: Watch | None = None):
        super().__init__(ranks, runner.capacity)
        self.runner = runner
        self.watch = watch

    @property
    def idle(self) -> bool:
        return self.failure is not None or self.runner.idle

    def send(self, message: RequestT | Cancel | AskMemory) -> None:
        _obey(self.runner, message)

    def step(self) -> list[OutputT]:
        if self.failure:
            return []
        try:
            outputs = self.runner.step()
        except Exception as error:
            if self.watch is None:
                raise
            self.failure = give_up(error, self.watch)
            self.runner.engine.executor.abandon()
            return []
        self.stats = self.runner.stats()
        return outputs


class RemoteReplica(Replica[RequestT, OutputT]):
    """A replica that another process leads: the first of its ranks."""

    def __init__(self, mailbox: Mailbox, ranks: range):
        super().__init__(ranks)
        self.mailbox = mailbox
        self.leader = ranks.start
        self._outputs: list[OutputT] = []

    def send(self, message: RequestT | Cancel | AskMemory) -> None:
        self.mailbox.send(self.leader, message)

    def hear(self, message: Any) -> None:
        """Take a message from one of its ranks."""
        if isinstance(message, Failed):
            self.failure = self.failure or message.sentence
            self.mailbox.unwatch(self.leader)
        elif isinstance(message, Ready):
            self.capacity = message.capacity
            self.mailbox.beat_to(self.leader)
            self.mailbox.watch(self.leader)
        elif self.failure is None:
            self._outputs += message.outputs
            self.stats = message.stats

    def step(self) -> list[OutputT]:
        outputs, self._outputs = self._outputs, []
        return outputs


def follow_router(mailbox: Mailbox, runner: EngineRunner[Any, Any]) -> int:
    """A leader's loop: requests from rank 0 to the engine, outputs back; returns the exit status that rank 0 sends."""
    mailbox.send(0, Ready(runner.capacity))
    mailbox.beat_to(0)
    reported = time.monotonic()
    while True:
        messages = mailbox.receive()
        for _, message in messages:
            mailbox.watch(0)
            if isinstance(message, End):
                runner.wake()
                return message.status
            _obey(runner, message)
        is_idle, outputs = runner.idle, runner.step()
        is_due = not is_idle and time.monotonic() - reported >= REPORT_SECONDS
        if outputs or messages or is_due:
            mailbox.send(0, Report(outputs, runner.stats()))
            reported = time.monotonic()
        mailbox.wait() if is_idle else mailbox.beat()


def _obey(runner: EngineRunner[Any, Any], message: Any) -> None:
    if isinstance(message, Cancel):
        runner.cancel(message.key)
    elif isinstance(message, AskMemory):
        runner.ask_memory()
    else:
        runner.submit(message)
