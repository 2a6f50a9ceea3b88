"""Groups of ranks as rank 0 sees them, and what their leaders do: lines out, results back."""

from dataclasses import dataclass
from typing import Any

from mpillama.batch.results import Result
from mpillama.batch.rows import Line
from mpillama.batch.worker import SUCCESSORS, Worker
from mpillama.comm.groups import Post
from mpillama.comm.rest import Rest
from mpillama.comm.retirement import End, Failed, give_up
from mpillama.comm.watchdog import Watch


@dataclass(frozen=True)
class Ready:
    """A leader's model is loaded; it computes so many rows together."""

    sequences: int


class LocalGroup:
    """The group that this process leads.

    `watch` is the group's if the group may retire; without it, what goes wrong ends the batch.
    """

    is_local = True

    def __init__(self, worker: Worker, watch: Watch | None = None):
        self.worker = worker
        self.watch = watch
        self.rest = Rest(worker.engine.executor.comm.idle)
        self.failure: str | None = None
        self._lines: dict[int, Line] = {}

    @property
    def room(self) -> int:
        """How many more lines to give."""
        return 0 if self.failure else self.worker.room

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._lines

    def take(self, line: Line) -> None:
        """Begin with a line."""
        self.rest.wake()
        self._lines[line.number] = line
        self.worker.take(line)

    def step(self) -> list[Result]:
        """Run a step; the rows that ended."""
        if self.failure:
            return []
        if self.worker.idle:
            self.rest.rest()
            return []
        results = self._retiring() if self.watch else self.worker.step()
        for result in results:
            del self._lines[result.line]
        return results

    def _retiring(self) -> list[Result]:
        assert self.watch is not None
        try:
            return self.worker.step()
        except Exception as error:  # noqa: BLE001 - whatever it is, the group retires and the user is told
            self.failure = give_up(error, self.watch)
            return []

    def abandoned(self) -> list[Line]:
        """The lines under way when the group failed, once."""
        lines = list(self._lines.values()) if self.failure else []
        if lines:
            self._lines.clear()
        return lines


class RemoteGroup:
    """A group that another process leads, as rank 0 sees it."""

    is_local = False

    def __init__(self, post: Post, ranks: range):
        self.post = post
        self.ranks = ranks
        self.failure: str | None = None
        self._sequences = 0
        self._lines: dict[int, Line] = {}
        self._results: list[Result] = []

    @property
    def room(self) -> int:
        """How many more lines to give: none before its model is loaded."""
        if self.failure or not self._sequences:
            return 0
        return max(0, self._sequences + min(self._sequences, SUCCESSORS) - len(self._lines))

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._lines

    def take(self, line: Line) -> None:
        """Send a line to its leader."""
        self._lines[line.number] = line
        self.post.send(self.ranks.start, line)

    def hear(self, message: Any) -> None:
        """Take a message of one of its ranks."""
        if isinstance(message, Ready):
            self._sequences = message.sequences
            self.post.greet(self.ranks.start)
            self.post.expect(self.ranks.start)
        elif isinstance(message, Failed):
            self.failure = self.failure or message.sentence
            self.post.forget(self.ranks.start)
            for rank in self.ranks:
                self.post.greet(rank)
        elif not self.failure:
            self._results += message

    def step(self) -> list[Result]:
        """The rows that ended since the last call."""
        results, self._results = self._results, []
        for result in results:
            del self._lines[result.line]
        return results

    def abandoned(self) -> list[Line]:
        """The lines under way when the group failed, once."""
        if not self.failure:
            return []
        lines, self._lines = list(self._lines.values()), {}
        return lines


def follow_rank_0(post: Post, worker: Worker) -> int:
    """A leader's loop: lines from rank 0 to the engine, results back; returns the exit status that rank 0 sends."""
    post.send(0, Ready(worker.engine.executor.slots))
    post.greet(0)
    rest = Rest(worker.engine.executor.comm.idle)
    while True:
        for _, message in post.receive():
            rest.wake()
            if isinstance(message, End):
                return message.status
            post.expect(0)
            worker.take(message)
        if worker.idle:
            rest.rest()
            post.wait()
            continue
        results = worker.step()
        if results:
            post.send(0, results)
        post.live()
