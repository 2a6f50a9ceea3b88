"""Rank 0's part of a batch: lines to the router as it has room, results to the journal, until all is done."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mpillama.batch.journal import Journal
from mpillama.batch.results import Result, error_result
from mpillama.batch.rows import Line, row_id
from mpillama.errors import UserError
from mpillama.job.deadline import Deadline, StopRequest
from mpillama.openai.body import BadRequest
from mpillama.replicas.router import Router

REQUEUE_STATUS = 85
"""The exit status of a run that stopped before its end and wants to be started again."""
PARTIAL_STATUS = 3
"""The exit status when a replica failed and others answered its rows."""
IDLE_SECONDS = 0.002


@dataclass
class Counts:
    rows: int = 0
    errors: int = 0
    skipped: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    read_bytes: int = 0
    began: float = field(default_factory=time.monotonic)


class BatchRun:
    """Runs a batch; `on_progress` is told of the counts after every step."""

    def __init__(
        self, router: Router[Line, Result], lines: Iterator[Line], journal: Journal, deadline: Deadline,
        stop: StopRequest, on_progress: Callable[[Counts], None],
    ):  # fmt: skip
        self.router = router
        self.journal = journal
        self.deadline = deadline
        self.stop = stop
        self.on_progress = on_progress
        self.counts = Counts()
        self._lines = self._unfinished(lines)
        self._seen: dict[bytes, int] = {}
        self._exhausted = False

    def run(self) -> int:
        """Go on until all rows have a result or the run must stop; returns the exit status."""
        while not self._must_stop():
            self._submit_lines()
            results = self.router.step()
            for result in results:
                self._finish(result)
            self.journal.flush()
            self.on_progress(self.counts)
            if self._exhausted and not self.router.active:
                break
            if not results and self.router.idle:
                time.sleep(IDLE_SECONDS)
        else:
            self.journal.flush(now=True)
            return REQUEUE_STATUS
        self.journal.flush(now=True)
        return PARTIAL_STATUS if self.router.failures else 0

    def _must_stop(self) -> bool:
        """Whether a signal came, or the time is over or too short for another row."""
        starved = not self.deadline.admits and not self.router.active
        return bool(self.stop.name) or self.deadline.passed or starved

    def _submit_lines(self) -> None:
        while self.deadline.admits and self.router.room > 0:
            line = next(self._lines, None)
            if line is None:
                self._exhausted = True
                return
            self.router.submit(line)

    def _finish(self, result: Result) -> None:
        self.journal.append(result.line, result.id, result.text, result.is_error)
        self.counts.rows += 1
        self.counts.errors += result.is_error
        self.counts.prompt_tokens += result.prompt_tokens
        self.counts.answer_tokens += result.answer_tokens
        self.deadline.note(result.seconds)

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
                error = BadRequest(f"the id was used by line {first}", "custom_id")
                self._finish(error_result(line, error, self.journal.provenance))

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
