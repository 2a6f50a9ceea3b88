"""Runs the requests of a chat, a completion or embeddings to their end; the responses, whole or streamed."""

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np

from mpillama import __version__
from mpillama.server.async_engine import AnswerFailed, AnswerRefused, Answers, AsyncEngine, ServerState
from mpillama.server.choices import Choice
from mpillama.server.engine_requests import Output, ServerRequest
from mpillama.server.metrics import Metrics, TokenWatch
from mpillama.server.streams import DONE, event

Json = dict[str, Any]


class Reply:
    """A request's answers and what they are called; `kind` is the object's name, with ".chunk" in streams of chats."""

    def __init__(self, state: ServerState, kind: str, chunk_kind: str, prefix: str, requests: Sequence[ServerRequest]):
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.state = state
        self.kind = kind
        self.chunk_kind = chunk_kind
        self.requests = requests
        self.completion_tokens = 0
        self.cached_tokens: dict[int, int] = {}

    def note(self, index: int, output: Output) -> None:
        """Count, or raise AnswerFailed."""
        if output.error is not None:
            raise (AnswerRefused if output.refused else AnswerFailed)(output.error)
        self.completion_tokens += len(output.token_ids)
        self.cached_tokens[index] = output.cached_tokens

    def usage(self, choices: Sequence[Choice]) -> Json:
        """Tokens; the choices of one prompt share it."""
        prompts = {id(r.prompt_ids): (len(r.prompt_ids), i) for i, r in reversed(list(enumerate(self.requests)))}
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
            "model": self.state.model,
            "system_fingerprint": f"mpillama-{__version__}",
            "choices": choices,
            **more,
        }


async def _push(choice: Choice, output: Output) -> list[Json]:
    """Let a choice take an output; other requests go on while a long prompt is written down."""
    return await asyncio.to_thread(choice.push, output) if choice.writes_prompt else choice.push(output)


class Answerer:
    """Runs the engine's requests of one HTTP request to their end; answers longer than `seconds` are cut."""

    def __init__(self, engine: AsyncEngine, metrics: Metrics, seconds: float):
        self.engine = engine
        self.metrics = metrics
        self.seconds = seconds

    async def whole(self, reply: Reply, make: Callable[[int, ServerRequest], Choice]) -> Json:
        """The response when all answers are finished."""
        choices = [make(i, request) for i, request in enumerate(reply.requests)]
        async with self.engine.generate(reply.requests) as answers:
            async for index, output in self.timed(answers):
                reply.note(index, output)
                await _push(choices[index], output)
        more = {name: value for choice in choices for name, value in choice.beside().items()}
        return reply.object(reply.kind, [choice.whole() for choice in choices], usage=reply.usage(choices), **more)

    async def pieces(
        self, reply: Reply, make: Callable[[int, ServerRequest], Choice], include_usage: bool
    ) -> AsyncGenerator[bytes]:
        """The events of a stream."""
        choices = [make(i, request) for i, request in enumerate(reply.requests)]
        more: Json = {"usage": None} if include_usage else {}
        begun: set[int] = set()
        async with self.engine.generate(reply.requests) as answers:
            async for index, output in self.timed(answers):
                reply.note(index, output)
                entries = await _push(choices[index], output)
                first = choices[index].begin() if index not in begun else None
                begun.add(index)
                for entry in [first, *entries] if first else entries:
                    yield event(reply.object(reply.chunk_kind, [entry], **more))
        if include_usage:
            yield event(reply.object(reply.chunk_kind, [], usage=reply.usage(choices)))
        yield DONE

    async def embeddings(self, reply: Reply) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        async with self.engine.generate(reply.requests) as answers:
            async for index, output in self.timed(answers):
                reply.note(index, output)
                if output.embedding is None:
                    raise AnswerFailed("the embedding took too long")
                found[index] = output.embedding
        return [found[index] for index in range(len(reply.requests))]

    async def timed(self, answers: Answers) -> AsyncGenerator[tuple[int, Output]]:
        """Outputs, measured, and cut where they take too long."""
        watch = TokenWatch(self.metrics)
        async for index, output in answers.outputs(self.seconds):
            watch.note(index, output)
            yield index, output


def shortened(embedding: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first numbers of an embedding, of length 1 again."""
    if dimensions is None:
        return embedding
    part = embedding[:dimensions]
    length = float(np.linalg.norm(part))
    return part / length if length else part


def embedding_entry(index: int, embedding: np.ndarray, base64_wanted: bool) -> Json:
    """An embedding, as numbers or as base64 of float32."""
    vector = embedding.astype("<f4")
    encoded = base64.b64encode(vector.tobytes()).decode() if base64_wanted else vector.tolist()
    return {"object": "embedding", "index": index, "embedding": encoded}
