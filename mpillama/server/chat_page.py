"""The chat page's paths: its files, and the Markdown of answers as HTML."""

import json
import logging
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from pydantic import Field

from mpillama.openai.bodies import MAX_STOPS
from mpillama.openai.body import Body
from mpillama.server.errors import AsciiJson, Refused, Unprocessable
from mpillama.server.render.code import code_css
from mpillama.server.render.renderer import MOST_CHARACTERS, MOST_TEXTS, NotRendered
from mpillama.server.routes import StrictRoute
from mpillama.text.sampling_params import SamplingParams

LOG = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
FRESH = {"Cache-Control": "no-cache"}
"""The page's files belong together: after an upgrade a browser must not mix two versions."""
LEAST_ABOVE = 1e-6
"""How far above a limit a number must be that may not be the limit itself: browsers know no such limits."""

page = APIRouter(route_class=StrictRoute, include_in_schema=False)


class PageText(Body):
    """A text in Markdown, or while it is `growing` its end."""

    text: Annotated[str, Field(max_length=MOST_CHARACTERS)]
    growing: bool = False


class PageTexts(Body):
    """The body of POST /page/render."""

    texts: Annotated[list[PageText], Field(min_length=1, max_length=MOST_TEXTS, fail_fast=True)]


@page.get("/")
async def index() -> Response:
    """Show the chat page."""
    return FileResponse(PAGE / "index.html", headers=FRESH)


@page.post("/page/render")
async def render(request: Request, body: PageTexts) -> Response:
    """Give the blocks of each text as HTML, each with its line: a page that shows a growing text sends its end only."""
    if sum(len(one.text) for one in body.texts) > MOST_CHARACTERS:
        raise Refused(413, f"texts: more than {MOST_CHARACTERS} characters together", "texts")
    try:
        found: Any = await request.app.state.renderer.render([(one.text, one.growing) for one in body.texts])
    except NotRendered as error:
        raise Unprocessable(f"texts: {error}", "texts") from error
    return AsciiJson({"documents": found})


@page.get("/page/{name}")
async def page_file(name: str) -> Response:
    """Give a file of the chat page."""
    if name in MADE:
        make, kind = MADE[name]
        return Response(make(), media_type=kind, headers=FRESH)
    if name not in _files():
        raise Refused(404, f"the page has no file {name!r}")
    return FileResponse(_files()[name], headers=FRESH)


@cache
def sampling_js() -> str:
    """The sampling fields that the page lets its reader set, with the limits of the API."""
    fields = [
        {
            "name": name,
            "label": name.replace("_", " ").capitalize(),
            "min": about.asked.ge if about.asked.gt is None else about.asked.gt + LEAST_ABOVE,
            "max": about.asked.le,
            "step": 1 if about.asked.kind is int else "any",
            "hint": about.hint,
        }
        for name, about in SamplingParams.about().items()
        if about.asked and about.hint
    ]
    return f"export const FIELDS = {json.dumps(fields)};\nexport const MAX_STOPS = {MAX_STOPS};\n"


MADE = {"code.css": (code_css, "text/css"), "sampling.js": (sampling_js, "text/javascript")}
"""Files of the page that are made, not kept: what makes them, and their type."""


@cache
def _files() -> dict[str, Path]:
    return {path.name: path for path in PAGE.iterdir() if path.is_file()}
