"""What is taken beside Markdown: lists of things to do, and the few HTML tags that models write within a text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

BOX = re.compile(r"\[([ xX])\]\s+(?=\S)")


def checklists_plugin(markdown: MarkdownIt) -> None:
    """Show such items with a box, which cannot be changed; its label is the item's text."""
    markdown.core.ruler.after("inline", "checklists", _find)


def _find(state: StateCore) -> None:
    for item, paragraph, text in zip(state.tokens, state.tokens[1:], state.tokens[2:], strict=False):
        if (item.type, paragraph.type, text.type) != ("list_item_open", "paragraph_open", "inline"):
            continue
        found, children = BOX.match(text.content), text.children or []
        if found is None or not children or not children[0].content.startswith(found[0].strip()):
            continue
        item.attrSet("class", "task")
        children[0].content = children[0].content[3:].lstrip()
        checked = " checked" if found[1] != " " else ""
        text.children = [_html(f'<label><input type="checkbox" disabled{checked}> '), *children, _html("</label>")]


def _html(content: str) -> Token:
    return Token("html_inline", "", 0, content=content)


PAIRED = ("sup", "sub", "kbd", "mark", "u", "s", "b", "i", "strong", "em", "small", "del", "ins")
TAG = re.compile(rf"<(?:(br) ?/?|(/?)({'|'.join(PAIRED)}))>", re.IGNORECASE)


def tags_plugin(markdown: MarkdownIt) -> None:
    """Take `<br>`, and the tags of PAIRED where both are there; without attributes. All others stay text."""
    markdown.inline.ruler.before("html_inline", "plain_tag", _plain_tag)
    markdown.add_render_rule("plain_tag", _render)


@dataclass
class _Tags:
    """The tags of one paragraph: how many of each are open, and where the last end of each is."""

    text: str
    open: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)

    def last_end(self, name: str) -> int:
        if name not in self.ends:
            self.ends[name] = self.text.lower().rfind(f"</{name}>")
        return self.ends[name]


def _plain_tag(state: StateInline, silent: bool) -> bool:
    found = TAG.match(state.src, state.pos)
    if found is None:
        return False
    tags = state.env.get("tags")
    if tags is None or tags.text is not state.src:
        tags = state.env["tags"] = _Tags(state.src)
    slash, name = found[2] or "", (found[3] or "br").lower()
    depth = tags.open.get(name, 0)
    if not found[1] and not (depth if slash else tags.last_end(name) >= found.end()):
        return False
    if not silent:
        tags.open[name] = depth + (-1 if slash else 1)
        state.push("plain_tag", name, 0).markup = slash
    state.pos = found.end()
    return True


def _render(_: Any, tokens: Sequence[Token], idx: int, __: Any, ___: Any) -> str:
    return f"<{tokens[idx].markup}{tokens[idx].tag}>"
