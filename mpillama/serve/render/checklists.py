"""Lists of things to do: items that begin with [ ] or [x]."""

import re

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
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
