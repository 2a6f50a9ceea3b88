"""What all paths share: how requests are read, what answers them, and what the OpenAPI document says of refusals."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request, Response
from fastapi.routing import APIRoute

from mpillama.api.bodies import BadRequest
from mpillama.serve import schemas
from mpillama.serve.front import Front, Service
from mpillama.serve.json_body import load_json

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
EVENTS = {"text/event-stream": {"schema": {"type": "string", "description": "chunks, with `stream`"}}}


class StrictRequest(Request):
    """A request whose JSON is JSON: no NaN, no numbers beyond a float, no nesting without end."""

    async def json(self) -> Any:
        """The body's value."""
        try:
            return load_json(await self.body())
        except BadRequest as error:  # FastAPI lets only this kind through
            raise HTTPException(400, str(error)) from error


class StrictRoute(APIRoute):
    """A route whose requests are StrictRequests."""

    def get_route_handler(self) -> Handler:
        """What answers a request."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


def the_front(request: Request) -> Front:
    """What brings requests to the engines."""
    front: Front = request.app.state.front
    return front


def the_service(request: Request) -> Service:
    """What requests are answered with; 503 before it is loaded and when it is about to end."""
    return the_front(request).open_service()


FrontOf = Annotated[Front, Depends(the_front)]
ServiceOf = Annotated[Service, Depends(the_service)]
