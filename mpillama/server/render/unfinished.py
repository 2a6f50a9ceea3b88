"""The end of a text that is still growing: what it leaves open is shown as if it were closed.

It most likely will be; else marks would stand on the page for a moment and then vanish.
"""

import re
from collections.abc import Callable, Sequence

from markdown_it.token import Token

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
