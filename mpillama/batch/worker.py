"""Rows through an engine: what comes in as a line of the input leaves as a line of the output."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpillama.api.body import BadRequest
from mpillama.api.prompts import Prompter, derived_seed
from mpillama.batch.results import Provenance, Result, answer_line, error_line
from mpillama.batch.rows import Line, Row, parse_row, row_id
from mpillama.engine.sequence import EngineSequence
from mpillama.errors import UserError

if TYPE_CHECKING:
    from mpillama.engine.engine import Engine

SUCCESSORS = 8
"""Rows that wait beside a full engine."""


@dataclass(frozen=True)
class _Job:
    line: Line
    row: Row


class Worker:
    """An engine that answers lines; `room` says how many more it wants so that it never runs dry."""

    def __init__(self, engine: "Engine", prompter: Prompter, model: str, seed: int, provenance: Provenance):
        self.engine = engine
        self.prompter = prompter
        self.model = model
        self.seed = seed
        self.provenance = provenance
        self._refused: list[Result] = []

    @property
    def room(self) -> int:
        """How many more lines to give: a few successors, not so many that another group could do them sooner."""
        slots = self.engine.executor.slots
        return max(0, slots + min(slots, SUCCESSORS) - self.engine.load - len(self._refused))

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return self.engine.idle and not self._refused

    def take(self, line: Line) -> None:
        """Begin with a line; what is wrong with it becomes its result."""
        try:
            row = parse_row(line)
            request = self.prompter.request(row.body, _Job(line, row), derived_seed(self.seed, row.id))
            self.engine.submit(request)
        except (BadRequest, UserError) as error:
            problem = error if isinstance(error, BadRequest) else BadRequest(str(error))
            name = row_id(line)
            self._refused.append(Result(line.number, name, error_line(line, name, problem, self.provenance), True))

    def step(self) -> list[Result]:
        """Run a step; returns the rows that ended."""
        refused, self._refused = self._refused, []
        return [*refused, *self._ended()]

    def _ended(self) -> Iterator[Result]:
        for update in self.engine.step():
            if update.sequence.finished:
                yield self._result(update.sequence)

    def _result(self, sequence: EngineSequence) -> Result:
        line, row = sequence.request.key.line, sequence.request.key.row
        if sequence.error is not None:
            text = error_line(line, row.id, BadRequest(sequence.error), self.provenance, 500)
            return Result(line.number, row.id, text, True)
        text = answer_line(line, row, sequence, self.model, self.provenance)
        prompt, answer = len(sequence.request.prompt_ids), len(sequence.answer.token_ids)
        return Result(line.number, row.id, text, False, prompt, answer)
