"""Calls that models write as `<invoke name="…">` in a block: MiniMax M2, MiniMax M3, and DeepSeek since V3.2.

M3 and DeepSeek have a mark in every tag, which may be a token of its own: in M3 it stands before the tag, and tags of
arguments are called as the arguments are; in DeepSeek it stands behind `<` or `</`, and a parameter says whether its
value is a text or JSON.
"""

import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

from mpillama.openai.tagged_calls import (
    FREE_TEXT,
    TaggedCall,
    Tags,
    call_in_lines,
    each_argument,
    is_free_text,
    unquoted,
    value_rule,
)
from mpillama.openai.tool_calls import ToolFormat
from mpillama.openai.tool_grammars import (
    Function,
    TokenId,
    call_rules,
    marker_rule,
    more_rules,
)
from mpillama.openai.tool_json import strict_json
from mpillama.openai.tool_readers import (
    MOST_NAME,
    NAME,
    Call,
    NoCall,
    Reader,
    expect,
    literal,
    plain_name,
    skip_space,
    text_before,
)
from mpillama.text.constraint import text_rule, token_rule

ReadCall = Callable[[], Generator[None, str, Call]]
"""Reads a call from its name on."""
TextRule = Callable[[str], str]
ArgumentRule = Callable[[Function, str, Mapping[str, Any]], str]
"""Of a function, an argument's name, and the schema of its value."""


def read_block(block: tuple[str, str], call: str, read_call: ReadCall) -> Reader:
    """The tags of a block around calls, each of which begins with the text `call`."""
    yield from literal(block[0])
    calls: list[Call] = []
    while True:
        same, char = 0, (yield from skip_space())
        while same < len(call) and char == call[same]:  # as long as it may be a call or the end
            same, char = same + 1, (yield) if same + 1 < len(call) else char
        if same < len(call):
            if not calls or block[1][:same] != call[:same]:
                raise NoCall
            expect(char, block[1][same])
            yield from literal(block[1][same + 1 :])
            return calls
        calls.append((yield from read_call()))


# -- MiniMax M2 --------------------------------------------------------------------------------------------------------

MINIMAX_TAGS = Tags(
    ("<minimax:tool_call>", "</minimax:tool_call>"),
    ('<invoke name="', "</invoke>"),
    '">',
    ('<parameter name="', '"'),
    (">", "</parameter>"),
)


def read_minimax() -> Reader:
    """`<minimax:tool_call>`, calls as `<invoke name="…">` with `<parameter name="…">`, and the end."""
    return read_block(MINIMAX_TAGS.block, MINIMAX_TAGS.call[0], _invoked)


def _invoked() -> Generator[None, str, Call]:
    """A call from its name on."""
    name = plain_name((yield from text_before('"', most=MOST_NAME)))
    yield from literal(">")
    values: list[tuple[str, str]] = []
    while True:
        expect((yield from skip_space()), "<")
        kind = yield
        if kind == "/":
            yield from literal(MINIMAX_TAGS.call[1][2:])
            return TaggedCall(name, "", values=tuple(values))
        expect(kind, MINIMAX_TAGS.key[0][1])
        yield from literal(MINIMAX_TAGS.key[0][2:])
        key = yield from text_before(MINIMAX_TAGS.key[1])
        yield from literal(MINIMAX_TAGS.value[0])
        values.append((key, (yield from text_before(MINIMAX_TAGS.value[1]))))


def minimax_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """A block of calls, each on lines of its own."""
    begin, end = (marker_rule(text, token_id) for text in MINIMAX_TAGS.block)
    line = text_rule("\n")
    start = f"start: {begin} {line} call {line} {more_rules('', f'call {line}', several)} {end}\n"
    return start + call_rules(call_in_lines(MINIMAX_TAGS, function) for function in functions)


MINIMAX = ToolFormat("minimax", MINIMAX_TAGS.block[0], "", read_minimax, minimax_rules)


# -- tags with a mark, which may be a token ----------------------------------------------------------------------------


def marked_rule(text: str, mark: str, token_id: TokenId) -> str:
    """A text in which every `mark` is the token that it is, or else text."""
    known = token_id(mark)
    if known is None:
        return text_rule(text)
    parts = [text_rule(part) if part else "" for part in text.split(mark)]
    return f" {token_rule(known)} ".join(parts).strip()


def _block_rules(
    tags: Tags, argument: ArgumentRule, functions: Sequence[Function], several: bool, rule: TextRule
) -> str:
    """A block of calls, each of which has lines of its own; `rule` makes that of a text, `argument` that of a value."""

    def call(function: Function) -> str:
        begin = rule(f"{tags.call[0]}{function.name}{tags.name_end}" + "\n")
        return f"{begin} {' '.join(each_argument(function, partial(argument, function)))} {rule(tags.call[1])}"

    begin, end, line = rule(tags.block[0]), rule(tags.block[1]), text_rule("\n")
    start = f"start: {begin} {line} call {line} {more_rules('', f'call {line}', several)} {end}\n"
    return start + call_rules(map(call, functions))


def _pattern(text: str) -> str:
    """A text as part of a regular expression between slashes."""
    return re.sub(r"([\[\]/|.*+?()\\])", r"\\\1", text).replace("\n", r"\n")


# -- MiniMax M3 --------------------------------------------------------------------------------------------------------

M3_MARK = "]<]minimax[>["
M3_TAGS = Tags(
    (f"{M3_MARK}<tool_call>", f"{M3_MARK}</tool_call>"),
    (f'{M3_MARK}<invoke name="', f"{M3_MARK}</invoke>"),
    '">',
    (f"{M3_MARK}<", ">"),
    ("", f"{M3_MARK}</"),
)
M3_TEXT = r"([^\]]|\]+[^\]<])*"
"""A text in which no mark begins; what follows may begin with more of its first character."""
M3_CHILD = re.compile(rf"{re.escape(M3_MARK)}<([\w.-]+)>(.*?){re.escape(M3_MARK)}</\1>", re.DOTALL)


def read_minimax_m3() -> Reader:
    """The block, calls, and a tag for each argument, which is called as it is."""
    return read_block(M3_TAGS.block, M3_TAGS.call[0], _invoked_m3)


def _invoked_m3() -> Generator[None, str, Call]:
    """A call from its name on."""
    name = plain_name((yield from text_before('"', most=MOST_NAME)))
    yield from literal(">")
    values: list[tuple[str, str]] = []
    while True:
        expect((yield from skip_space()), M3_MARK[0])
        yield from literal(f"{M3_MARK[1:]}<")
        char = yield
        if char == "/":
            yield from literal(M3_TAGS.call[1].removeprefix(f"{M3_MARK}</"))
            return TaggedCall(name, "", values=tuple(values))
        key = yield from text_before(M3_TAGS.key[1], begun=char, most=MOST_NAME)
        if not NAME.fullmatch(key):
            raise NoCall
        text = yield from text_before(f"{M3_TAGS.value[1]}{key}>")
        values.append((key, _m3_json(text) if M3_MARK in text else text))


def _m3_json(text: str) -> str:
    """Tags within a value as JSON: an object, or a list of what has one name."""
    return json.dumps(_m3_value(text), ensure_ascii=False)


def _m3_value(text: str) -> Any:
    children = [(key, _m3_value(value)) for key, value in M3_CHILD.findall(text)]
    if children and all(key == "item" for key, _ in children):
        return [value for _, value in children]
    return dict(children) if children else _json_or_text(text)


def _json_or_text(text: str) -> Any:
    try:
        return strict_json(text)
    except (ValueError, RecursionError):
        return text


def minimax_m3_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """A block of calls, each of which and each of whose arguments has lines of its own; within values JSON."""
    known = token_id(M3_MARK)

    def argument(function: Function, name: str, schema: Mapping[str, Any]) -> str:
        begin, end = f"{M3_MARK}<{name}>", f"{M3_MARK}</{name}>\n"
        if not is_free_text(schema):
            return f"{rule(begin)} {value_rule(function, schema)} {rule(end)}"
        if known is None:
            return f"{rule(begin)} /{M3_TEXT}\\]+{_pattern(end[1:])}/"
        return f"{rule(begin)} /(.|\\n)*/ {rule(end)}"

    def rule(text: str) -> str:
        return marked_rule(text, M3_MARK, token_id)

    return _block_rules(M3_TAGS, argument, functions, several, rule)


MINIMAX_M3 = ToolFormat("minimax_m3", M3_TAGS.block[0], "", read_minimax_m3, minimax_m3_rules)


# -- DeepSeek since V3.2 -----------------------------------------------------------------------------------------------

DSML_MARK = "｜DSML｜"
DSML_BLOCKS = ("function_calls", "tool_calls")
"""What a block is called in V3.2, and in V4."""


def dsml_tags(block: str) -> Tags:
    """With a block of this name."""
    return Tags(
        (f"<{DSML_MARK}{block}>", f"</{DSML_MARK}{block}>"),
        (f'<{DSML_MARK}invoke name="', f"</{DSML_MARK}invoke>"),
        '">',
        (f'<{DSML_MARK}parameter name="', '"'),
        (">", f"</{DSML_MARK}parameter>"),
    )


def read_dsml(tags: Tags) -> Reader:
    """The block, calls, and parameters that say with `string="true"` whether a value is a text, or else JSON."""
    return read_block(tags.block, tags.call[0], partial(_invoked_dsml, tags))


def _invoked_dsml(tags: Tags) -> Generator[None, str, Call]:
    """A call from its name on."""
    name = plain_name((yield from text_before('"', most=MOST_NAME)))
    yield from literal(">")
    values: dict[str, Any] = {}
    while True:
        expect((yield from skip_space()), "<")
        char = yield
        if char == "/":
            yield from literal(tags.call[1][2:])
            return Call(name, json.dumps(values, ensure_ascii=False))
        expect(char, tags.key[0][1])
        yield from literal(tags.key[0][2:])
        key = yield from text_before(tags.key[1])
        said = yield from text_before(tags.value[0], most=MOST_NAME)
        text = yield from text_before(tags.value[1])
        values[key] = text if 'string="true"' in said else _json_or_text(text)


def dsml_rules(tags: Tags, functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """A block of calls, each of which and each of whose arguments has lines of its own."""
    known, end = token_id(DSML_MARK), f"{tags.value[1]}\n"

    def argument(function: Function, name: str, schema: Mapping[str, Any]) -> str:
        free = is_free_text(schema)
        begin = rule(f'{tags.key[0]}{name}" string="{"true" if free or unquoted(schema) else "false"}">')
        if not free:
            return f"{begin} {value_rule(function, schema)} {rule(end)}"
        if known is None:
            return f"{begin} /{FREE_TEXT}{_pattern(end)}/"
        return f"{begin} /{FREE_TEXT}<\\// {rule(end[2:])}"

    def rule(text: str) -> str:
        return marked_rule(text, DSML_MARK, token_id)

    return _block_rules(tags, argument, functions, several, rule)


def dsml_format(template_source: str) -> ToolFormat:
    """The format of a template that writes DeepSeek's marked tags."""
    tags = dsml_tags(next((block for block in DSML_BLOCKS if block in template_source), DSML_BLOCKS[0]))
    return ToolFormat("dsml", tags.block[0], "", partial(read_dsml, tags), partial(dsml_rules, tags))
