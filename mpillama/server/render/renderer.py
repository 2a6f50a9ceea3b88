"""The server's side of rendering."""

import asyncio
import json
import os
import selectors
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import nh3

from mpillama.server.render.code import CLASSES

SECONDS = 5.0
"""What a list of texts may take; the model's process and its threads are not held up meanwhile."""
START_SECONDS = 30.0
"""What the process may take until it is ready: on a busy machine, or from a slow file system."""
MOST_TEXTS = 50
MOST_CHARACTERS = 200_000
"""Of the texts of one request together; the page shows longer ones as they are written."""
PIECE = 1 << 16
ROOT = Path(__file__).parents[3]


class NotRendered(Exception):  # noqa: N818 - the page shows the text as it is written
    """The renderer took too long, or has ended."""


class Renderer:
    """Renders in a process of its own, begun with the first text.

    Neither the event loop nor the engine, whose thread shares this process's interpreter lock, waits for a renderer,
    and one that takes too long can be ended.
    """

    def __init__(self, seconds: float = SECONDS):
        self.seconds = seconds
        self._turn = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    async def render(self, texts: Sequence[tuple[str, bool]]) -> list[list[dict[str, Any]]]:
        """The blocks (`line`, `html`) of each text, which may be growing; NotRendered if that takes too long."""
        async with self._turn:
            return await asyncio.to_thread(self._ask, texts)

    def _ask(self, texts: Sequence[tuple[str, bool]]) -> list[list[dict[str, Any]]]:
        process, is_new = self._process, False
        if process is None or process.poll() is not None:
            process, is_new = self._begun(), True
            self._process = process
        assert process.stdin is not None
        try:
            if is_new:
                self._line(process, START_SECONDS)
            process.stdin.write(json.dumps(texts).encode() + b"\n")
            process.stdin.flush()
            found: list[list[dict[str, Any]]] = json.loads(self._line(process, self.seconds))
        except (OSError, ValueError, NotRendered) as error:  # ValueError: an answer to somebody who has gone
            self._process = None
            end(process)
            raise NotRendered(f"not rendered: {error}") from error
        return found

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """What the process answers; NotRendered if that takes longer."""
        assert process.stdout is not None
        until, parts = time.monotonic() + seconds, [b""]
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not parts[-1].endswith(b"\n"):
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise NotRendered(f"this takes longer than {seconds:g} s")
                parts.append(os.read(process.stdout.fileno(), PIECE))
                if not parts[-1]:
                    raise NotRendered("the renderer has ended")
        return b"".join(parts)

    def _begun(self) -> subprocess.Popen[bytes]:
        """A new process, which says with an empty line that it is ready."""
        words = [sys.executable, "-m", "mpillama.server.render.markdown"]
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # The server's key may be among its variables, and is no business of the renderer.
        env = {name: value for name, value in os.environ.items() if not name.startswith("MPILLAMA_")}
        # A session of its own: Ctrl-C is for the server, whose end also ends what it reads from.
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**env, "PYTHONPATH": paths},
            start_new_session=True,
        )  # fmt: skip
        weakref.finalize(self, end, process)
        return process


def end(process: subprocess.Popen[bytes]) -> None:
    """End a renderer, if it has not ended."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()


# -- The last word on what reaches the page: nothing but these tags, attributes and addresses -------------------------


TEXT = (
    *("p", "br", "hr", "strong", "em", "b", "i", "u", "s", "del", "ins", "sub", "sup", "kbd", "mark", "small"),
    *("code", "pre", "blockquote", "ul", "ol", "li", "h3", "h4", "h5", "h6", "div", "span", "a", "input", "label"),
    *("table", "thead", "tbody", "tr", "th", "td"),
)
MATH = (
    *("math", "mrow", "mi", "mn", "mo", "ms", "mtext", "mspace", "mfrac", "msqrt", "mroot", "msub", "msup", "msubsup"),
    *("munder", "mover", "munderover", "mmultiscripts", "mprescripts", "mtable", "mtr", "mtd", "mpadded", "mphantom"),
    *("menclose", "mstyle"),
)
OF_MATH = (
    *("display", "alttext", "stretchy", "fence", "separator", "form", "lspace", "rspace", "width", "height", "depth"),
    *("displaystyle", "scriptlevel", "mathvariant", "accent", "accentunder", "linethickness", "minsize", "maxsize"),
    *("largeop", "movablelimits", "symmetric", "notation", "columnalign", "rowspacing", "columnspacing"),
    *("columnlines", "rowlines", "linebreak"),
)
REGION = ("tabindex", "role", "aria-label")


@cache
def _cleaner() -> nh3.Cleaner:
    return nh3.Cleaner(
        tags={*TEXT, *MATH},
        attributes={
            "*": {"dir"},
            "a": {"href", "title"},
            "ol": {"start"},
            "input": {"checked", "disabled"},
            "pre": {*REGION},
            "div": {*REGION},
            "span": {*REGION},
            **{tag: {*OF_MATH} for tag in MATH},
        },
        tag_attribute_values={"input": {"type": {"checkbox"}}},
        set_tag_attribute_values={"a": {"target": "_blank"}},
        allowed_classes={
            "div": {"code", "bar", "table", "formula", "notes"},
            "span": {"formula", *CLASSES},
            "th": {"middle", "end"},
            "td": {"middle", "end"},
            "li": {"task"},
        },
        url_schemes={"http", "https", "mailto"},
        url_relative="deny",
        link_rel="noopener noreferrer",
    )


def clean(html: str) -> str:
    """HTML without anything that could run, ask another server, or look like the page's own controls."""
    return _cleaner().clean(html)
