"""The bodies of requests, as OpenAI's API reference describes them.

https://platform.openai.com/docs/api-reference/chat and …/completions. All its fields are known: they are honoured, or
taken without effect where that is harmless (`Ignored`), or refused where the answer would be another one. Fields that
nobody knows are told in a header. top_k, min_p, repetition_penalty, ignore_eos, cache_prompt, cache_salt and what
concerns the chat template are not OpenAI's.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)

MAX_STOPS = 16
MOST_UNKNOWN = 16
"""Unknown fields of a body that are told."""
NO_LIMIT = -1
"""As `max_tokens`: the answer may fill the context."""
ANY_SEED = -1
"""As `seed`: none in particular."""
AnyBody = TypeVar("AnyBody", bound="Body")

Bias = Annotated[float, Field(ge=-100, le=100)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Ignored = Annotated[Any, Field(description="taken without effect")]
MostTokens = Annotated[int, Field(ge=0)] | Literal[-1]


class BadRequest(Exception):  # noqa: N818 - named as its status is
    """A request that cannot be served: what is wrong, and with which field."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


def refusing(reason: str, *harmless: Any) -> AfterValidator:
    """For a field whose effect cannot be had: any value but null, and those that ask for nothing, is refused."""

    def check(value: Any) -> None:
        if value is not None and value not in harmless:
            raise ValueError(reason)

    return AfterValidator(check)


class Body(BaseModel):
    """What every request has."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, strict=True)

    _unknown: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _note_unknown(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        body = handler(data)
        if isinstance(data, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            body._unknown = list(islice((n for n, v in data.items() if v is not None and n not in known), MOST_UNKNOWN))
        return body

    def unknown_fields(self) -> list[str]:
        """The ways to fields that have a value and no meaning here, the first of them; parts of the body included."""
        return list(islice(_unknown_fields(self, ""), MOST_UNKNOWN))


def _unknown_fields(body: Body, place: str) -> Iterator[str]:
    yield from (place + name for name in body._unknown)
    for name in type(body).model_fields:
        value = getattr(body, name)
        if isinstance(value, Body):
            yield from _unknown_fields(value, f"{place}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Body):
            for index, part in enumerate(value):
                yield from _unknown_fields(part, f"{place}{name}.{index}.")


class SamplingBody(Body):
    """How an answer is sampled and when it ends; None takes the server's or the job's own value."""

    model: str | None = None
    max_tokens: MostTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    logit_bias: dict[str, Bias] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
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
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def most_tokens(self) -> int | None:
        """The limit of the answer's length."""
        return self.max_tokens


class TextPart(Body):
    """A part of a message's content; marks for caches and quoted sources are others' notes."""

    type: Literal["text"]
    text: str
    annotations: Ignored = None
    cache_control: Ignored = None
    prompt_cache_breakpoint: Ignored = None


class RefusalPart(Body):
    """What the assistant said when it refused."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """As other parts have it."""
        return self.refusal


class CalledFunction(Body):
    """A function that the model called, with its arguments as JSON text."""

    name: str
    arguments: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The call as chat templates want it: there are always arguments."""
        return {"name": self.name, "arguments": self.arguments or "{}"}


class ToolCall(Body):
    """A call of an earlier answer, sent back."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction
    index: Ignored = None

    def for_template(self) -> dict[str, Any]:
        """The call as chat templates want it."""
        found = {"id": self.id, "type": "function", "function": self.function.for_template()}
        return {name: value for name, value in found.items() if value is not None}


class Message(Body):
    """A message of a conversation; what an answer says is taken back as it was given, its empty fields as well."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart | RefusalPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None
    """The older form of `tool_calls`; the role `function` is the older one of `tool`."""
    reasoning_content: str | None = None
    reasoning: str | None = None
    """What the assistant thought, under either name."""
    refusal: str | None = None
    annotations: Ignored = None
    audio: Annotated[Any, refusing("spoken answers are not known here: send what was said as content")] = None

    @property
    def text(self) -> str:
        """The content as one text."""
        parts = "".join(p.text for p in self.content) if isinstance(self.content, list) else self.content
        return parts or self.refusal or ""

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates want it: content is one text, and older forms are written as newer ones."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        given = {"role": role, "content": self.text, "name": self.name, "tool_call_id": self.tool_call_id}
        if self.role == "function":
            given["tool_call_id"] = self.tool_call_id or f"call_{self.name}"
        thought = self.reasoning_content or self.reasoning
        if self.role == "assistant" and thought:  # templates know one name or the other
            given |= {"reasoning_content": thought, "reasoning": thought}
        found: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.calls:
            found["tool_calls"] = [call.for_template() for call in self.calls]
        return found

    @property
    def calls(self) -> list[ToolCall]:
        """Calls of tools, in either form."""
        if self.tool_calls or self.function_call is None:
            return self.tool_calls or []
        return [ToolCall(id=f"call_{self.function_call.name}", function=self.function_call)]


TEMPLATE_OWN = frozenset(["self", "messages", "tools", "add_generation_prompt", "continue_final_message"])
"""What a template is given by other fields than `chat_template_kwargs`."""


def _check_variables(given: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(TEMPLATE_OWN & set(given)):
        raise ValueError(f"{taken[0]!r} is said by a field of the request itself")
    return given


class TemplateFields(Body):
    """How the chat template is used; `chat_template_kwargs` are variables of its own, such as enable_thinking."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_check_variables)] | None = None
    reasoning_effort: Effort | None = None

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the template is told besides the conversation; it leaves out what it does not know."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        if self.reasoning_effort == "none":
            effort["enable_thinking"] = False  # type: ignore[assignment]
        return effort | (self.chat_template_kwargs or {})


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


def parse_body(kind: type[AnyBody], fields: Any) -> AnyBody:
    """Check a decoded JSON object; BadRequest names the first field that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise bad_request(found, fields) from error


def bad_request(errors: Sequence[Any], fields: Any) -> BadRequest:
    """What pydantic found wrong with `fields`, as one sentence on the deepest place."""
    places = [_place(error["loc"], fields, error["type"] == "missing") for error in errors]
    deepest = max(range(len(errors)), key=lambda i: len(places[i]))
    first = errors[deepest]
    place = ".".join(str(part) for part in places[deepest]) or "body"
    return BadRequest(f"{place}: {first['msg'].removeprefix('Value error, ')}", place)


def _place(location: Sequence[Any], fields: Any, is_missing: bool) -> list[Any]:
    """The part of pydantic's location that is a way through the data: it also names the types it tried."""
    place = []
    for i, part in enumerate(location):
        if isinstance(fields, dict) and (part in fields or (is_missing and i == len(location) - 1)):
            place.append(part)
            fields = fields.get(part)
        elif isinstance(fields, list) and isinstance(part, int) and part < len(fields):
            place.append(part)
            fields = fields[part]
    return place
