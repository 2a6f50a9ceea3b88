"""A group's leader: tasks into its engine, their progress out."""

from concurrent.futures import Future, ThreadPoolExecutor

from mpillama.engine.engine import Engine, Update
from mpillama.engine.logprobs import LogprobRecorder
from mpillama.engine.sequence import EngineSequence, Request
from mpillama.errors import UserError
from mpillama.serve.tasks import Figures, Progress, Task
from mpillama.text.constraint import Constraint, Grammars

BUILDERS = 2
"""Threads that build grammars: that may take seconds, for which the engine goes on with other tasks."""


class EngineDesk:
    """Runs tasks on an engine, which is used by nobody else."""

    def __init__(self, engine: Engine, grammars: Grammars):
        self.engine = engine
        self.grammars = grammars
        self._sequences: dict[int, EngineSequence] = {}
        self._recorders: dict[int, LogprobRecorder] = {}
        self._prompt_recorders: dict[int, LogprobRecorder] = {}
        self._builders = ThreadPoolExecutor(BUILDERS, "grammars")
        self._building: dict[int, tuple[Task, Future[Constraint]]] = {}
        self._refused: list[Progress] = []
        self._memory: list[int] = []

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing; grammars may be under way."""
        return self.engine.idle and not self._refused and not self._built()

    def take(self, task: Task) -> None:
        """Begin with a task, once its grammar is built; what cannot run becomes its progress."""
        if task.grammar is None:
            self._submit(task, None)
        else:
            self._building[task.number] = task, self._builders.submit(self.grammars.constraint, task.grammar)

    def _built(self) -> list[int]:
        return [number for number, (_, future) in self._building.items() if future.done()]

    def _submit_built(self) -> None:
        for number in self._built():
            task, future = self._building.pop(number)
            try:
                self._submit(task, future.result())
            except UserError as error:
                self._refuse(number, error)

    def _submit(self, task: Task, constraint: Constraint | None) -> None:
        try:
            self._sequences[task.number] = self.engine.submit(self._request(task, constraint))
        except UserError as error:
            self._forget(task.number)
            self._refuse(task.number, error)

    def _refuse(self, number: int, error: UserError) -> None:
        self._refused.append(Progress(number, finish_reason="error", error=str(error), refused=True))

    def _forget(self, number: int) -> None:
        self._recorders.pop(number, None)
        self._prompt_recorders.pop(number, None)

    def _request(self, task: Task, constraint: Constraint | None) -> Request:
        recorder = prompt_recorder = None
        if task.logprobs is not None:
            recorder = self._recorders[task.number] = LogprobRecorder(task.logprobs)
        if task.prompt_logprobs is not None:
            prompt_recorder = self._prompt_recorders[task.number] = LogprobRecorder(task.prompt_logprobs)
        return Request(
            task.prompt_ids, task.sampling, task.number, recorder, task.reuse_prefix, constraint,
            task.pooling, task.keep_special, task.marking, on_prompt_logits=prompt_recorder,
            continues=task.continues,
            cache_salt=task.cache_salt,
        )  # fmt: skip

    def cancel(self, number: int) -> None:
        """Forget a task; nothing happens if it is over."""
        self._forget(number)
        if building := self._building.pop(number, None):
            building[1].cancel()
        if sequence := self._sequences.pop(number, None):
            self.engine.cancel(sequence)

    def step(self) -> list[Progress]:
        """Run a step; what came of it."""
        self._submit_built()
        refused, self._refused = self._refused, []
        return refused + [self._progress(update) for update in self.engine.step()]

    def _progress(self, update: Update) -> Progress:
        sequence, number = update.sequence, update.sequence.request.key
        constraint = sequence.request.constraint
        recorder, prompt_recorder = self._recorders.get(number), self._prompt_recorders.pop(number, None)
        if sequence.finished:
            del self._sequences[number]
            self._forget(number)
        return Progress(
            number,
            update.token_ids,
            update.text,
            recorder.take() if recorder else (),
            sequence.answer.finish_reason,
            sequence.cached_tokens or 0,
            sequence.error,
            sequence.pooled if sequence.finished else None,
            update.marks,
            prompt_recorder.take() if prompt_recorder else (),
            refused=constraint is not None and constraint.refused,
        )

    def ask_memory(self) -> None:
        """Let all ranks of the group tell what memory they have; between two steps."""
        self._memory = self.engine.executor.memory_per_rank()

    def figures(self) -> Figures:
        """The engine's state."""
        engine, counts = self.engine, self.engine.counts
        return Figures(
            len(engine.scheduler.running), len(engine.scheduler.waiting), engine.pool.blocks, engine.pool.used,
            counts.prompt_tokens, counts.cached_tokens, counts.sampled_tokens, counts.steps,
            engine.scheduler.preemptions, counts.step_seconds, counts.model_seconds, engine.executor.comm.seconds,
            self._memory,
        )  # fmt: skip
