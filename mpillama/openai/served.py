"""Bodies of requests to the server, as OpenAI's API reference describes them."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from mpillama.openai.bodies import ChatFields, CompletionFields, Mixed, Tokens
from mpillama.openai.body import Body, Ignored
from mpillama.openai.messages import Message, TemplateFields

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
