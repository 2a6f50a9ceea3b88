"""Groups of ranks that each hold the model, as rank 0's dispatcher sees them, and the loop of their leaders."""

from dataclasses import dataclass
from typing import Any, Protocol

from mpillama.comm.groups import Post
from mpillama.comm.rest import Rest
from mpillama.comm.retirement import End, Failed, give_up
from mpillama.comm.watchdog import Watch
from mpillama.serve.desk import EngineDesk
from mpillama.serve.tasks import AskMemory, Cancel, Figures, Progress, Task


@dataclass(frozen=True)
class Ready:
    """A leader's model is loaded."""


@dataclass(frozen=True)
class Report:
    """What a leader tells after a step."""

    progress: list[Progress]
    figures: Figures


class Replica(Protocol):
    """Ranks that hold a whole model; `is_local` if this process leads them."""

    is_local: bool
    ranks: range
    figures: Figures

    @property
    def failure(self) -> str | None:
        """Why the group takes no more tasks; None while it works."""

    @property
    def ready(self) -> bool:
        """Whether it takes tasks."""

    def take(self, task: Task) -> None:
        """Begin with a task."""

    def cancel(self, number: int) -> None:
        """Forget a task."""

    def ask_memory(self) -> None:
        """Bring the memory in `figures` up to date, now or soon."""

    def step(self) -> list[Progress]:
        """Go on if that is for this process to do; what came of it."""


class LocalReplica:
    """The group that this process leads; it may retire if `watch` is given, else what goes wrong ends the server."""

    is_local = True
    ready = True

    def __init__(self, desk: EngineDesk, ranks: range, watch: Watch | None = None):
        self.desk = desk
        self.ranks = ranks
        self.watch = watch
        self.rest = Rest(desk.engine.executor.comm.idle)
        self.failure: str | None = None
        self.figures = desk.figures()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return self.failure is not None or self.desk.idle

    def take(self, task: Task) -> None:
        """Begin with a task."""
        self.rest.wake()
        self.desk.take(task)

    def cancel(self, number: int) -> None:
        """Forget a task."""
        if not self.failure:
            self.desk.cancel(number)
            self.figures = self.desk.figures()

    def ask_memory(self) -> None:
        """Bring the memory in `figures` up to date."""
        if not self.failure:
            self.rest.wake()
            self.desk.ask_memory()
            self.figures = self.desk.figures()

    def step(self) -> list[Progress]:
        """Run a step; what came of it."""
        if self.failure:
            return []
        if self.desk.idle:
            self.rest.rest()
            return []
        self.rest.wake()
        progress = self._retiring(self.watch) if self.watch else self.desk.step()
        self.figures = self.desk.figures()
        return progress

    def _retiring(self, watch: Watch) -> list[Progress]:
        try:
            return self.desk.step()
        except Exception as error:  # noqa: BLE001 - whatever it is, the group retires and the user is told
            self.failure = give_up(error, watch)
            return []


class RemoteReplica:
    """A group that another process leads, as rank 0 sees it."""

    is_local = False

    def __init__(self, post: Post, ranks: range):
        self.post = post
        self.ranks = ranks
        self.failure: str | None = None
        self.ready = False
        self.figures = Figures()
        self._progress: list[Progress] = []

    def take(self, task: Task) -> None:
        """Send a task to the leader."""
        self.post.send(self.ranks.start, task)

    def cancel(self, number: int) -> None:
        """Tell the leader to forget a task."""
        if not self.failure:
            self.post.send(self.ranks.start, Cancel(number))

    def ask_memory(self) -> None:
        """Ask the leader; the answer comes with a later report."""
        if self.ready:
            self.post.send(self.ranks.start, AskMemory())

    def hear(self, message: Any) -> None:
        """Take a message of one of the group's ranks."""
        if isinstance(message, Ready):
            self.ready = not self.failure
            self.post.greet(self.ranks.start)
            self.post.expect(self.ranks.start)
        elif isinstance(message, Failed):
            self._retire(message.sentence)
        elif isinstance(message, Report) and not self.failure:
            self._progress += message.progress
            self.figures = message.figures

    def _retire(self, sentence: str) -> None:
        self.failure, self.ready = self.failure or sentence, False
        self.post.forget(self.ranks.start)
        for rank in self.ranks:
            self.post.greet(rank)

    def step(self) -> list[Progress]:
        """What came of its steps since the last call."""
        progress, self._progress = self._progress, []
        return progress


def follow_rank_0(post: Post, desk: EngineDesk) -> int:
    """A leader's loop: tasks from rank 0 to the engine, progress back; returns the exit status that rank 0 sends."""
    post.send(0, Ready())
    post.greet(0)
    rest = Rest(desk.engine.executor.comm.idle)
    while True:
        for _, message in post.receive():
            post.expect(0)
            rest.wake()
            if isinstance(message, End):
                return message.status
            _obey(post, desk, message)
        if desk.idle:
            rest.rest()
            post.wait()
            continue
        rest.wake()
        post.send(0, Report(desk.step(), desk.figures()))
        post.live()


def _obey(post: Post, desk: EngineDesk, message: Any) -> None:
    if isinstance(message, Task):
        desk.take(message)
    elif isinstance(message, Cancel):
        desk.cancel(message.number)
        post.send(0, Report([], desk.figures()))
    elif isinstance(message, AskMemory):
        desk.ask_memory()
        post.send(0, Report([], desk.figures()))
