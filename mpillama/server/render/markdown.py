"""Markdown as models write it to HTML, one piece for each block, so that a page can keep those that do not change.

Nothing that is written becomes markup of its own: HTML is text but for a few tags without attributes, pictures are
links (the page asks nobody but its server), and what the renderer makes goes through `clean` in the end.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from mdit_py_plugins.footnote import footnote_plugin

from mpillama.server.render.code import code_block
from mpillama.server.render.formulas import formulas_plugin
from mpillama.server.render.plugins import checklists_plugin, tags_plugin
from mpillama.server.render.renderer import clean

UNSURE = re.compile(r"(?:^|\n)[ \t>]*(?:[-=*+_#~:|]+|\d{1,9}[.)]?|`{1,2})[ \t]*\Z")
"""A last line that may become a list, a heading, a rule or a fence, or make a heading of the line above it."""
LEFT_OPEN = re.compile(r"(?:\*+|_+|~+|`+|\[\^?|!\[)\Z")
MARK = re.compile(r"\\.|`+|\*\*|~~", re.DOTALL)


def completed(text: str, parse: Callable[[str], Sequence[Token]]) -> str:
    """`text` without marks at its end whose meaning is not known yet, and with ends for what is open there."""
    text = UNSURE.sub("", text)
    last = next((t for t in reversed(parse(text)) if t.type in ("inline", "fence", "code_block", "math_block")), None)
    if last is None or last.type != "inline":
        return text
    text = LEFT_OPEN.sub("", text)
    return text.rstrip() + _ends(LEFT_OPEN.sub("", last.content))


def _ends(content: str) -> str:
    """The marks that close what a paragraph leaves open: bold, struck out, or code."""
    open_marks: list[str] = []
    code = ""
    for found in MARK.finditer(content):
        mark = found[0]
        if code:
            code = "" if mark == code else code
        elif mark[0] == "`":
            code = mark
        elif mark in open_marks:
            open_marks.remove(mark)
        elif mark[0] != "\\" and content[found.end() : found.end() + 1].strip():
            open_marks.append(mark)
    return code + "".join(reversed(open_marks))


NICENESS = 5
"""The model comes first."""
SCHEMES = ("http", "https", "mailto")
DEEPEST_HEADING = 6
HEADINGS_BELOW = 2
"""The page has h1, and each message an h2."""
REGION = 'tabindex="0" role="region"'
SIDES = {"text-align:center": "middle", "text-align:right": "end"}
NOTES = ("footnote_ref", "footnote_block_open", "footnote_block_close", "footnote_open", "footnote_close",
         "footnote_anchor")  # fmt: skip
PRODUCT = re.compile(r"(?<=[0-9A-Za-z])\*(?=[0-9A-Za-z])")
WITH_TEXT = ("paragraph_open", "heading_open", "list_item_open", "th_open", "td_open", "blockquote_open")


@dataclass(frozen=True)
class Block:
    """A block's HTML, and the line of the text that it begins on."""

    line: int
    html: str


def render(text: str, growing: bool = False) -> list[Block]:
    """The blocks of a text; while it is `growing`, what its end leaves open is taken to be closed soon."""
    markdown, env = _markdown(), dict[str, Any]()
    if growing:
        text = completed(text, lambda given: markdown.parse(given, {}))
    tokens = markdown.parse(text, env)
    return [
        Block(_first_line(block), clean(markdown.renderer.render(block, markdown.options, env)).strip())
        for block in _blocks(tokens)
    ]


def _blocks(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """The tokens of each block that is in no other one."""
    block: list[Token] = []
    depth = 0
    for token in tokens:
        block.append(token)
        depth += token.nesting
        if depth == 0:
            yield block
            block = []


def _first_line(block: Sequence[Token]) -> int:
    return next((token.map[0] for token in block if token.map), 0)


@cache
def _markdown() -> MarkdownIt:
    markdown = _Markdown("commonmark", {"html": False, "linkify": True, "breaks": True}, renderer_cls=_Renderer)
    markdown.enable(["table", "strikethrough", "linkify"])
    assert markdown.linkify is not None
    markdown.linkify.set({"fuzzy_link": False, "fuzzy_email": False, "fuzzy_ip": False})
    markdown.use(formulas_plugin).use(tags_plugin).use(checklists_plugin).use(footnote_plugin, inline=False)
    for name in NOTES:  # the plugin's own have anchors, which would be the same in several messages
        markdown.add_render_rule(name, getattr(_Renderer, name))
    markdown.inline.ruler.before("emphasis", "product", _product)
    markdown.core.ruler.push("for_this_page", _for_this_page)
    return markdown


def is_harmless(address: str) -> bool:
    """Whether a link may lead there: a whole address, without a name before the host that looks like another host."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return False
    if parts.scheme not in SCHEMES:
        return False
    return bool(parts.path) if parts.scheme == "mailto" else bool(parts.hostname) and "@" not in parts.netloc


def _product(state: StateInline, silent: bool) -> bool:
    """A star between letters or digits, as in 2*3*4, which CommonMark would take for emphasis."""
    if not PRODUCT.match(state.src, state.pos):
        return False
    if not silent:
        state.pending += "*"
    state.pos += 1
    return True


def _without_full_stop(children: list[Token]) -> None:
    """A bare address in a sentence does not have the marks that end the sentence."""
    for opening, text, closing in zip(children, children[1:], children[2:], strict=False):
        bare = text.content.rstrip(".,;:!?'\"")
        if opening.type == "link_open" and opening.info == "auto" and closing.type == "link_close":
            cut = len(text.content) - len(bare)
            if cut and opening.markup == "linkify":
                opening.attrSet("href", str(opening.attrGet("href"))[:-cut])
                closing.meta["behind"], text.content = text.content[len(bare) :], bare


def _for_this_page(state: StateCore) -> None:
    """Attributes that the page's style sheet and its readers' tools need."""
    for token in state.tokens:
        side = SIDES.get(str(token.attrs.pop("style", "")))
        if side:
            token.attrSet("class", side)
        if token.type in WITH_TEXT:
            token.attrSet("dir", "auto")
        if token.type.startswith("heading_"):
            token.tag = f"h{min(DEEPEST_HEADING, int(token.tag[1:]) + HEADINGS_BELOW)}"
        _without_full_stop(token.children or [])
        for child in token.children or ():
            if child.type == "link_open":
                # What the text of a link says need not be where it leads.
                child.attrSet("title", str(child.attrGet("href")))


class _Markdown(MarkdownIt):
    def validateLink(self, url: str) -> bool:  # noqa: N802 - the library's name
        """Whether a link or picture is one; else it is text."""
        return is_harmless(url)


class _Renderer(RendererHTML):
    """HTML of those parts that the page shows in its own way."""

    def fence(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return code_block(tokens[idx].content, (tokens[idx].info.split() or [""])[0])

    def code_block(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return code_block(tokens[idx].content, "")

    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        address = escapeHtml(str(tokens[idx].attrGet("src")))
        text = self.renderInlineAsText(tokens[idx].children, options, env)
        return f'<a href="{address}" title="{address}">{escapeHtml(text) or address}</a>'

    def link_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """The end of a link, and what was taken out of it."""
        return "</a>" + escapeHtml(tokens[idx].meta.get("behind", ""))

    def table_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """A table scrolls by itself where it is too wide."""
        return f'<div class="table" {REGION} aria-label="Table"><table>'

    def table_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return "</table></div>"

    def footnote_ref(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return f"<sup>[{tokens[idx].meta['id'] + 1}]</sup>"

    def footnote_block_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return '<div class="notes"><ol>'

    def footnote_block_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return "</ol></div>"

    def footnote_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return '<li dir="auto">'

    def footnote_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return "</li>"

    def footnote_anchor(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return ""


def main() -> None:
    """Answer lists of [text, whether it grows], one a line, with lists of blocks until nobody asks any more.

    An empty line comes first, once all is imported: from then on the time of an answer is that of its texts.
    """
    os.nice(NICENESS)
    _markdown()
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        found = [[asdict(block) for block in render(text, growing)] for text, growing in json.loads(line)]
        sys.stdout.buffer.write(json.dumps(found).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
