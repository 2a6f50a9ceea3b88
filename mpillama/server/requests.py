"""From the body of an HTTP request to those of the engine; BadRequest names what is wrong with it."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mpillama.engine.sequence import check_prompt
from mpillama.errors import UserError
from mpillama.openai.bodies import (
    AllowedTools,
    EmbeddingBody,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    SamplingBody,
    ServedChat,
    ServedCompletion,
)
from mpillama.openai.body import BadRequest
from mpillama.openai.messages import NO_THOUGHT
from mpillama.openai.tool_grammars import calls_or_json
from mpillama.server.async_engine import ServerState
from mpillama.server.engine_requests import ServerRequest
from mpillama.server.errors import Refused, Unprocessable
from mpillama.server.tokenizing import check_prompt_text, size, size_of_chat
from mpillama.text.constraint import json_schema_grammar
from mpillama.text.json_schema import rewritten
from mpillama.text.sampler import derived_seed
from mpillama.text.sampling_params import SamplingParams

MOST_LEFT_OUT = 16
"""Words of schemas that are named."""


def check_model(state: ServerState, name: str | None) -> None:
    """Refused for the name of another model than the one that is here."""
    if name and name not in state.names:
        raise Refused(404, f"there is no model {name!r} here, only {state.model!r}", "model", "model_not_found")


def chat_requests(state: ServerState, body: ServedChat) -> list[ServerRequest]:
    """A request for each choice of a chat."""
    check_model(state, body.model)
    _check_chat(state, body)
    if (body.n or 1) > state.capacity:
        raise BadRequest(f"n: more answers than this server holds ({state.capacity})", "n")
    tools = used_tools(body)
    check_prompt_text(state, size_of_chat(body.messages, tools, body.template_variables), "messages")
    grammar = _grammar(state, body)
    # Within a grammar there is no room for thoughts; the templates of models that have them know this variable.
    variables = {} if grammar is None else NO_THOUGHT
    try:
        ids = state.prompter.chat_ids(body.messages, tools, body, **variables)
    except UserError as error:
        raise Unprocessable(str(error), "messages") from error
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    first, *more = _choices(state, body, ids, body.n or 1, "messages", logprobs, grammar, bool(tools))
    requests = [_with_prompt_logprobs(first, body.prompt_logprobs), *more]
    return [replace(request, continues=bool(body.continue_final_message)) for request in requests]


def _with_prompt_logprobs(request: ServerRequest, alternatives: int | None) -> ServerRequest:
    return replace(request, sampling=replace(request.sampling, prompt_logprobs=alternatives))


def used_tools(body: ServedChat) -> list[dict[str, Any]] | None:
    """The tools that the model is told of: those that it may call."""
    if not body.tools or body.tool_choice == "none":
        return None
    tools, choice = [tool.model_dump(exclude_none=True) for tool in body.tools], body.tool_choice
    if not isinstance(choice, AllowedTools):
        return tools
    allowed = {tool.function.name for tool in choice.allowed_tools.tools}
    return [tool for tool in tools if tool["function"]["name"] in allowed]


def _check_chat(state: ServerState, body: ServedChat) -> None:
    """BadRequest for fields that do not go together."""
    _check_prompt_logprobs(body)
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs: needs logprobs to be true", "top_logprobs")
    _check_tool_choice(body)
    if not used_tools(body):
        return
    if state.tools is None:
        reason = "this model's chat template knows no tools, or writes calls in a way unknown here"
        raise Unprocessable(f"tools: {reason}", "tools")


def _check_tool_choice(body: ServedChat) -> None:
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return
    if not body.tools:
        raise BadRequest("tool_choice: needs tools", "tool_choice")
    wanted: list[NamedTool] = []
    if isinstance(choice, NamedTool):
        wanted = [choice]
    elif isinstance(choice, AllowedTools):
        wanted = choice.allowed_tools.tools
    names = {tool.function.name for tool in body.tools}
    if missing := [tool.function.name for tool in wanted if tool.function.name not in names]:
        raise BadRequest(f"tool_choice: {missing[0]!r} is none of the tools", "tool_choice")


def _grammar(state: ServerState, body: ServedChat) -> str | None:
    """What the answer must fit; Unprocessable if no grammar can be made of it."""
    place = "tools" if used_tools(body) else "response_format"
    try:
        grammar = _tool_grammar(state, body)
        if grammar is not None:
            state.grammars.check(grammar)
    except UserError as error:
        raise Unprocessable(f"{place}: {error}", place) from error
    return grammar


def _tool_grammar(state: ServerState, body: ServedChat) -> str | None:
    """Calls if they are demanded, else what the format demands, or calls instead of it."""
    tools, schema, choice = used_tools(body), _schema(body), body.tool_choice
    if not tools or state.tools is None:
        return None if schema is None else json_schema_grammar(schema)
    wanted: Any = choice or "auto"
    if isinstance(choice, NamedTool):
        wanted = choice.model_dump()
    elif isinstance(choice, AllowedTools):
        wanted = choice.allowed_tools.mode
    several = body.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    if wanted != "auto" or schema is None:
        return state.tools.grammar(tools, wanted, several, state.grammars.token_id)
    calls = state.tools.grammar(tools, "required", several, state.grammars.token_id)
    return json_schema_grammar(schema) if calls is None else calls_or_json(calls, schema)


def left_out_of_grammar(body: ServedChat) -> list[str]:
    """The words of schemas that the answer does not keep to."""
    schema, calls = _schema(body), body.tool_choice not in (None, "none", "auto")
    given = [("tools", tool.function.parameters) for tool in body.tools or () if calls]
    given += [] if schema is None or calls else [("response_format", schema)]
    places = [f"{name}.{place.rpartition('/')[2]}" for name, one in given if one for place in rewritten(one).weakened]
    return list(dict.fromkeys(places))[:MOST_LEFT_OUT]


def _schema(body: ServedChat) -> dict[str, Any] | None:
    """What the answer's JSON must fit; None if it may be any text."""
    form = body.response_format
    if isinstance(form, JsonSchemaFormat):
        return form.json_schema.schema_ or {}
    if isinstance(form, JsonObjectFormat):
        return {"type": "object"} if form.schema_ is None else form.schema_
    return None


def completion_requests(state: ServerState, body: ServedCompletion, pause: Callable[[], None]) -> list[ServerRequest]:
    """A request for each prompt and choice of a completion; `pause` is called between the prompts."""
    check_model(state, body.model)
    if (body.best_of or 1) > (body.n or 1):
        raise BadRequest("best_of: answers are not compared here: ask for as many with n, and choose", "best_of")
    _check_prompt_logprobs(body)
    prompts = texts_of(body.prompt)
    if len(prompts) * (body.n or 1) > state.capacity:
        raise BadRequest(f"prompt: more answers than this server holds ({state.capacity})", "prompt")
    ids = []
    for prompt in prompts:
        pause()
        ids.append(_ids(state, prompt, "prompt"))
    requests = [r for one in ids for r in _choices(state, body, one, body.n or 1, "prompt", body.logprobs)]
    return [_with_prompt_logprobs(replace(request, continues=True), _of_prompt(body)) for request in requests]


def _of_prompt(body: ServedCompletion) -> int | None:
    """How many alternatives of each token of the prompt are wanted."""
    wished = [body.prompt_logprobs, body.logprobs if body.echo else None]
    return max((count for count in wished if count is not None), default=None)


def _check_prompt_logprobs(body: ServedChat | ServedCompletion) -> None:
    if body.prompt_logprobs is not None and body.stream:
        raise BadRequest("prompt_logprobs: a stream does not tell them; use echo and logprobs", "prompt_logprobs")


def embedding_requests(state: ServerState, body: EmbeddingBody, pause: Callable[[], None]) -> list[ServerRequest]:
    """A request for each text to embed; `pause` is called between the texts."""
    check_model(state, body.model)
    texts = texts_of(body.input)
    if len(texts) > state.capacity:
        raise BadRequest(f"input: more texts than this server holds ({state.capacity})", "input")
    if (body.dimensions or 0) > state.hidden_size:
        raise BadRequest(f"dimensions: this model's embeddings have {state.hidden_size}", "dimensions")
    pooling = body.pooling or state.pooling
    requests = []
    for text in texts:
        pause()
        ids = _ids(state, text, "input")
        _check(state, ids, "input")
        salt = state.salt(body.cache_salt)
        requests.append(ServerRequest(ids, SamplingParams(seed=0, max_tokens=1), pooling=pooling, cache_salt=salt))
    return requests


def texts_of(given: str | Sequence[Any] | None) -> list[str | list[int | str]]:
    """One text, or list of token ids and texts, or several, as a list."""
    if given is None or isinstance(given, str):
        return [given or ""]
    return [list(given)] if any(isinstance(part, int) for part in given) else list(given)


def _ids(state: ServerState, prompt: str | Sequence[int | str], place: str) -> list[int]:
    check_prompt_text(state, size(prompt) if isinstance(prompt, str) else sum(map(_size, prompt)), place)
    try:
        return state.prompter.prompt_ids(prompt)
    except UserError as error:
        raise BadRequest(f"{place}: {error}", place) from error


def _size(part: int | str) -> int:
    return size(part) if isinstance(part, str) else 1


def _check(state: ServerState, ids: list[int], place: str, room: int = 1) -> None:
    try:
        check_prompt(ids, state.max_model_len, state.prompter.vocab_size, room)
    except UserError as error:
        too_long = len(ids) + room > state.max_model_len
        raise Refused(400, f"{place}: {error}", place, "context_length_exceeded" if too_long else None) from error


def _choices(
    state: ServerState, body: SamplingBody, ids: list[int], count: int, place: str, logprobs: int | None,
    grammar: str | None = None, keep_special: bool = False,
) -> list[ServerRequest]:  # fmt: skip
    """Tasks of one prompt, each with a seed of its own: given, or made up here so that it can be repeated."""
    if not state.generates:
        raise BadRequest("model: it has no output head (lm_head.weight), it answers POST /v1/embeddings only", "model")
    try:
        sampling = state.prompter.sampling(body, secrets.randbits(53))
    except UserError as error:
        raise BadRequest(str(error)) from error
    _check(state, ids, place, sampling.room_for(0, 1))
    seed = sampling.seed or 0
    seeds = [seed, *(derived_seed(seed, str(i)) for i in range(1, count))]
    marking = state.reasoning.marking if state.reasoning and isinstance(body, ServedChat) else frozenset()
    return [
        ServerRequest(
            ids, replace(sampling, seed=one, logprobs=logprobs), reuse_prefix=body.cache_prompt is not False,
            keep_special=keep_special, marking=marking, cache_salt=state.salt(body.cache_salt), grammar=grammar,
            speculate=body.speculate is not False,
        )
        for one in seeds
    ]  # fmt: skip
