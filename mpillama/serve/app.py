"""The server's paths: OpenAI's API, a few of our own, and the chat page."""

import json
import logging
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse

from mpillama import __version__
from mpillama.api.served import DetokenizeBody, EmbeddingBody, ServedChat, ServedCompletion, TokenizeBody
from mpillama.errors import UserError
from mpillama.serve import errors, schemas
from mpillama.serve.answering import Answerer, Reply
from mpillama.serve.choices import CompletionChoice, chat_choices, embedding_entry
from mpillama.serve.errors import AsciiJson, Refused
from mpillama.serve.front import SERVING, Front, Service
from mpillama.serve.metrics import Metrics
from mpillama.serve.routes import EVENTS, REFUSALS, FrontOf, ServiceOf, StrictRoute
from mpillama.serve.streams import stream, while_connected
from mpillama.serve.tasks_of import chat_tasks, check_model, completion_tasks, embedding_tasks

LOG = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
FRESH = {"Cache-Control": "no-cache"}
"""The page's files belong together: after an upgrade a browser must not mix two versions."""


def create_app(front: Front, request_seconds: float, log_prompts: bool = False) -> FastAPI:
    """The application, in front of engines that may still be loading; answers are cut after `request_seconds`."""
    app = FastAPI(title="mpillama", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.front = front
    app.state.metrics = Metrics(front)
    app.state.answerer = Answerer(front, app.state.metrics, request_seconds)
    app.state.log_prompts = log_prompts
    errors.install(app)
    app.include_router(api)
    app.include_router(page)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title="mpillama", version=__version__, routes=app.routes)
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}, {}]
        app.openapi_schema = document
    return app.openapi_schema


api = APIRouter(route_class=StrictRoute)
page = APIRouter(route_class=StrictRoute, include_in_schema=False)


@api.post(
    "/v1/chat/completions",
    response_model=None,
    responses={200: {"model": schemas.ChatCompletion, "content": EVENTS}, **REFUSALS},
)
async def chat_completions(request: Request, body: ServedChat, service: ServiceOf) -> Response:
    """Answer a conversation, whole or as a stream."""
    tasks = await run_in_threadpool(chat_tasks, service, body)
    reply = Reply(service, "chat.completion", "chat.completion.chunk", "chatcmpl", tasks)
    return await _answer(request, reply, chat_choices(service, body), body)


@api.post(
    "/v1/completions",
    response_model=None,
    responses={200: {"model": schemas.Completion, "content": EVENTS}, **REFUSALS},
)
async def completions(request: Request, body: ServedCompletion, service: ServiceOf) -> Response:
    """Continue a text, whole or as a stream."""
    tasks = await run_in_threadpool(completion_tasks, service, body)
    reply = Reply(service, "text_completion", "text_completion", "cmpl", tasks)
    tokenizer = service.prompter.tokenizer
    return await _answer(request, reply, lambda i, _: CompletionChoice(i, tokenizer, body.logprobs is not None), body)


async def _answer(request: Request, reply: Reply, choice: Any, body: ServedChat | ServedCompletion) -> Response:
    answerer: Answerer = request.app.state.answerer
    answerer.front.check_room(len(reply.tasks))
    if request.app.state.log_prompts:
        LOG.info("%s: %s", reply.id, json.dumps(body.model_dump(exclude_none=True)))  # escaped: a line, in ASCII
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return await stream(request, answerer.pieces(reply, choice, usage))
    return AsciiJson(await while_connected(request, answerer.whole(reply, choice)))


@api.post("/v1/embeddings", response_model=None, responses={200: {"model": schemas.Embeddings}, **REFUSALS})
async def embeddings(request: Request, body: EmbeddingBody, service: ServiceOf) -> Response:
    """Give the direction of texts in the model's last hidden state: vectors of length 1."""
    tasks = await run_in_threadpool(embedding_tasks, service, body)
    answerer: Answerer = request.app.state.answerer
    reply = Reply(service, "list", "list", "embd", tasks)
    vectors = await while_connected(request, answerer.embeddings(reply))
    entries = [embedding_entry(i, vector, body.encoding_format == "base64") for i, vector in enumerate(vectors)]
    tokens = sum(len(task.prompt_ids) for task in tasks)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return AsciiJson({"object": "list", "data": entries, "model": service.model, "usage": usage})


@api.get("/v1/models", responses={200: {"model": schemas.Models}, **REFUSALS})
async def models(service: ServiceOf) -> dict[str, Any]:
    """List the one model."""
    return {"object": "list", "data": [_model(service)]}


@api.get("/v1/models/{name}", responses={200: {"model": schemas.Model}, **REFUSALS})
async def model(name: str, service: ServiceOf) -> dict[str, Any]:
    """Describe the model."""
    check_model(service, name)
    return _model(service)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "mpillama",
        "max_model_len": service.max_model_len,
    }


@api.post("/tokenize", responses={200: {"model": schemas.Tokens}, **REFUSALS})
async def tokenize(body: TokenizeBody, service: ServiceOf) -> dict[str, Any]:
    """Give the token ids of a text, or of a conversation as the model sees it."""
    check_model(service, body.model)
    if (body.content is None) == (body.messages is None):
        raise Refused(400, "content: give either content or messages", "content")
    try:
        ids = await run_in_threadpool(_token_ids, service, body)
    except UserError as error:
        raise errors.Unprocessable(str(error), "messages" if body.messages else "content") from error
    found = {"tokens": ids, "count": len(ids), "max_model_len": service.max_model_len}
    if not body.with_pieces:
        return found
    pieces = await run_in_threadpool(lambda: list(map(service.prompter.tokenizer.token_text, ids)))
    return {**found, "pieces": pieces}


def _token_ids(service: Service, body: TokenizeBody) -> list[int]:
    if body.messages is not None:
        return service.prompter.chat_ids(body.messages)
    return service.prompter.tokenizer.encode(body.content or "", add_bos=body.add_special_tokens)


@api.post("/detokenize", responses={200: {"model": schemas.Text}, **REFUSALS})
async def detokenize(body: DetokenizeBody, service: ServiceOf) -> dict[str, Any]:
    """Give the text of token ids."""
    check_model(service, body.model)
    if max(body.tokens, default=0) >= service.prompter.vocab_size:
        raise Refused(400, f"tokens: ids are below {service.prompter.vocab_size}", "tokens")
    return {"content": await run_in_threadpool(service.prompter.tokenizer.decode, body.tokens, False)}


@api.get("/health", response_model=None, responses={200: {"model": schemas.Health}, 503: {"model": schemas.Health}})
async def health(front: FrontOf) -> Response:
    """Tell whether requests are taken."""
    service = front.service
    groups = [
        {"ranks": list(r.ranks), "ready": r.ready, "failure": r.failure} for r in (service.replicas if service else ())
    ]
    state = {
        "status": front.state,
        "reason": front.reason,
        "model": service.model if service else None,
        "version": __version__,
        "groups": groups,
    }
    status, headers = (200, None) if front.state == SERVING else (503, {"Retry-After": str(errors.RETRY_SECONDS)})
    return AsciiJson(state, status, headers)


@api.get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {}}}, 401: REFUSALS[401]})
async def metrics(request: Request) -> Response:
    """Show counters and histograms for Prometheus."""
    return Response(request.app.state.metrics.page(), media_type="text/plain; version=0.0.4")


@page.get("/")
async def index() -> Response:
    """Show the chat page."""
    return FileResponse(PAGE / "index.html", headers=FRESH)


@page.get("/page/{name}")
async def page_file(name: str) -> Response:
    """Give a file of the chat page."""
    known = {path.name: path for path in PAGE.iterdir() if path.is_file()}
    if name not in known:
        raise Refused(404, f"the page has no file {name!r}")
    return FileResponse(known[name], headers=FRESH)
