"""Bodies of requests to the Responses API, as OpenAI's reference describes them: what becomes of them here is a chat.

https://platform.openai.com/docs/api-reference/responses
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter
from pydantic_core import PydanticCustomError

from mpillama.openai.bodies import (
    MOST_LOGPROBS,
    FunctionTool,
    JsonObjectFormat,
    JsonSchema,
    MostTokens,
    SamplingBody,
    TextFormat,
)
from mpillama.openai.body import Body, Ignored, refusing
from mpillama.openai.messages import Effort, RefusalPart, TemplateFields

LOGPROBS = "message.output_text.logprobs"
"""What `include` must name for log-probabilities."""


def _only(what: str, *kinds: str) -> BeforeValidator:
    """Refuse other kinds than these by their name, and say what there is."""

    def check(value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind is not None and kind not in kinds:
            known = ", ".join(kinds)
            raise PydanticCustomError("not_here", "{what} {given} is not served here; there are: {known}", {
                "what": what, "given": repr(str(kind)[:80]), "known": known,
            })  # fmt: skip
        return value

    return BeforeValidator(check)


class TextContent(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Ignored = None
    logprobs: Ignored = None
    prompt_cache_breakpoint: Ignored = None


Content = Annotated[
    Annotated[TextContent | RefusalPart, Field(discriminator="type")],
    _only("content of the type", "input_text", "output_text", "text", "refusal"),
]
Contents = str | Annotated[list[Content], Field(fail_fast=True)]


class Item(Body):
    """What all items of a conversation may have: clients send back what they were answered."""

    id: str | None = None
    status: Ignored = None


class MessageItem(Item):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Contents
    phase: Ignored = None


class CallItem(Item):
    """A call of a function by the model."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CallOutputItem(Item):
    type: Literal["function_call_output"]
    call_id: str
    output: Contents


class Thought(Body):
    """A part of what the model thought, or of its summary."""

    type: Literal["reasoning_text", "summary_text", "text"]
    text: str


Thoughts = Annotated[list[Thought], Field(fail_fast=True)]


class ReasoningItem(Item):
    """What the model thought; what others encrypted cannot be read here and is left out."""

    type: Literal["reasoning"]
    summary: Thoughts | None = None
    content: Thoughts | None = None
    encrypted_content: Ignored = None


class ReferenceItem(Item):
    """An item of an answer that is still kept here."""

    type: Literal["item_reference"]
    id: str


def _kind_of(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else "message"


InputItem = Annotated[
    Annotated[
        Annotated[MessageItem, Tag("message")]
        | Annotated[CallItem, Tag("function_call")]
        | Annotated[CallOutputItem, Tag("function_call_output")]
        | Annotated[ReasoningItem, Tag("reasoning")]
        | Annotated[ReferenceItem, Tag("item_reference")],
        Discriminator(_kind_of),
    ],
    _only(
        "an item of the type", "message", "function_call", "function_call_output", "reasoning", "item_reference"
    ),
]  # fmt: skip
ITEM: TypeAdapter[Any] = TypeAdapter(InputItem)


class ResponseTool(FunctionTool):
    """A function that the model may call; tools that OpenAI's own servers run are not here."""

    type: Literal["function"]


FunctionOnly = Annotated[ResponseTool, _only("a tool of the type", "function")]


class NamedFunction(Body):
    """The call that is wanted, or one of those that may be."""

    type: Literal["function"]
    name: str


class AllowedFunctions(Body):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[Annotated[NamedFunction, _only("a tool of the type", "function")]],
        Field(min_length=1, max_length=128, fail_fast=True),
    ]


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | Annotated[NamedFunction | AllowedFunctions, Field(discriminator="type")],
    _only("a choice of the type", "function", "allowed_tools"),
]


class SchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextOptions(Body):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Ignored = None


class ReasoningOptions(Body):
    """How much the model thinks; how its thoughts are summed up has no effect, since they are given whole."""

    effort: Effort | None = None
    summary: Ignored = None
    generate_summary: Ignored = None


class ResponseBody(SamplingBody, TemplateFields):
    input: str | Annotated[list[InputItem], Field(fail_fast=True)] | None = None
    instructions: str | None = None
    max_output_tokens: MostTokens | None = None
    max_tool_calls: Ignored = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: Ignored = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionOnly], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    metadata: dict[str, str] | None = None
    truncation: Ignored = None
    context_management: Ignored = None
    background: Annotated[Any, refusing("answers are not computed in the background here", False)] = None
    conversation: Annotated[Any, refusing("send all items, or previous_response_id: conversations are not kept")] = None
    prompt: Annotated[Any, refusing("send instructions and input: prompts are not kept here")] = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_output_tokens is None else self.max_output_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer's tokens come with their log-probabilities."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)
