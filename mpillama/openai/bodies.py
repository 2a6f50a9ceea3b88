"""The bodies of requests, as OpenAI's API reference describes them.

https://platform.openai.com/docs/api-reference/chat and …/completions. All its fields are known: they are honoured, or
taken without effect where that is harmless (`Ignored`), or refused where the answer would be another one. Fields that
nobody knows are told in a header. top_k, min_p, repetition_penalty, ignore_eos, cache_prompt, cache_salt, speculate
and what concerns the chat template are not OpenAI's.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, create_model

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
    speculate: bool | None = None
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


# -- Rows of a batch -----------------------------------------------------------------------------------------------


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


# -- Requests to the server ----------------------------------------------------------------------------------------


MOST_CHOICES = 16
MOST_LOGPROBS = 20
MOST_TOOLS = 128
MOST_INPUTS = 2048
"""Texts of one request for embeddings, or prompts of one request."""

MOST_DETOKENIZED = 1_000_000

Choices = Annotated[int, Field(ge=1, le=MOST_CHOICES)]
Inputs = Annotated[
    Annotated[list[str], Field(fail_fast=True)]
    | Annotated[list[Tokens], Field(fail_fast=True)]
    | Annotated[list[str | Tokens | Mixed], Field(fail_fast=True)],
    Field(min_length=1, max_length=MOST_INPUTS),
]
"""Several texts, each written or as token ids."""


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class JsonSchema(Body):
    """A schema that the answer must fit, whether `strict` or not; a name is not asked for."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object, or JSON that fits a schema."""

    type: Literal["json_object"]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class FunctionTool(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are all there is."""

    type: Literal["function"]
    function: FunctionTool


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class ToolChoices(Body):
    """The tools among which the model may choose, and whether it must."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MOST_TOOLS, fail_fast=True)]


class AllowedTools(Body):
    """The choice that is left to the model."""

    type: Literal["allowed_tools"]
    allowed_tools: ToolChoices


class ServedChat(ChatFields):
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None


DEFAULT_COMPLETION_TOKENS = 16
"""What OpenAI's API answers where a completion says nothing."""


class ServedCompletion(CompletionFields):
    prompt: str | Tokens | Mixed | Inputs | None
    n: Choices | None = None
    best_of: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def most_tokens(self) -> int | None:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


class EmbeddingBody(Body):
    """The body of POST /v1/embeddings; `pooling` and `cache_salt` are not OpenAI's."""

    input: str | Tokens | Mixed | Inputs
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Literal["mean", "last"] | None = None
    cache_salt: str | None = None
    user: Ignored = None


class TokenizeBody(TemplateFields):
    """The body of POST /tokenize: a text, or messages as the chat template writes them."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": [name]} for name in ("content", "prompt", "messages")]}
    )

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    """As vLLM calls the content."""
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    with_pieces: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MOST_DETOKENIZED, fail_fast=True)]
