"""Shared by all routes: strict JSON requests, dependencies, error responses of the OpenAPI document."""

import json
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from mpillama.openai.body import BadRequest, Body
from mpillama.server import schemas
from mpillama.server.async_engine import AsyncEngine, ServerState
from mpillama.server.middleware import ASKER, UNKNOWN
from mpillama.server.request_body import load_json

LOG = logging.getLogger(__name__)
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorObject, "description": text}
    for status, text in {
        400: "A field has a wrong value; `param` names it",
        401: "The key is missing or wrong",
        404: "There is no such model",
        408: "The body did not come in time",
        413: "The body is too large",
        415: "The body is not JSON",
        421: "The server is not called so",
        422: "The request is well formed, but cannot be carried out",
        429: "Too many requests; see Retry-After",
        503: "The server loads its model or is about to end; see Retry-After",
    }.items()
}
EVENT = {
    "type": "object",
    "description": "with `stream`: each event; its data are JSON, or [DONE] at the end of a chat or a completion",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}


def answers(model: type[BaseModel], streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """What a path answers, for the OpenAPI document: an object, maybe a stream of events as well, or a refusal."""
    stream = {"content": {"text/event-stream": {"schema": EVENT}}} if streams else {}
    return {200: {"model": model, **stream}, **REFUSALS}


class StrictRequest(Request):
    """A request with strict JSON: no NaN, no overflowing numbers, bounded nesting."""

    async def json(self) -> Any:
        try:
            return load_json(await self.body())
        except BadRequest as error:  # FastAPI lets only this kind through
            raise HTTPException(400, str(error)) from error


class StrictRoute(APIRoute):
    """A route whose requests are StrictRequests."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


def the_engine(request: Request) -> AsyncEngine:
    engine: AsyncEngine = request.app.state.engine
    return engine


def the_state(request: Request) -> ServerState:
    """The server's state; 503 while the model loads and during shutdown."""
    state = the_engine(request).open_state()
    return replace(state, asker=request.scope.get(ASKER, ""))


def tell_unknown(request: Request, body: Body) -> None:
    """Report the body's unknown fields in a response header."""
    request.scope[UNKNOWN] = body.unknown_fields()


def tell_ignored(request: Request, names: Sequence[str]) -> None:
    request.scope[UNKNOWN] = [*request.scope.get(UNKNOWN, ()), *names]


def log_prompt(request: Request, name: str, body: BaseModel) -> None:
    """With --log-prompts, log the body as one ASCII line."""
    if request.app.state.log_prompts:
        LOG.info("%s: %s", name, json.dumps(body.model_dump(exclude_none=True)))


EngineOf = Annotated[AsyncEngine, Depends(the_engine)]
StateOf = Annotated[ServerState, Depends(the_state)]
