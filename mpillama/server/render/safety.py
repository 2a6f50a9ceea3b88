"""The last word on what reaches the page: nothing but these tags, attributes and addresses."""

from functools import cache

import nh3

from mpillama.server.render.code import CLASSES

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
