"""Formulas, however models mark them ($, $$, \\(, \\[, LaTeX's environments), as MathML, which browsers show."""

import html
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

MOST_CHARACTERS = 5000
"""Longer formulas are shown as they are written."""
MOST_LINES = 100
REGION = 'class="formula" tabindex="0" role="region" aria-label="Formula"'
# What the converter does not know by that name, or would number.
ENVIRONMENTS = {"aligned": "align*", "gathered": "gather*", "dcases": "cases", "split": "align*", "equation": "",
                "equation*": "", "multline": "gather*", "multline*": "gather*", "align": "align*",
                "gather": "gather*"}  # fmt: skip
ENVIRONMENT = re.compile(r"\\(begin|end)\{([a-z]+\*?)\}")
BEGIN = re.compile(r"\$\$|\\\[|\\begin\{((?:equation|align|gather|multline)\*?)\}")
IN_LINE = re.compile(
    r"\\\((?P<round>.+?)\\\)|\\\[(?P<square>.+?)\\\]|\$\$(?P<double>.+?)\$\$"
    # One dollar may be an amount: no space within, no digit without.
    r"|(?<![\d$])\$(?![\s$])(?P<single>(?:\\.|[^$\\])+)(?<!\s)\$(?![\d$])",
    re.DOTALL,
)


def formulas_plugin(markdown: MarkdownIt) -> None:
    """Take formulas in all the ways in which models write them."""
    markdown.inline.ruler.before("escape", "formula", _inline)
    markdown.block.ruler.before("fence", "formula", _block, {"alt": ["paragraph", "reference", "blockquote", "list"]})
    markdown.add_render_rule("math_inline", _render_inline)
    for name in ("math_inline_double", "math_block"):
        markdown.add_render_rule(name, _render_display)


def _inline(state: StateInline, silent: bool) -> bool:
    found = IN_LINE.match(state.src, state.pos) if state.src[state.pos] in "\\$" else None
    if found is None:
        return False
    if not silent:
        kind = "math_inline" if found.lastgroup in ("round", "single") else "math_inline_double"
        state.push(kind, "math", 0).content = found[str(found.lastgroup)]
    state.pos = found.end()
    return True


def _block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """`\\[` or `$$`, a formula of any number of lines, and its end at the end of a line; or an environment."""
    found = None if state.is_code_block(start) else BEGIN.match(_line(state, start))
    if found is None:
        return False
    mark = f"\\end{{{found[1]}}}" if found[1] else {"$$": "$$", "\\[": "\\]"}[found[0]]
    lines = [_line(state, start)]
    if _last(state, mark) < state.bMarks[start] or mark in lines[0][len(found[0]) : -len(mark)]:
        return False
    while not lines[-1].endswith(mark) or lines == [mark]:
        line = start + len(lines)
        outside = line >= end or (not state.isEmpty(line) and state.sCount[line] < state.blkIndent)
        if outside or len(lines) >= MOST_LINES:
            return False
        lines.append(_line(state, line))
    if not silent:
        state.line = start + len(lines)
        token, content = state.push("math_block", "math", 0), "\n".join(lines)
        token.block, token.map, token.content = True, [start, state.line], content if found[1] else content[2:-2]
    return True


def _last(state: StateBlock, mark: str) -> int:
    """Where a text has a mark for the last time; looked for once, or beginnings without end would take long."""
    places: dict[str, int] = state.env.setdefault("last_marks", {})
    if mark not in places:
        places[mark] = state.src.rfind(mark)
    return places[mark]


def _line(state: StateBlock, line: int) -> str:
    return state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]].strip()


def _render_inline(_: Any, tokens: Sequence[Token], idx: int, __: Any, ___: Any) -> str:
    return mathml(tokens[idx].content.strip(), "inline")


def _render_display(_: Any, tokens: Sequence[Token], idx: int, __: Any, ___: Any) -> str:
    kind = "span" if tokens[idx].type == "math_inline_double" else "div"
    return f"<{kind} {REGION}>{mathml(tokens[idx].content.strip(), 'block')}</{kind}>"


@lru_cache(1000)
def mathml(latex: str, display: str) -> str:
    """A formula as MathML; as it is written, if it is not understood."""
    as_written = f"<code>{escapeHtml(latex)}</code>"
    if len(latex) > MOST_CHARACTERS:
        return as_written
    try:
        math = convert_to_element(ENVIRONMENT.sub(_known, latex), display=display)
    except Exception:  # noqa: BLE001 - whatever the converter trips over, the reader sees the formula's source
        return as_written
    for part in math.iter():
        part.text = html.unescape(part.text) if part.text else part.text
        if part.text and (part.text.startswith("\\") or part.text == "&"):
            return as_written
    math.set("alttext", latex)
    return ElementTree.tostring(math, encoding="unicode")


def _known(found: re.Match[str]) -> str:
    name = ENVIRONMENTS.get(found[2], found[2])
    return f"\\{found[1]}{{{name}}}" if name else ""
