"""The paths of OpenAI's Responses API: a chat whose conversation the server may keep, told in items and events."""

import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response

from mpillama.openai.bodies import ServedChat
from mpillama.openai.responses import ITEM, ResponseBody
from mpillama.server import schemas
from mpillama.server.answerer import Answerer, Reply
from mpillama.server.async_engine import AnswerFailed, AnswerRefused, ServerState
from mpillama.server.choices import chat_choices
from mpillama.server.errors import AsciiJson, Refused
from mpillama.server.middleware import ASKER
from mpillama.server.preparing import prepared
from mpillama.server.requests import chat_requests, left_out_of_grammar
from mpillama.server.responses_api_chat import chat_of, in_words_of_responses, input_items, with_references
from mpillama.server.responses_api_events import ResponseWriter, new_id
from mpillama.server.responses_api_store import Kept, ResponseStore, kept_items
from mpillama.server.routes import StateOf, StrictRoute, answers, log_prompt, tell_ignored, tell_unknown
from mpillama.server.streams import named_event, stream, while_connected

Json = dict[str, Any]

responses = APIRouter(route_class=StrictRoute)


def the_store(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store


def the_asker(request: Request) -> str:
    """Whose responses are seen: a digest of the key that was shown."""
    return str(request.scope.get(ASKER, ""))


StoreOf = Annotated[ResponseStore, Depends(the_store)]
AskerOf = Annotated[str, Depends(the_asker)]


class Asked:
    """A request for a response, understood."""

    def __init__(self, state: ServerState, body: ResponseBody, items: Sequence[Any], earlier: Sequence[Kept]):
        """Look at everything; BadRequest or Refused in the words of this API."""
        before = [ITEM.validate_json(item) for kept in earlier for item in (*kept.input, *kept.output.values())]
        self.state = state
        self.body = body
        self.kept_input = () if body.store is False else kept_items(items)
        with in_words_of_responses():
            self.chat: ServedChat = chat_of(body, [*before, *items])
            (self.engine_request,) = chat_requests(state, self.chat)
            self.left_out = left_out_of_grammar(self.chat)
        self.reply = Reply(state, "response", "response", "resp", [self.engine_request])

    def response(self) -> Json:
        """The response before there is any of it: what was asked, and what counts where nothing was said."""
        body, sampling = self.body, self.engine_request.sampling
        return {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "model": self.state.model,
            "instructions": body.instructions,
            "previous_response_id": body.previous_response_id,
            "store": body.store is not False,
            "metadata": body.metadata or {},
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "max_output_tokens": body.most_tokens,
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "tool_choice": _dumped(body.tool_choice) or "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "text": _dumped(body.text) or {"format": {"type": "text"}},
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "truncation": "disabled",
            "background": False,
            "usage": None,
        }


def _dumped(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else value.model_dump(by_alias=True, exclude_none=True)


async def understood(request: Request, state: ServerState, store: ResponseStore, body: ResponseBody) -> Asked:
    """The request with what it refers to."""
    earlier = store.chain(state.asker, body.previous_response_id)

    def find(name: str) -> Any:
        found = store.item(state.asker, name)
        return None if found is None else ITEM.validate_json(found)

    items = with_references(input_items(body), find)
    asked = await prepared(request, lambda _: Asked(state, body, items, earlier))
    tell_ignored(request, asked.left_out)
    return asked


@responses.post("/v1/responses", responses=answers(schemas.ModelResponse, streams=True))
async def create_response(request: Request, body: ResponseBody, state: StateOf, store: StoreOf) -> Response:
    """Answer a conversation in items, whole or as a stream of events."""
    tell_unknown(request, body)
    asked = await understood(request, state, store, body)
    answerer: Answerer = request.app.state.answerer
    answerer.engine.check_room(1)
    writer = ResponseWriter(asked.response())
    log_prompt(request, writer.response["id"], body)
    told = answer(answerer, asked, writer, store)
    if body.stream:
        return await stream(request, events(told, writer))
    await while_connected(request, _finish(told))
    return AsciiJson(writer.response)


async def answer(
    answerer: Answerer, asked: Asked, writer: ResponseWriter, store: ResponseStore
) -> AsyncGenerator[Json]:
    """The events of an answer, at the end of which it is kept."""
    choice = chat_choices(asked.state, asked.chat)(0, asked.engine_request)
    async with answerer.engine.generate(asked.reply.requests) as answers:
        async for _, output in answerer.timed(answers):
            asked.reply.note(0, output)
            for event in writer.begin():  # not before: what fails until now has a status of its own
                yield event
            for entry in choice.push(output):
                for event in writer.push(entry):
                    yield event
    last = list(writer.end(choice.finish_reason or "stop", _usage(asked.reply.usage([choice]))))
    if asked.body.store is not False:
        store.put(asked.state.asker, writer.response, asked.kept_input)
    for event in last:
        yield event


async def events(told: AsyncGenerator[Json], writer: ResponseWriter) -> AsyncGenerator[bytes]:
    """As server-sent events; an answer that fails is told in one as well."""
    try:
        async for event in told:
            yield named_event(event["type"], event)
    except AnswerFailed as error:
        if not writer.begun:
            raise
        for event in writer.fail(str(error), "invalid_prompt" if isinstance(error, AnswerRefused) else "server_error"):
            yield named_event(event["type"], event)
    finally:
        await told.aclose()


async def _finish(told: AsyncGenerator[Json]) -> None:
    try:
        async for _ in told:
            pass
    finally:
        await told.aclose()


def _usage(found: Json) -> Json:
    """A chat's usage in this API's words."""
    thought = found.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
    return {
        "input_tokens": found["prompt_tokens"],
        "input_tokens_details": {**found["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": found["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": found["total_tokens"],
    }


@responses.post("/v1/responses/input_tokens", responses=answers(schemas.InputTokens))
async def count_input_tokens(request: Request, body: ResponseBody, state: StateOf, store: StoreOf) -> Json:
    """Count the tokens that a request would have."""
    asked = await understood(request, state, store, body)
    return {"object": "response.input_tokens", "input_tokens": len(asked.engine_request.prompt_ids)}


@responses.get("/v1/responses/{response_id}", responses=answers(schemas.ModelResponse))
async def get_response(response_id: str, store: StoreOf, asker: AskerOf, stream: bool = False) -> Response:
    """Give a response that is kept."""
    if stream:
        raise Refused(400, "stream: a response that is kept is given whole", "stream")
    return AsciiJson(store.get(asker, response_id).whole())


@responses.delete("/v1/responses/{response_id}", responses=answers(schemas.Deleted))
async def delete_response(response_id: str, store: StoreOf, asker: AskerOf) -> Json:
    """Forget a response."""
    store.delete(asker, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@responses.get("/v1/responses/{response_id}/input_items", responses=answers(schemas.Items))
async def list_input_items(
    response_id: str,
    store: StoreOf,
    asker: AskerOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """List what a kept response answers, the newest first if not asked otherwise."""
    items = [json.loads(item) for item in store.get(asker, response_id).input]
    items = items if order == "asc" else items[::-1]
    if after is not None:
        items = _after(items, after)
    page = items[:limit]
    ends = {"first_id": page[0]["id"] if page else "", "last_id": page[-1]["id"] if page else ""}
    return AsciiJson({"object": "list", "data": page, **ends, "has_more": len(items) > limit})


def _after(items: list[Json], name: str) -> list[Json]:
    places = [i for i, item in enumerate(items) if item["id"] == name]
    if not places:
        raise Refused(400, f"after: there is no item {name[:80]!r}", "after")
    return items[places[0] + 1 :]
