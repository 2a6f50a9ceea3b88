"""From the body of a request to the engine's tasks; BadRequest names what is wrong with it."""

import secrets
from collections.abc import Sequence
from typing import Any

from mpillama.api.bodies import BadRequest, Message, SamplingBody
from mpillama.api.prompts import derived_seed
from mpillama.api.reasoning import ThoughtParser
from mpillama.api.served import (
    EmbeddingBody,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    ServedChat,
    ServedCompletion,
)
from mpillama.engine.answer import Limits
from mpillama.engine.sequence import check_prompt
from mpillama.errors import UserError
from mpillama.serve.errors import Refused, Unprocessable
from mpillama.serve.front import Service
from mpillama.serve.tasks import Task
from mpillama.text.constraint import json_object_grammar, json_schema_grammar
from mpillama.text.sampler import SamplingOptions

MOST_CHARACTERS_OF_TOKEN = 256
LONGEST_OPENING = 16
"""Tokens at a prompt's end among which a thought is opened."""
UNNUMBERED = -1
"""The number of a task that was not begun."""


def check_model(service: Service, name: str | None) -> None:
    """Refused for the name of another model than the one that is here."""
    if name is not None and name not in service.names:
        raise Refused(404, f"there is no model {name!r} here, only {service.model!r}", "model", "model_not_found")


def chat_tasks(service: Service, body: ServedChat) -> list[Task]:
    """A task for each choice of a chat."""
    check_model(service, body.model)
    _check_chat(service, body)
    if (body.n or 1) > service.capacity:
        raise BadRequest(f"n: more answers than this server holds ({service.capacity})", "n")
    _check_characters(service, sum(map(_characters, body.messages)), "messages")
    tools, grammar = used_tools(body), _grammar(service, body)
    # Within a grammar there is no room for thoughts; the templates of models that have them know this variable.
    variables = {} if grammar is None else {"enable_thinking": False}
    try:
        ids = service.prompter.chat_ids(body.messages, tools, **variables)
    except UserError as error:
        raise Unprocessable(str(error), "messages") from error
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _choices(service, body, ids, body.n or 1, "messages", logprobs, grammar, bool(tools))


def thought_parser(service: Service, body: ServedChat, task: Task) -> ThoughtParser | None:
    """What tells thoughts from the rest of a task's answer; None where there can be none."""
    if service.reasoning is None or task.grammar is not None:
        return None
    end = service.prompter.tokenizer.decode(task.prompt_ids[-LONGEST_OPENING:], skip_special=False)
    return service.reasoning.parser(is_open=service.reasoning.opens(end))


def used_tools(body: ServedChat) -> list[dict[str, Any]] | None:
    """The tools that the model is told of."""
    if not body.tools or body.tool_choice == "none":
        return None
    return [tool.model_dump(exclude_none=True) for tool in body.tools]


def _check_chat(service: Service, body: ServedChat) -> None:
    """BadRequest for fields that do not go together."""
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("top_logprobs: needs logprobs to be true", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options: needs stream to be true", "stream_options")
    if body.tool_choice not in (None, "none") and not body.tools:
        raise BadRequest("tool_choice: needs tools", "tool_choice")
    if not used_tools(body):
        return
    if service.tools is None:
        reason = "this model's chat template knows no tools, or writes calls in a way unknown here"
        raise Unprocessable(f"tools: {reason}", "tools")
    if isinstance(body.response_format, JsonObjectFormat | JsonSchemaFormat):
        raise BadRequest("response_format: an answer in JSON and tools cannot be asked for together", "response_format")


def _grammar(service: Service, body: ServedChat) -> str | None:
    """What the answer must fit; Unprocessable if no grammar can be made of it."""
    form = body.response_format
    place = "tools" if used_tools(body) else "response_format"
    try:
        if isinstance(form, JsonObjectFormat):
            grammar: str | None = json_object_grammar()
        elif isinstance(form, JsonSchemaFormat):
            grammar = json_schema_grammar({} if form.json_schema.schema_ is None else form.json_schema.schema_)
        else:
            grammar = _tool_grammar(service, body)
        if grammar is not None:
            service.grammars.check(grammar)
    except UserError as error:
        raise Unprocessable(f"{place}: {error}", place) from error
    return grammar


def _tool_grammar(service: Service, body: ServedChat) -> str | None:
    tools, choice = used_tools(body), body.tool_choice
    if not tools or service.tools is None or choice is None:
        return None
    wanted = choice.model_dump() if isinstance(choice, NamedTool) else choice
    names = {tool["function"]["name"] for tool in tools}
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise BadRequest(f"tool_choice: {choice.function.name!r} is none of the tools", "tool_choice")
    several = body.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    return service.tools.grammar(tools, wanted, several, service.grammars.token_id)


def completion_tasks(service: Service, body: ServedCompletion) -> list[Task]:
    """A task for each prompt and choice of a completion."""
    check_model(service, body.model)
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options: needs stream to be true", "stream_options")
    prompts = texts_of(body.prompt)
    if len(prompts) * (body.n or 1) > service.capacity:
        raise BadRequest(f"prompt: more answers than this server holds ({service.capacity})", "prompt")
    ids = [_ids(service, prompt, "prompt") for prompt in prompts]
    return [t for one in ids for t in _choices(service, body, one, body.n or 1, "prompt", body.logprobs)]


def embedding_tasks(service: Service, body: EmbeddingBody) -> list[Task]:
    """A task for each text to embed."""
    check_model(service, body.model)
    texts = texts_of(body.input)
    if len(texts) > service.capacity:
        raise BadRequest(f"input: more texts than this server holds ({service.capacity})", "input")
    pooling = body.pooling or service.pooling
    tasks = []
    for text in texts:
        ids = _ids(service, text, "input")
        _check(service, ids, "input")
        tasks.append(Task(UNNUMBERED, ids, SamplingOptions(seed=0), Limits(1), pooling=pooling))
    return tasks


def texts_of(given: str | Sequence[Any]) -> list[str | list[int]]:
    """One text or list of token ids, or several, as a list."""
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]  # type: ignore[list-item]
    return list(given)


def _check_characters(service: Service, count: int, place: str) -> None:
    """Refuse what is surely too long without looking at it: it would take long."""
    if count > service.max_model_len * MOST_CHARACTERS_OF_TOKEN:
        reason = f"{count} characters are more than the context's {service.max_model_len} tokens can be"
        raise Refused(400, f"{place}: {reason}", place, "context_length_exceeded")


def _characters(message: Message) -> int:
    content = message.content or ""
    return len(content) if isinstance(content, str) else sum(len(part.text) for part in content)


def _ids(service: Service, prompt: str | Sequence[int], place: str) -> list[int]:
    _check_characters(service, len(prompt), place)
    try:
        return service.prompter.prompt_ids(prompt)
    except UserError as error:
        raise BadRequest(f"{place}: {error}", place) from error


def _check(service: Service, ids: list[int], place: str) -> None:
    try:
        check_prompt(ids, service.max_model_len, service.prompter.vocab_size)
    except UserError as error:
        too_long = len(ids) >= service.max_model_len
        raise Refused(400, f"{place}: {error}", place, "context_length_exceeded" if too_long else None) from error


def _choices(
    service: Service, body: SamplingBody, ids: list[int], count: int, place: str, logprobs: int | None,
    grammar: str | None = None, keep_special: bool = False,
) -> list[Task]:  # fmt: skip
    """Tasks of one prompt, each with a seed of its own: given, or made up here so that it can be repeated."""
    _check(service, ids, place)
    try:
        sampling = service.prompter.sampling(body, secrets.randbits(53))
    except UserError as error:
        raise BadRequest(str(error)) from error
    seed, limits = sampling.seed or 0, service.prompter.limits(body)
    seeds = [seed, *(derived_seed(seed, str(i)) for i in range(1, count))]
    marking = service.reasoning.marking if service.reasoning and isinstance(body, ServedChat) else frozenset()
    return [
        Task(
            UNNUMBERED, ids, SamplingOptions(**{**vars(sampling), "seed": one}), limits, body.cache_prompt is not False,
            keep_special, grammar, logprobs, marking=marking,
        )
        for one in seeds
    ]  # fmt: skip
