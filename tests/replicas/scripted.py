"""Replicas without an engine: one output a step, and a failure when it is wanted."""

from collections.abc import Callable
from typing import Any

from mpillama.replicas.replica import Cancel, Replica


class ScriptedReplica(Replica[Any, Any]):
    """Finishes a request in each step with `answer(request)`; fails as its `fails`-th request comes."""

    def __init__(self, answer: Callable[[Any], Any], capacity: int = 3, fails: int | None = None, first_rank: int = 0):
        super().__init__(range(first_rank, first_rank + 1), capacity)
        self.answer, self.fails = answer, fails
        self.queue: list[Any] = []
        self.taken: list[int] = []
        self.cancelled: list[int] = []

    @property
    def idle(self) -> bool:
        return self.failure is not None or not self.queue

    def send(self, message: Any) -> None:
        if isinstance(message, Cancel):
            self.cancelled.append(message.key)
            return
        self.queue.append(message)
        self.taken.append(message.key)
        if self.fails is not None and len(self.taken) >= self.fails:
            self.failure = "out of memory"

    def step(self) -> list[Any]:
        return [] if self.idle else [self.answer(self.queue.pop(0))]
