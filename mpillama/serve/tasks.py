"""What goes from the server's requests to the engines and back: plain values that may travel to another rank."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mpillama.engine.answer import Mark
from mpillama.engine.logprobs import TokenLogprob
from mpillama.engine.sequence import Pooling
from mpillama.text.sampling_params import SamplingParams


@dataclass(frozen=True)
class Task:
    """One answer, or one embedding, to compute; `number` is never used twice.

    `sampling` has a seed, so that the same task gives the same answer on any engine. `logprobs` is the number of
    alternatives to report for each token (None: not even the token's own), `prompt_logprobs` the same for the prompt.
    """

    number: int
    prompt_ids: list[int]
    sampling: SamplingParams
    reuse_prefix: bool = True
    keep_special: bool = False
    grammar: str | None = None
    logprobs: int | None = None
    pooling: Pooling | None = None
    marking: frozenset[int] = frozenset()
    """Tokens whose places in the answer are told."""
    prompt_logprobs: int | None = None
    cache_salt: str = ""
    """What cache blocks are shared under."""
    continues: bool = False
    """Whether prompt and answer are one text."""


@dataclass(frozen=True)
class Cancel:
    """Nobody wants that task's answer any more."""

    number: int


@dataclass(frozen=True)
class AskMemory:
    """The wish to know the resident bytes of every rank."""


@dataclass(frozen=True)
class Progress:
    """How a task went on in a step; with a `finish_reason` ("error" with `error`) it is over.

    The first one has the `prompt_logprobs` of all its prompt's tokens but the first, if they are wanted.
    """

    number: int
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


@dataclass(frozen=True)
class Figures:
    """The state of an engine, for /metrics."""

    running: int = 0
    waiting: int = 0
    blocks: int = 0
    blocks_used: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    sampled_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    step_seconds: float = 0.0
    model_seconds: float = 0.0
    communication_seconds: float = 0.0
    memory: list[int] = field(default_factory=list)
    """Resident bytes of each rank, when last asked for."""
