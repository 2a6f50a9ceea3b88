"""A group's leader: tasks into its engine, their progress out."""

import numpy as np

from mpillama.engine.engine import Engine, Update
from mpillama.engine.sequence import EngineSequence, Request
from mpillama.errors import UserError
from mpillama.serve.tasks import Figures, Progress, Task, TokenLogprob
from mpillama.text.constraint import Grammars


class EngineDesk:
    """Runs tasks on an engine, which is used by nobody else."""

    def __init__(self, engine: Engine, grammars: Grammars):
        self.engine = engine
        self.grammars = grammars
        self._sequences: dict[int, EngineSequence] = {}
        self._recorders: dict[int, LogprobRecorder] = {}
        self._refused: list[Progress] = []
        self._memory: list[int] = []

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return self.engine.idle and not self._refused

    def take(self, task: Task) -> None:
        """Begin with a task; what cannot run becomes its progress."""
        try:
            self._sequences[task.number] = self.engine.submit(self._request(task))
        except UserError as error:
            self._recorders.pop(task.number, None)
            self._refused.append(Progress(task.number, finish_reason="error", error=str(error)))

    def _request(self, task: Task) -> Request:
        recorder = None
        if task.logprobs is not None:
            recorder = self._recorders[task.number] = LogprobRecorder(task.logprobs)
        constraint = None if task.grammar is None else self.grammars.constraint(task.grammar)
        return Request(
            task.prompt_ids, task.sampling, task.limits, task.number, recorder, task.reuse_prefix, constraint,
            task.pooling, task.keep_special, task.marking,
        )  # fmt: skip

    def cancel(self, number: int) -> None:
        """Forget a task; nothing happens if it is over."""
        self._recorders.pop(number, None)
        if sequence := self._sequences.pop(number, None):
            self.engine.cancel(sequence)

    def step(self) -> list[Progress]:
        """Run a step; what came of it."""
        refused, self._refused = self._refused, []
        return refused + [self._progress(update) for update in self.engine.step()]

    def _progress(self, update: Update) -> Progress:
        sequence, number = update.sequence, update.sequence.request.key
        recorder = self._recorders.get(number)
        if sequence.finished:
            del self._sequences[number]
            self._recorders.pop(number, None)
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


class LogprobRecorder:
    """Notes each sampled token's log-probability by the model (before temperature, bias and penalties)."""

    def __init__(self, alternatives: int):
        self.alternatives = alternatives
        self._noted: list[TokenLogprob] = []

    def __call__(self, logits: np.ndarray, token: int) -> None:
        """A token was chosen from float32 [vocab_size] logits."""
        scores = logits.astype(np.float64)
        scores -= scores.max()
        scores -= np.log(np.exp(scores).sum())
        count = min(self.alternatives, len(scores))
        best = np.argpartition(-scores, count - 1)[:count] if count else np.empty(0, np.int64)
        best = best[np.lexsort((best, -scores[best]))]
        self._noted.append(TokenLogprob(token, float(scores[token]), [(int(i), float(scores[i])) for i in best]))

    def take(self) -> list[TokenLogprob]:
        """What was noted since the last call."""
        noted, self._noted = self._noted, []
        return noted
