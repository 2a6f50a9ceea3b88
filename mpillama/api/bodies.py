"""The bodies of requests, as OpenAI's API reference describes them; what is not known is refused by name.

https://platform.openai.com/docs/api-reference/chat and …/completions; top_k, min_p, repetition_penalty, ignore_eos and
cache_prompt are this program's own.
"""

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
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    logit_bias: dict[str, Bias] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    n: Literal[1] | None = None
    stream: Literal[False] | None = None
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


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates want it: content is one text."""
        content = "".join(p.text for p in self.content) if isinstance(self.content, list) else self.content
        given = self.model_dump(exclude_none=True)
        return {**given, "content": content or "", "role": "system" if self.role == "developer" else self.role}


class ChatBody(SamplingBody):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """The limit of the answer's length; the newer name counts."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionBody(SamplingBody):
    """The body of /v1/completions."""

    prompt: str | Annotated[list[int], Field(min_length=1)]
    echo: Literal[False] | None = None


def parse_body(kind: type[AnyBody], fields: Any) -> AnyBody:
    """Check a decoded JSON object; BadRequest names the first field that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "body"
        message = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
        raise BadRequest(f"{place}: {message}", place) from error
