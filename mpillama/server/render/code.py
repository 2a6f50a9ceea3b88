"""Code with its colours: Pygments names the kinds of words, a style sheet made here colours them in light and dark."""

import colorsys
from functools import cache

from markdown_it.common.utils import escapeHtml
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.styles import get_style_by_name
from pygments.token import STANDARD_TYPES
from pygments.util import ClassNotFound

MOST_CHARACTERS = 50_000
"""Longer code has no colours."""
LIGHT, DARK = "gruvbox-light", "gruvbox-dark"
LIGHT_GROUND, DARK_GROUND = "f4f2ec", "1b2020"
"""What code stands on, as base.css has it (--sunken)."""
CONTRAST = 4.6
CLASSES = frozenset(name for name in STANDARD_TYPES.values() if name)


def code_block(code: str, language: str) -> str:
    """A block of code, with a line above it that names its language."""
    code = code.removesuffix("\n")
    bar = f'<div class="bar"><span>{escapeHtml(language) or "text"}</span></div>'
    pre = f'<pre tabindex="0" role="region" aria-label="Code"><code>{_coloured(code, language)}</code></pre>'
    return f'<div class="code">{bar}{pre}</div>'


def _coloured(code: str, language: str) -> str:
    if not language or len(code) > MOST_CHARACTERS:
        return escapeHtml(code)
    try:
        lexer = get_lexer_by_name(language.lower().strip("{}."), stripnl=False)
    except ClassNotFound:
        return escapeHtml(code)
    # A line without an end is no comment to some lexers.
    return highlight(f"{code}\n", lexer, HtmlFormatter(nowrap=True)).removesuffix("\n")


@cache
def code_css() -> str:
    """The style sheet of the colours; each has enough contrast to be read."""
    light, dark = _colours(LIGHT, LIGHT_GROUND), _colours(DARK, DARK_GROUND)
    rules = ["/* Colours of code, made from styles of Pygments. */"]
    names = sorted(light.keys() & dark.keys())
    rules += [f".code .{name} {{ color: light-dark(#{light[name]}, #{dark[name]}); }}" for name in names]
    rules += [".code .ge { font-style: italic; }", ".code :is(.gs, .gh, .gu) { font-weight: 600; }"]
    return "\n".join(rules) + "\n"


def _colours(style: str, ground: str) -> dict[str, str]:
    found = {STANDARD_TYPES.get(token, ""): details["color"] for token, details in get_style_by_name(style)}
    return {name: _legible(colour, ground) for name, colour in found.items() if name and colour}


def _legible(colour: str, ground: str) -> str:
    """The colour, made darker or lighter until it has contrast."""
    dark_ground = _luminance(ground) < 0.5
    while _contrast(colour, ground) < CONTRAST:
        hue, lightness, saturation = colorsys.rgb_to_hls(*(part / 255 for part in bytes.fromhex(colour)))
        lightness = min(1.0, lightness + 0.02) if dark_ground else max(0.0, lightness - 0.02)
        rgb = colorsys.hls_to_rgb(hue, lightness, saturation)
        colour = bytes(round(255 * part) for part in rgb).hex()
    return colour


def _contrast(one: str, other: str) -> float:
    """By WCAG's definition."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = (part / 255 for part in bytes.fromhex(colour))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
