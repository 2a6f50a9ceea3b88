"""Answers of /v1/chat/completions and /v1/completions, whole or in pieces, in the form of OpenAI's API."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol

import numpy as np

from mpillama import __version__
from mpillama.serve.front import AnswerFailed, AnswerRefused, Answers, Front, Service
from mpillama.serve.metrics import Metrics
from mpillama.serve.streams import DONE, event
from mpillama.serve.tasks import Progress, Task

Json = dict[str, Any]


class Choice(Protocol):
    """One of a request's answers, as it grows."""

    def begin(self) -> Json | None:
        """What a stream says of it first, if anything."""

    def push(self, progress: Progress) -> list[Json]:
        """Take progress; returns the `choices` entries of a stream that tell of it."""

    def whole(self) -> Json:
        """The entry of a response that is not streamed."""

    def beside(self) -> Json:
        """What such a response says of it beside the entries."""

    @property
    def writes_prompt(self) -> bool:
        """Whether the next push takes long, since the prompt may be."""

    @property
    def reasoning_tokens(self) -> int | None:
        """Tokens of its thoughts so far; None if it cannot have any."""


class Reply:
    """A request's answers and what they are called; `kind` is the object's name, with ".chunk" in streams of chats."""

    def __init__(self, service: Service, kind: str, chunk_kind: str, prefix: str, tasks: Sequence[Task]):
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.service = service
        self.kind = kind
        self.chunk_kind = chunk_kind
        self.tasks = tasks
        self.completion_tokens = 0
        self.cached_tokens: dict[int, int] = {}

    def note(self, index: int, progress: Progress) -> None:
        """Count, or raise AnswerFailed."""
        if progress.error is not None:
            raise (AnswerRefused if progress.refused else AnswerFailed)(progress.error)
        self.completion_tokens += len(progress.token_ids)
        self.cached_tokens[index] = progress.cached_tokens

    def usage(self, choices: Sequence[Choice]) -> Json:
        """Tokens; the choices of one prompt share it."""
        prompts = {id(task.prompt_ids): (len(task.prompt_ids), i) for i, task in reversed(list(enumerate(self.tasks)))}
        prompt = sum(length for length, _ in prompts.values())
        cached = sum(self.cached_tokens.get(first, 0) for _, first in prompts.values())
        thought = [choice.reasoning_tokens for choice in choices if choice.reasoning_tokens is not None]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
            **({"completion_tokens_details": {"reasoning_tokens": sum(thought)}} if thought else {}),
        }

    def object(self, kind: str, choices: list[Json], **more: Any) -> Json:
        """A response or a chunk of one."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.service.model,
            "system_fingerprint": f"mpillama-{__version__}",
            "choices": choices,
            **more,
        }


async def _push(choice: Choice, progress: Progress) -> list[Json]:
    """Let a choice take progress; other requests go on while a long prompt is written down."""
    return await asyncio.to_thread(choice.push, progress) if choice.writes_prompt else choice.push(progress)


class Answerer:
    """Runs a request's tasks to their end; answers longer than `seconds` are cut."""

    def __init__(self, front: Front, metrics: Metrics, seconds: float):
        self.front = front
        self.metrics = metrics
        self.seconds = seconds

    async def whole(self, reply: Reply, make: Callable[[int, Task], Choice]) -> Json:
        """The response when all answers are finished."""
        choices = [make(i, task) for i, task in enumerate(reply.tasks)]
        async with self.front.answers(reply.tasks) as answers:
            async for index, progress in self.timed(answers):
                reply.note(index, progress)
                await _push(choices[index], progress)
        more = {name: value for choice in choices for name, value in choice.beside().items()}
        return reply.object(reply.kind, [choice.whole() for choice in choices], usage=reply.usage(choices), **more)

    async def pieces(
        self, reply: Reply, make: Callable[[int, Task], Choice], include_usage: bool
    ) -> AsyncGenerator[bytes]:
        """The events of a stream."""
        choices = [make(i, task) for i, task in enumerate(reply.tasks)]
        more: Json = {"usage": None} if include_usage else {}
        begun: set[int] = set()
        async with self.front.answers(reply.tasks) as answers:
            async for index, progress in self.timed(answers):
                reply.note(index, progress)
                entries = await _push(choices[index], progress)
                first = choices[index].begin() if index not in begun else None
                begun.add(index)
                for entry in [first, *entries] if first else entries:
                    yield event(reply.object(reply.chunk_kind, [entry], **more))
        if include_usage:
            yield event(reply.object(reply.chunk_kind, [], usage=reply.usage(choices)))
        yield DONE

    async def embeddings(self, reply: Reply) -> list[np.ndarray]:
        """The embedding of each task's text."""
        found: dict[int, np.ndarray] = {}
        async with self.front.answers(reply.tasks) as answers:
            async for index, progress in self.timed(answers):
                reply.note(index, progress)
                if progress.embedding is None:
                    raise AnswerFailed("the embedding took too long")
                found[index] = progress.embedding
        return [found[index] for index in range(len(reply.tasks))]

    async def timed(self, answers: Answers) -> AsyncGenerator[tuple[int, Progress]]:
        """Progress, measured, and cut where it takes too long."""
        watch = self.metrics.watch()
        async for index, progress in answers.progress(self.seconds):
            watch.note(index, progress)
            yield index, progress
