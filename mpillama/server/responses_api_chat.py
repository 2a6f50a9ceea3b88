"""From the body of a request for a response to that of a chat, whose tasks and words are used for both."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mpillama.openai.bodies import SamplingBody, ServedChat
from mpillama.openai.body import BadRequest
from mpillama.openai.messages import CalledFunction, Message, TemplateFields, ToolCall
from mpillama.openai.responses import (
    AllowedFunctions,
    CallItem,
    CallOutputItem,
    Contents,
    MessageItem,
    NamedFunction,
    ReasoningItem,
    ReferenceItem,
    ResponseBody,
    SchemaFormat,
)
from mpillama.server.errors import Refused

Json = dict[str, Any]
PLACES = {"messages": "input", "response_format": "text.format", "max_tokens": "max_output_tokens"}
"""Where a chat's fields are in the body of a request for a response."""


def chat_of(body: ResponseBody, items: Sequence[Any]) -> ServedChat:
    """The chat that a response answers: all `items` of its conversation, and its instructions before them."""
    messages = messages_of(body.instructions, items)
    if not messages:
        raise BadRequest("input: there is no message to answer", "input")
    fields: Json = {name: getattr(body, name) for name in (*SamplingBody.model_fields, *TemplateFields.model_fields)}
    fields |= {
        "messages": messages,
        "max_tokens": body.most_tokens,
        "stream": body.stream,
        "logprobs": body.wants_logprobs,
        "top_logprobs": body.top_logprobs if body.wants_logprobs else None,
        "response_format": _format(body),
        "parallel_tool_calls": body.parallel_tool_calls,
    }
    fields |= _tools(body)
    if body.reasoning and body.reasoning.effort:
        fields["reasoning_effort"] = body.reasoning.effort
    return ServedChat.model_validate(fields)


def input_items(body: ResponseBody) -> list[Any]:
    """The request's own part of the conversation."""
    if isinstance(body.input, str):
        return [MessageItem(type="message", role="user", content=body.input)]
    return list(body.input or ())


def with_references(items: Sequence[Any], find: Callable[[str], Any]) -> list[Any]:
    """The items, with what they refer to in its place; BadRequest where `find` has nothing."""
    found = []
    for i, item in enumerate(items):
        there = find(item.id) if isinstance(item, ReferenceItem) else item
        if there is None:
            raise BadRequest(f"input.{i}: the item {item.id!r} is not kept here; send it whole", f"input.{i}")
        found.append(there)
    return found


def messages_of(instructions: str | None, items: Sequence[Any]) -> list[Message]:
    """The messages that items are: what an assistant thought, said and called in a row is one message."""
    messages = [Message(role="system", content=instructions)] if instructions else []
    for item in items:
        if isinstance(item, MessageItem):
            _add_message(messages, item)
        elif isinstance(item, CallOutputItem):
            messages.append(Message(role="tool", tool_call_id=item.call_id, content=_text(item.output)))
        elif isinstance(item, CallItem):
            function = CalledFunction(name=item.name, arguments=item.arguments)
            message = _assistant(messages, True)
            message.tool_calls = [*(message.tool_calls or ()), ToolCall(id=item.call_id, function=function)]
        elif isinstance(item, ReasoningItem) and (thought := _thought(item)):
            message = _assistant(messages, False)
            message.reasoning_content = (message.reasoning_content or "") + thought
    return [m for m in messages if m.role != "assistant" or m.tool_calls or m.content is not None]


def _add_message(messages: list[Message], item: MessageItem) -> None:
    text = _text(item.content)
    last = messages[-1] if messages else None
    system = item.role in ("system", "developer")
    if item.role == "assistant":
        _assistant(messages, last is not None and last.content is None).content = text
    elif system and last is not None and len(messages) == 1 and last.role in ("system", "developer"):
        last.content = f"{last.content}\n\n{text}"  # most templates take one such message, at the beginning
    else:
        messages.append(Message(role=item.role, content=text))


def _assistant(messages: list[Message], goes_on: bool) -> Message:
    """The assistant's message that is under way if more goes into it, else a new one."""
    last = messages[-1] if messages else None
    bare = last is not None and last.content is None and not last.tool_calls
    if last is None or last.role != "assistant" or not (goes_on or bare):
        messages.append(Message(role="assistant"))
    return messages[-1]


def _text(contents: Contents) -> str:
    return contents if isinstance(contents, str) else "".join(part.text for part in contents)


def _thought(item: ReasoningItem) -> str:
    return "\n".join(part.text for part in item.content or item.summary or ())


def _format(body: ResponseBody) -> Json | None:
    form = body.text.format if body.text else None
    if isinstance(form, SchemaFormat):
        return {"type": "json_schema", "json_schema": form.model_dump(by_alias=True, exclude={"type"})}
    return None if form is None else {"type": form.type}


def _tools(body: ResponseBody) -> Json:
    """What may be called, in a chat's words; a choice that is free needs no tools."""
    tools = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in body.tools or ()]
    choice: Any = body.tool_choice
    if isinstance(choice, AllowedFunctions):
        choice = {
            "type": "allowed_tools",
            "allowed_tools": {"mode": choice.mode, "tools": [_named(tool) for tool in choice.tools]},
        }
    elif isinstance(choice, NamedFunction):
        choice = _named(choice)
    return {"tools": tools or None, "tool_choice": None if choice == "auto" and not tools else choice}


def _named(tool: NamedFunction) -> Json:
    return {"type": "function", "function": {"name": tool.name}}


@contextmanager
def in_words_of_responses() -> Iterator[None]:
    """What is wrong with a chat is told with the names of this API's fields."""
    try:
        yield
    except Refused as error:
        message, place = _renamed(str(error), error.param)
        raise Refused(error.status, message, place, error.code) from error
    except BadRequest as error:
        raise type(error)(*_renamed(str(error), error.field)) from error


def _renamed(message: str, place: str | None) -> tuple[str, str | None]:
    if place not in PLACES:
        return message, place
    return PLACES[place] + message.removeprefix(place), PLACES[place]
