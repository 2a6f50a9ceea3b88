"""The bodies of requests, as OpenAI's API reference describes them; what is not known is refused by name.

https://platform.openai.com/docs/api-reference/chat and …/completions; top_k, min_p, repetition_penalty, ignore_eos and
cache_prompt are this program's own.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_STOPS = 16
AnyBody = TypeVar("AnyBody", bound="Body")

Bias = Annotated[float, Field(ge=-100, le=100)]


class BadRequest(Exception):  # noqa: N818 - named as its status is
    """A request that cannot be served: what is wrong, and with which field."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


class Body(BaseModel):
    """What every request has."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class SamplingBody(Body):
    """How an answer is sampled and when it ends; None takes the server's or the job's own value."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    logit_bias: dict[str, Bias] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str] | None:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def most_tokens(self) -> int | None:
        """The limit of the answer's length."""
        return self.max_tokens


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """A function that the model called, with its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call of an earlier answer, sent back."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """What the assistant thought, under either name."""
    refusal: None = None
    """Clients send back what they were answered, this empty field among it."""

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates want it: content is one text."""
        content = "".join(p.text for p in self.content) if isinstance(self.content, list) else self.content
        given = self.model_dump(exclude_none=True)
        thought = self.reasoning_content or self.reasoning
        if self.role == "assistant" and thought:  # templates know one name or the other
            given |= {"reasoning_content": thought, "reasoning": thought}
        return {**given, "content": content or "", "role": "system" if self.role == "developer" else self.role}


class ChatFields(SamplingBody):
    """What asks for the next message of a conversation."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """The limit of the answer's length; the newer name counts."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionFields(SamplingBody):
    """What asks for the continuation of a text."""

    echo: Literal[False] | None = None


class ChatBody(ChatFields):
    """A row for /v1/chat/completions in a batch."""

    n: Literal[1] | None = None
    stream: Literal[False] | None = None


class CompletionBody(CompletionFields):
    """A row for /v1/completions in a batch."""

    prompt: str | Annotated[list[int], Field(min_length=1, fail_fast=True)]
    n: Literal[1] | None = None
    stream: Literal[False] | None = None


def parse_body(kind: type[AnyBody], fields: Any) -> AnyBody:
    """Check a decoded JSON object; BadRequest names the first field that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise bad_request(found, fields) from error


def bad_request(errors: Sequence[Any], fields: Any) -> BadRequest:
    """What pydantic found wrong with `fields`, as one sentence on the deepest place."""
    places = [_place(error["loc"], fields) for error in errors]
    deepest = max(range(len(errors)), key=lambda i: len(places[i]))
    first = errors[deepest]
    place = ".".join(str(part) for part in places[deepest]) or "body"
    message = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
    return BadRequest(f"{place}: {message}", place)


def _place(location: Sequence[Any], fields: Any) -> list[Any]:
    """The part of pydantic's location that is a way through the data: it also names the types it tried."""
    place = []
    for part in location:
        if isinstance(fields, dict) and (part in fields or part == location[-1]):
            place.append(part)
            fields = fields.get(part)
        elif isinstance(fields, list) and isinstance(part, int) and part < len(fields):
            place.append(part)
            fields = fields[part]
    return place
