"""What goes from the server's requests to the engines and back: plain values that may travel to another rank."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from mpillama.engine.answer import Mark, TokenLogprob, noted, recorder
from mpillama.engine.engine import Update
from mpillama.engine.sequence import Request
from mpillama.errors import UserError
from mpillama.openai.body import BadRequest
from mpillama.replicas.router import Router
from mpillama.replicas.runner import Adapter
from mpillama.text.constraint import Constraint, Grammars

BUILDERS = 2
"""Threads that build grammars: that may take seconds, for which the engine goes on with other requests."""
NO_KEY = -1
"""The key of a request that was not submitted."""


@dataclass(frozen=True)
class ServerRequest(Request):
    """One answer, or one embedding, to compute; AsyncEngine gives it a key, which is never used twice.

    Its sampling has a seed, so that it has the same answer on any replica. `grammar` and `sampling.logprobs` travel;
    the leader of the replica makes the constraint and the recorders of them.
    """

    key: int = NO_KEY
    grammar: str | None = None


@dataclass(frozen=True)
class Output:
    """How a request went on in a step; with a `finish_reason` ("error" with `error`) it is over.

    The tokens and the text begin at `first_token` and `first_character` of the answer. The first output has the
    `prompt_logprobs` of all the prompt's tokens but the first, if they are wanted.
    """

    key: int
    token_ids: Sequence[int] = ()
    text: str = ""
    logprobs: Sequence[TokenLogprob] = ()
    finish_reason: str | None = None
    cached_tokens: int = 0
    error: str | None = None
    embedding: np.ndarray | None = None
    marks: Sequence[Mark] = ()
    prompt_logprobs: Sequence[TokenLogprob] = ()
    refused: bool = False
    """Whether an error is the request's own fault: it would come again."""
    first_token: int = 0
    first_character: int = 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def after(self, tokens: int, characters: int) -> "Output":
        """What comes after the first `tokens` and `characters` of the answer, which another replica has delivered."""
        skipped, skipped_text = max(0, tokens - self.first_token), max(0, characters - self.first_character)
        if not skipped and not skipped_text:
            return self
        return replace(
            self, token_ids=self.token_ids[skipped:], logprobs=self.logprobs[skipped:], text=self.text[skipped_text:],
            marks=[mark for mark in self.marks if mark.index >= tokens], prompt_logprobs=(),
        )  # fmt: skip


EngineRouter = Router[ServerRequest, Output]


class ServerAdapter(Adapter[ServerRequest, Output]):
    """The server's requests as an engine runs them, and what came of them."""

    def __init__(self, grammars: Grammars):
        self.grammars = grammars
        self._builders = ThreadPoolExecutor(BUILDERS, "grammars")

    def prepare(self, request: ServerRequest) -> Request | Future[Request]:
        if request.grammar is None:
            return _engine_request(request)
        return self._builders.submit(self._constrained, request, request.grammar)

    def _constrained(self, request: ServerRequest, grammar: str) -> Request:
        return _engine_request(request, self.grammars.constraint(grammar))

    def refuse(self, request: ServerRequest, error: UserError | BadRequest) -> Output:
        return Output(request.key, finish_reason="error", error=str(error), refused=True)

    def output(self, update: Update) -> Output:
        sequence, request, answer = update.sequence, update.sequence.request, update.sequence.answer
        return Output(
            request.key,
            update.token_ids,
            update.text,
            noted(request.on_logits) or (),
            answer.finish_reason,
            sequence.cached_tokens or 0,
            sequence.error,
            sequence.pooled if sequence.finished else None,
            update.marks,
            noted(request.on_prompt_logits) or (),
            refused=request.constraint is not None and request.constraint.refused,
            first_token=len(answer.token_ids) - len(update.token_ids),
            first_character=len(answer.text) - len(update.text),
        )


def _engine_request(request: ServerRequest, constraint: Constraint | None = None) -> Request:
    of_answer, of_prompt = map(recorder, (request.sampling.logprobs, request.sampling.prompt_logprobs))
    return replace(request, constraint=constraint, on_logits=of_answer, on_prompt_logits=of_prompt)
