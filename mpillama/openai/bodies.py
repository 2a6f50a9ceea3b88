"""The bodies of requests, as OpenAI's API reference describes them.

https://platform.openai.com/docs/api-reference/chat and …/completions. All its fields are known: they are honoured, or
taken without effect where that is harmless (`Ignored`), or refused where the answer would be another one. Fields that
nobody knows are told in a header. top_k, min_p, repetition_penalty, ignore_eos, cache_prompt, cache_salt and what
concerns the chat template are not OpenAI's.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, create_model

from mpillama.openai.body import Body, Ignored, refusing
from mpillama.openai.messages import Message, TemplateFields
from mpillama.text.sampling_params import Number, SamplingParams

MAX_STOPS = 16
NO_LIMIT = -1
"""As `max_tokens`: the answer may fill the context."""
ALL_TOKENS = -1
"""As `top_k`: another way to say 0."""
ANY_SEED = -1
"""As `seed`: none in particular."""

Bias = Annotated[float, Field(ge=-100, le=100)]
MostTokens = Annotated[int, Field(ge=0)] | Literal[-1]


def _number(asked: Number) -> Any:
    """A field's type and default, for pydantic."""
    kind: Any = asked.kind
    return Annotated[kind, Field(**asked.limits)] | None, None


ASKED = {name: about.asked for name, about in SamplingParams.about().items() if about.asked}
"""Fields of SamplingParams that are numbers, and which ones a request may ask for."""

Numbers: Any = create_model("Numbers", __base__=Body, **{name: _number(asked) for name, asked in ASKED.items()})


class SamplingBody(Numbers):  # type: ignore[misc]
    """How an answer is sampled and when it ends; None takes the server's or the job's own value.

    Numbers that SamplingParams has come from there; here are those that a request spells otherwise.
    """

    model: str | None = None
    max_tokens: MostTokens | None = None
    top_k: Annotated[int, Field(ge=ALL_TOKENS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    logit_bias: dict[str, Bias] | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    cache_salt: str | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    moderation: Annotated[Any, refusing("answers are not moderated here: leave it out")] = None

    @property
    def stops(self) -> list[str] | None:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens


def _check_modalities(given: list[str]) -> list[str]:
    if given != ["text"]:
        raise ValueError("answers are text only")
    return given


class ChatFields(SamplingBody, TemplateFields):
    """What asks for the next message of a conversation."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: MostTokens | None = None
    verbosity: Ignored = None
    prediction: Ignored = None
    audio: Ignored = None
    """How to speak, which is not done."""
    modalities: Annotated[list[str], AfterValidator(_check_modalities)] | None = None
    web_search_options: Annotated[Any, refusing("this server does not search: leave it out")] = None
    functions: Annotated[Any, refusing("give tools, which replaced it", [])] = None
    function_call: Annotated[Any, refusing("give tool_choice, which replaced it", "none", "auto")] = None

    @property
    def most_tokens(self) -> int | None:
        """The limit of the answer's length; the newer name counts."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _check_suffix(given: str) -> str:
    if given:
        raise ValueError("a text between two others is not known here: leave it out")
    return given


def _check_mixed(given: list[Any]) -> list[Any]:
    if not any(isinstance(part, int) for part in given):
        raise ValueError("texts without token ids are prompts of their own")
    return given


Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Mixed = Annotated[
    list[Annotated[int, Field(ge=0)] | str], Field(min_length=1, fail_fast=True), AfterValidator(_check_mixed)
]
"""One prompt of token ids with texts between them."""


class CompletionFields(SamplingBody):
    """What asks for the continuation of a text."""

    suffix: Annotated[str, AfterValidator(_check_suffix)] | None = None


class ChatBody(ChatFields):
    """A row for /v1/chat/completions in a batch, where what follows would need the server."""

    n: Literal[1] | None = None
    stream: Literal[False] | None = None
    stream_options: Ignored = None
    parallel_tool_calls: Ignored = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    response_format: Annotated[Any, refusing("rows of a batch have no grammar", {"type": "text"})] = None
    tools: Annotated[Any, refusing("rows of a batch call no tools", [])] = None
    tool_choice: Literal["none", "auto"] | None = None


class CompletionBody(CompletionFields):
    """A row for /v1/completions in a batch."""

    prompt: str | Tokens | Mixed | None
    echo: Literal[False] | None = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    stream: Literal[False] | None = None
    stream_options: Ignored = None
    logprobs: Annotated[Any, refusing("rows of a batch are answered without log-probabilities")] = None
