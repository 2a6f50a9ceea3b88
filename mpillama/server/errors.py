"""Error responses: OpenAI's error objects, never a traceback."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from mpillama.openai.body import BadRequest, bad_request
from mpillama.server.async_engine import AnswerFailed, AnswerRefused, ClientGone, QueueFull, Unavailable

LOG = logging.getLogger(__name__)
RETRY_SECONDS = 5
MOST_CHARACTERS = 1000
"""Of a message: it may quote what the client sent."""
CODES = {
    400: "invalid_value", 401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 408: "timeout",
    413: "request_too_large", 415: "unsupported_media_type", 421: "wrong_host", 422: "unprocessable",
    429: "queue_full", 500: "server_error", 503: "unavailable",
}  # fmt: skip


class Refused(Exception):  # noqa: N818 - named as its status is
    """A request refused with this status and an error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code or CODES[status]


class Unprocessable(BadRequest):
    """A well-formed request that cannot be carried out, such as a schema without a grammar."""


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error, as OpenAI's API writes it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = message if len(message) <= MOST_CHARACTERS else f"{message[:MOST_CHARACTERS]}…"
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


class AsciiJson(JSONResponse):
    """JSON in ASCII, since lone surrogates have no UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def error_response(
    status: int, message: str, param: str | None = None, code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:  # fmt: skip
    return AsciiJson(error_object(status, message, param, code), status, headers)


STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (Unprocessable, 422), (BadRequest, 400), (RequestValidationError, 400), (QueueFull, 429), (Unavailable, 503),
    (AnswerRefused, 422), (AnswerFailed, 503), (ClientGone, 499),
)  # fmt: skip


def status_of(error: Exception) -> int:
    if isinstance(error, Refused):
        return error.status
    if isinstance(error, HTTPException):
        return error.status_code
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 500)


def response_to(error: Exception) -> Response:
    status = status_of(error)
    if isinstance(error, Refused):
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
        return error_response(status, str(error), error.param, error.code, headers)
    if status in (429, 503):
        return error_response(status, f"{error}: try again later", headers={"Retry-After": str(RETRY_SECONDS)})
    if status != 500:
        return error_response(status, str(error), getattr(error, "field", None))
    LOG.warning("a request failed: %s: %s", type(error).__name__, error, exc_info=error)
    return error_response(500, "the server failed at this request; its log says why")


def install(app: FastAPI) -> None:
    """Answer every failure with an error object."""

    async def respond(request: Request, error: Exception) -> Response:
        return response_to(error)

    async def respond_to_body(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        errors = [{**e, "loc": e["loc"][1:]} for e in error.errors()]
        of_query = error.errors()[0]["loc"][0] == "query"
        return response_to(bad_request(errors, dict(request.query_params) if of_query else error.body))

    async def respond_to_status(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(error.status_code, str(error.detail), headers=error.headers)

    for kind in (Refused, BadRequest, QueueFull, Unavailable, AnswerFailed, ClientGone, Exception):
        app.add_exception_handler(kind, respond)
    app.add_exception_handler(RequestValidationError, respond_to_body)
    app.add_exception_handler(HTTPException, respond_to_status)
