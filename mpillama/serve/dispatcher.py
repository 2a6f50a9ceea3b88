"""Rank 0's main thread: tasks of the server's requests to the least loaded group, progress back, until the end.

MPI is called from here only; the server's own thread talks to it through an inbox and a function.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from mpillama.engine.deadline import Deadline, StopRequest
from mpillama.errors import UserError
from mpillama.serve.replicas import LocalReplica, Replica
from mpillama.serve.tasks import AskMemory, Cancel, Progress, Task

Inbox = SimpleQueue[Task | Cancel | AskMemory]
NAP = 0.002
"""Seconds between two looks at the mail of other groups, and at grammars that are built."""
LOOK = 0.05
"""Seconds between two looks at signals, other groups and the clock while nothing is to be done."""


@dataclass
class _Active:
    """A task under way, and how much of its answer was passed on; a repetition passes on what comes after that."""

    task: Task
    replica: Replica
    tokens: int = 0
    characters: int = 0
    skip_tokens: int = 0
    skip_characters: int = 0

    def restart(self, replica: Replica) -> None:
        """Begin anew elsewhere: the same answer comes again."""
        self.replica = replica
        self.skip_tokens = max(self.skip_tokens, self.tokens)
        self.skip_characters = max(self.skip_characters, self.characters)
        self.tokens = self.characters = 0

    def unseen(self, progress: Progress) -> Progress:
        """What of the progress was not passed on before."""
        tokens = max(0, min(self.skip_tokens - self.tokens, len(progress.token_ids)))
        characters = max(0, min(self.skip_characters - self.characters, len(progress.text)))
        self.tokens += len(progress.token_ids)
        self.characters += len(progress.text)
        if not tokens and not characters:
            return progress
        ids, logprobs = progress.token_ids[tokens:], progress.logprobs[tokens:]
        marks = [mark for mark in progress.marks if mark.index >= self.skip_tokens]
        return replace(
            progress, token_ids=ids, logprobs=logprobs, text=progress.text[characters:], marks=marks, prompt_logprobs=()
        )


@dataclass(frozen=True)
class Life:
    """What ends the server: a signal, the end of the job's time, or a failure of its thread; how long answers may take
    to finish then (`grace`, seconds)."""

    stop: StopRequest
    deadline: Deadline
    grace: float

    @property
    def over(self) -> str:
        """Why no more requests are taken; empty while they are."""
        if self.stop.name:
            return self.stop.name
        return "the end of the job's time" if self.deadline.left <= self.grace else ""


class Dispatcher:
    """Runs the engines for the server's thread.

    `deliver` is told of all progress of a round; `on_drain(reason)` is called once, when the end comes near; `on_end`
    when nothing more will be delivered; `collect` brings the mail of other processes.
    """

    def __init__(
        self, replicas: list[Replica], inbox: Inbox, deliver: Callable[[list[Progress]], None],
        on_drain: Callable[[str], None], on_end: Callable[[], None], life: Life,
        collect: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self.replicas = replicas
        self.inbox = inbox
        self.deliver = deliver
        self.on_drain = on_drain
        self.on_end = on_end
        self.life = life
        self.collect = collect
        self.active: dict[int, _Active] = {}
        self._local = [r for r in replicas if isinstance(r, LocalReplica)]
        self._drains_until: float | None = None

    def run(self) -> None:
        """Go on until the server's life is over and its answers are finished, or cut."""
        try:
            while not self._finished():
                self._round()
                if self._local_idle():
                    self._wait()
        finally:
            for replica in self._local:
                replica.rest.wake()
            self.on_end()

    def _round(self) -> None:
        self.collect()
        while not self.inbox.empty():
            self._obey(self.inbox.get())
        progress = [p for replica in self.replicas for p in replica.step()]
        passed = [p for p in map(self._advance, progress) if p is not None]
        if passed:
            self.deliver(passed)
        self._move_from_failed()

    def _local_idle(self) -> bool:
        return all(replica.idle for replica in self._local)

    def _wait(self) -> None:
        """A moment, which a message ends at once; other groups, grammars and signals are looked at after it."""
        nap = NAP if self.active else LOOK
        with suppress(Empty):
            self._obey(self.inbox.get(timeout=nap))

    def _obey(self, message: Task | Cancel | AskMemory) -> None:
        if isinstance(message, Task):
            replica = self._least_loaded()
            self.active[message.number] = _Active(message, replica)
            replica.take(message)
        elif isinstance(message, Cancel):
            if active := self.active.pop(message.number, None):
                active.replica.cancel(message.number)
        else:
            for replica in self.replicas:
                replica.ask_memory()

    def _least_loaded(self) -> Replica:
        """The group with the fewest tasks; UserError if none is left."""
        ready = [replica for replica in self.replicas if replica.ready and not replica.failure]
        if not ready:
            failures = "; ".join(filter(None, (r.failure for r in self.replicas)))
            raise UserError(f"no group of ranks is left: {failures}; start the server again.")
        loads = [sum(a.replica is replica for a in self.active.values()) for replica in ready]
        return ready[loads.index(min(loads))]

    def _advance(self, progress: Progress) -> Progress | None:
        """What is to be passed on of a task's progress; None for a task that nobody wants."""
        active = self.active.get(progress.number)
        if active is None:
            return None
        if progress.finish_reason is not None:
            del self.active[progress.number]
        return active.unseen(progress)

    def _move_from_failed(self) -> None:
        for active in list(self.active.values()):
            if active.replica.failure:
                active.restart(self._least_loaded())
                active.replica.take(active.task)

    def _finished(self) -> bool:
        """Whether to leave; announces the end when it comes near."""
        if self._drains_until is None:
            if not self.life.over:
                return False
            self._drains_until = time.monotonic() + self.life.grace
            self.on_drain(self.life.over)
        idle = not self.active and self.inbox.empty()
        return idle or time.monotonic() >= self._drains_until or self.life.deadline.passed
