"""Messages of a conversation, and how a chat template makes a prompt of them."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from mpillama.openai.body import Body, Ignored, refusing

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


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
        if self.tool_calls or self.function_call is None:
            return self.tool_calls or []
        return [ToolCall(id=f"call_{self.function_call.name}", function=self.function_call)]


TEMPLATE_OWN = frozenset(["self", "messages", "tools", "add_generation_prompt", "continue_final_message"])
"""What a template is given by other fields than `chat_template_kwargs`."""


def _check_variables(given: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(TEMPLATE_OWN & set(given)):
        raise ValueError(f"{taken[0]!r} is said by a field of the request itself")
    return given


NO_THOUGHT: dict[str, Any] = {"enable_thinking": False, "thinking": False}
"""The variables by which templates leave thoughts out: Qwen's, DeepSeek's and Kimi's."""


NO_THINK = "no_think"
EFFORTS_OF_HY = {"none": NO_THINK, "minimal": "low", "medium": "low", "xhigh": "high", "max": "high"}
"""What Hy3's template calls the efforts that it refuses."""


def in_words_of(template_source: str, variables: dict[str, Any]) -> dict[str, Any]:
    """`variables` with the effort that a template knows; without thoughts none at all."""
    if NO_THINK not in template_source:
        return variables
    if variables.get("thinking") is False or variables.get("enable_thinking") is False:
        return {**variables, "reasoning_effort": NO_THINK}
    effort = variables.get("reasoning_effort")
    return {**variables, "reasoning_effort": EFFORTS_OF_HY[effort]} if effort in EFFORTS_OF_HY else variables


class TemplateFields(Body):
    """How the chat template is used; `chat_template_kwargs` are variables of its own, such as enable_thinking."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_check_variables)] | None = None
    reasoning_effort: Effort | None = None

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the template is told besides the conversation; it leaves out what it does not know."""
        if self.reasoning_effort is None:
            return self.chat_template_kwargs or {}
        thinks = self.reasoning_effort != "none"
        effort: dict[str, Any] = {"reasoning_effort": self.reasoning_effort, "thinking": thinks}
        return effort | ({} if thinks else NO_THOUGHT) | (self.chat_template_kwargs or {})
