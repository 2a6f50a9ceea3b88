"""Rank 0's part of a batch: lines to the groups that have room, their results to the journal, until all is done."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from mpillama.api.body import BadRequest
from mpillama.batch.journal import Journal
from mpillama.batch.results import Result, error_line
from mpillama.batch.rows import Line, row_id
from mpillama.engine.deadline import Deadline, StopRequest
from mpillama.errors import UserError

REQUEUE_STATUS = 85
"""The exit status of a run that stopped before its end and wants to be started again."""
PARTIAL_STATUS = 3
"""The exit status when a group of ranks failed and the others did its rows."""
IDLE_SECONDS = 0.002


class Group(Protocol):
    """Ranks that hold a whole model; `is_local` if this process leads them."""

    is_local: bool

    @property
    def room(self) -> int:
        """How many more lines to give; 0 once it has failed."""

    @property
    def failure(self) -> str | None:
        """Why the group takes no more rows; None while it works."""

    @property
    def idle(self) -> bool:
        """Whether it has nothing under way."""

    def take(self, line: Line) -> None:
        """Begin with a line."""

    def step(self) -> list[Result]:
        """Go on if that is for this process to do; the rows that ended."""

    def abandoned(self) -> list[Line]:
        """The lines that a failed group did not finish, once."""


@dataclass
class Counts:
    """What a run did."""

    rows: int = 0
    errors: int = 0
    skipped: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    read_bytes: int = 0
    began: float = field(default_factory=time.monotonic)


class Supervisor:
    """Runs a batch; `on_progress` is told after every step, `collect` brings the mail of other processes before it."""

    def __init__(
        self, groups: list[Group], lines: Iterator[Line], journal: Journal, deadline: Deadline, stop: StopRequest,
        on_progress: Callable[[Counts], None], collect: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self.groups = groups
        self.journal = journal
        self.deadline = deadline
        self.stop = stop
        self.on_progress = on_progress
        self._collect = collect
        self.counts = Counts()
        self._lines = self._unfinished(lines)
        self._again: list[Line] = []
        self._begun: dict[int, float] = {}
        self._seen: dict[bytes, int] = {}
        self._exhausted = False

    def run(self) -> int:
        """Go on until all rows have a result or the run must stop; returns the exit status."""
        while not self._must_stop():
            self._collect()
            self._hand_out()
            results = [result for group in self.groups for result in group.step()]
            for result in results:
                self._finish(result)
            self.journal.flush()
            self.on_progress(self.counts)
            self._take_back()
            if self._exhausted and not self._again and all(group.idle for group in self.groups):
                break
            if not results and all(group.idle for group in self.groups if group.is_local):
                time.sleep(IDLE_SECONDS)
        else:
            self.journal.flush(now=True)
            return REQUEUE_STATUS
        self.journal.flush(now=True)
        return PARTIAL_STATUS if any(group.failure for group in self.groups) else 0

    def _must_stop(self) -> bool:
        """Whether a signal came, or the time is over or too short for another row."""
        starved = not self.deadline.admits and all(group.idle for group in self.groups)
        return bool(self.stop.name) or self.deadline.passed or starved

    def _hand_out(self) -> None:
        """Give lines to the groups, the one with the most room first."""
        while self.deadline.admits and (group := max(self.groups, key=lambda g: g.room)).room:
            line = self._again.pop() if self._again else next(self._lines, None)
            if line is None:
                self._exhausted = True
                return
            self._begun[line.number] = time.monotonic()
            group.take(line)

    def _finish(self, result: Result) -> None:
        self.journal.append(result.line, result.id, result.text, result.is_error)
        self.counts.rows += 1
        self.counts.errors += result.is_error
        self.counts.prompt_tokens += result.prompt_tokens
        self.counts.answer_tokens += result.answer_tokens
        self.deadline.note(time.monotonic() - self._begun.pop(result.line))

    def _take_back(self) -> None:
        """Take the lines of groups that failed; UserError if none is left to do them."""
        self._again += [line for group in self.groups for line in group.abandoned()]
        failures = [group.failure for group in self.groups]
        if all(failures):
            raise UserError(f"no group of ranks is left: {failures[0]}; what was finished stays, start again.")

    def _unfinished(self, lines: Iterator[Line]) -> Iterator[Line]:
        """The input's lines without a result; a second row of the same id gets an error for its result."""
        for line in lines:
            self.counts.read_bytes = line.end
            name = row_id(line)
            first = self._first_with(name, line.number)
            if line.number in self.journal.finished:
                self._check_same(line, name)
                self.counts.skipped += 1
            elif first == line.number:
                yield line
            else:
                self._refuse_duplicate(line, name, first)

    def _first_with(self, name: str | None, number: int) -> int:
        """The number of the first line that has this id."""
        if name is None:
            return number
        digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=16).digest()
        return self._seen.setdefault(digest, number)

    def _check_same(self, line: Line, name: str | None) -> None:
        if self.journal.finished[line.number] != name:
            found = self.journal.finished[line.number]
            raise UserError(
                f"{self.journal.path}: has a result for line {line.number} with the id {found!r}, but the input has "
                f"{name!r} there: continue with the same input, or name another output file."
            )

    def _refuse_duplicate(self, line: Line, name: str | None, first: int) -> None:
        error = BadRequest(f"the id was used by line {first}", "custom_id")
        text = error_line(line, name, error, self.journal.provenance)
        self._begun[line.number] = time.monotonic()
        self._finish(Result(line.number, name, text, True))
