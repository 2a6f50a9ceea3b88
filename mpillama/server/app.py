"""The server's paths: OpenAI's API, a few of our own, and the chat page."""

from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from mpillama import __version__
from mpillama.errors import UserError
from mpillama.openai.bodies import DetokenizeBody, EmbeddingBody, ServedChat, ServedCompletion, TokenizeBody
from mpillama.openai.prompts import Prompter
from mpillama.server import errors, schemas
from mpillama.server.answerer import Answerer, Reply, embedding_entry, shortened
from mpillama.server.async_engine import SERVING, AsyncEngine, ServerState
from mpillama.server.chat_page import page
from mpillama.server.choices import chat_choices, completion_choices
from mpillama.server.errors import AsciiJson, Refused
from mpillama.server.metrics import Metrics
from mpillama.server.preparing import Preparation, prepared
from mpillama.server.render.renderer import Renderer
from mpillama.server.requests import (
    chat_requests,
    check_model,
    completion_requests,
    embedding_requests,
    left_out_of_grammar,
)
from mpillama.server.responses_api import responses
from mpillama.server.responses_api_store import ResponseStore
from mpillama.server.routes import (
    REFUSALS,
    EngineOf,
    StateOf,
    StrictRoute,
    answers,
    log_prompt,
    tell_ignored,
    tell_unknown,
)
from mpillama.server.streams import stream, while_connected
from mpillama.server.tokenizing import detokenized, tokenized


def create_app(engine: AsyncEngine, request_seconds: float, log_prompts: bool = False) -> FastAPI:
    """The application, in front of engines that may still be loading; answers are cut after `request_seconds`."""
    app = FastAPI(title="mpillama", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.engine = engine
    app.state.metrics = Metrics(engine)
    app.state.answerer = Answerer(engine, app.state.metrics, request_seconds)
    app.state.log_prompts = log_prompts
    app.state.renderer = Renderer()
    app.state.preparation = Preparation()
    app.state.responses = ResponseStore()
    errors.install(app)
    app.include_router(api)
    app.include_router(responses)
    app.include_router(page)
    app.include_router(_without_v1(api, responses))
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _without_v1(*routers: APIRouter) -> APIRouter:
    """The paths of OpenAI's API again, for clients that are given the server's URL without /v1."""
    found = APIRouter(route_class=StrictRoute, include_in_schema=False)
    for route in [route for router in routers for route in router.routes if isinstance(route, APIRoute)]:
        if route.path.startswith("/v1/"):
            path, methods = route.path.removeprefix("/v1"), list(route.methods or ())
            found.add_api_route(path, route.endpoint, methods=methods, response_model=route.response_model)
    return found


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title="mpillama", version=__version__, routes=app.routes)
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}, {}]
        app.openapi_schema = document
    return app.openapi_schema


api = APIRouter(route_class=StrictRoute)


@api.post("/v1/chat/completions", responses=answers(schemas.ChatCompletion, streams=True))
async def chat_completions(request: Request, body: ServedChat, state: StateOf) -> Response:
    """Answer a conversation, whole or as a stream."""
    tell_unknown(request, body)
    requests, left_out = await prepared(request, lambda _: (chat_requests(state, body), left_out_of_grammar(body)))
    tell_ignored(request, left_out)
    reply = Reply(state, "chat.completion", "chat.completion.chunk", "chatcmpl", requests)
    return await _answer(request, reply, chat_choices(state, body), body)


@api.post("/v1/completions", responses=answers(schemas.Completion, streams=True))
async def completions(request: Request, body: ServedCompletion, state: StateOf) -> Response:
    """Continue a text, whole or as a stream."""
    tell_unknown(request, body)
    requests = await prepared(request, lambda pause: completion_requests(state, body, pause))
    reply = Reply(state, "text_completion", "text_completion", "cmpl", requests)
    return await _answer(request, reply, completion_choices(state.prompter.tokenizer, body), body)


async def _answer(request: Request, reply: Reply, choice: Any, body: ServedChat | ServedCompletion) -> Response:
    answerer: Answerer = request.app.state.answerer
    answerer.engine.check_room(len(reply.requests))
    log_prompt(request, reply.id, body)
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return await stream(request, answerer.pieces(reply, choice, usage))
    return AsciiJson(await while_connected(request, answerer.whole(reply, choice)))


@api.post("/v1/embeddings", responses=answers(schemas.Embeddings))
async def embeddings(request: Request, body: EmbeddingBody, state: StateOf) -> Response:
    """Give the direction of texts in the model's last hidden state: vectors of length 1."""
    tell_unknown(request, body)
    requests = await prepared(request, lambda pause: embedding_requests(state, body, pause))
    answerer: Answerer = request.app.state.answerer
    reply = Reply(state, "list", "list", "embd", requests)
    vectors = await while_connected(request, answerer.embeddings(reply))
    shown = [shortened(vector, body.dimensions) for vector in vectors]
    entries = [embedding_entry(i, vector, body.encoding_format == "base64") for i, vector in enumerate(shown)]
    tokens = sum(len(each.prompt_ids) for each in requests)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return AsciiJson({"object": "list", "data": entries, "model": state.model, "usage": usage})


@api.get("/v1/models", responses=answers(schemas.Models))
async def models(state: StateOf) -> dict[str, Any]:
    """List the one model."""
    return {"object": "list", "data": [_model(state)]}


@api.get("/v1/models/{name}", responses=answers(schemas.Model))
async def model(name: str, state: StateOf) -> dict[str, Any]:
    """Describe the model."""
    check_model(state, name)
    return _model(state)


def _model(state: ServerState) -> dict[str, Any]:
    return {
        "id": state.model,
        "object": "model",
        "created": state.created,
        "owned_by": "mpillama",
        "max_model_len": state.max_model_len,
    }


@api.post("/tokenize", responses=answers(schemas.Tokens))
async def tokenize(request: Request, body: TokenizeBody, state: StateOf) -> Response:
    """Give the token ids of a text, or of a conversation as the model sees it."""
    tell_unknown(request, body)
    check_model(state, body.model)
    if [body.content, body.prompt, body.messages].count(None) != 2:
        raise Refused(400, "content: give either content (or prompt, which is the same) or messages", "content")
    return await prepared(request, lambda pause: tokenized(state, body, pause))


@api.post("/detokenize", responses=answers(schemas.Text))
async def detokenize(request: Request, body: DetokenizeBody, state: StateOf) -> Response:
    """Give the text of token ids."""
    tell_unknown(request, body)
    check_model(state, body.model)
    return await prepared(request, lambda _: detokenized(state, body))


@api.get("/tokenizer_info", responses=answers(schemas.TokenizerInfo))
async def tokenizer_info(state: StateOf) -> dict[str, Any]:
    """Tell what clients that count tokens must know, as vLLM does."""
    prompter = state.prompter
    return {
        "bos_token": prompter.tokenizer.bos_token or None,
        "eos_token": prompter.tokenizer.eos_token or None,
        "chat_template": _template_source(prompter),
        "vocab_size": prompter.vocab_size,
        "model_max_length": state.max_model_len,
    }


def _template_source(prompter: Prompter) -> str | None:
    try:
        return prompter.template().source
    except UserError:  # a model without a chat template completes texts all the same
        return None


@api.get("/health", responses={200: {"model": schemas.Health}, 503: {"model": schemas.Health}})
async def health(engine: EngineOf) -> Response:
    """Tell whether requests are taken."""
    replicas = engine.state.replicas if engine.state else ()
    found = {
        "status": engine.status,
        "reason": engine.reason,
        "model": engine.state.model if engine.state else None,
        "version": __version__,
        "groups": [{"ranks": list(r.ranks), "ready": r.ready, "failure": r.failure} for r in replicas],
    }
    status, headers = (200, None) if engine.status == SERVING else (503, {"Retry-After": str(errors.RETRY_SECONDS)})
    return AsciiJson(found, status, headers)


@api.get("/metrics", responses={200: {"content": {"text/plain": {}}}, 401: REFUSALS[401]})
async def metrics(request: Request) -> Response:
    """Show counters and histograms for Prometheus."""
    return Response(request.app.state.metrics.page(), media_type="text/plain; version=0.0.4")
