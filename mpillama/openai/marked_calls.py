"""Calls that stand between marks, which are tokens: those of DeepSeek and of Kimi."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from mpillama.openai.tool_calls import ToolFormat
from mpillama.openai.tool_grammars import Function, TokenId, arguments_rule, call_rules, marker_rule, more_rules
from mpillama.openai.tool_readers import (
    MOST_NAME,
    Call,
    NoCall,
    Reader,
    expect,
    literal,
    plain_name,
    read_object,
    skip_space,
    text_before,
)
from mpillama.text.constraint import text_rule


@dataclass(frozen=True)
class Marks:
    """The tokens around calls and each of them, and what stands before its arguments."""

    begin: str
    begin_call: str
    before_arguments: str
    end_call: str
    end: str


def _marked_calls(marks: Marks, read: Callable[[str], Generator[None, str, Call]]) -> Reader:
    """Calls one after the other; the end of the text closes them as well. `read` is given what names the call."""
    yield from literal(marks.begin)
    same = next(i for i, (a, b) in enumerate(zip(marks.begin_call, marks.end, strict=False)) if a != b)
    calls: list[Call] = []
    char = yield from skip_space()
    while char:
        expect(char, marks.end[0])
        yield from literal(marks.end[1:same])
        char = yield
        if calls and char == marks.end[same]:
            yield from literal(marks.end[same + 1 :])
            return calls
        expect(char, marks.begin_call[same])
        yield from literal(marks.begin_call[same + 1 :])
        calls.append((yield from read((yield from text_before(marks.before_arguments, most=MOST_NAME)))))
        char = yield from skip_space()
        if char:
            expect(char, marks.end_call[0])
            yield from literal(marks.end_call[1:])
            char = yield from skip_space()
    if not calls:
        raise NoCall
    return calls


def _marked_rules(marks: Marks, several: bool, token_id: TokenId, separator: str = "") -> str:
    """The rules `start` and `block` of calls between marks."""
    begin, begin_call, end_call, end = (
        marker_rule(text, token_id) for text in (marks.begin, marks.begin_call, marks.end_call, marks.end)
    )
    return (
        f"start: {begin} block {more_rules('block', separator, several)} {end}\nblock: {begin_call} call {end_call}\n"
    )


# -- DeepSeek ----------------------------------------------------------------------------------------------------------

DEEPSEEK_MARKS = Marks(
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
)
FENCE, END_FENCE = "\n```json\n", "```"
"""What DeepSeek V3 and R1 write around the arguments."""


def read_deepseek() -> Reader:
    """Marked calls: of V3 and R1 `function`, the name and fenced arguments, of V3.1 the name and the arguments."""
    return _marked_calls(DEEPSEEK_MARKS, _deepseek_call)


def _deepseek_call(kind: str) -> Generator[None, str, Call]:
    char = yield from skip_space()
    if char == "{":
        return Call(plain_name(kind.strip()), (yield from read_object(char)).text)
    name = yield from text_before(FENCE, char, MOST_NAME)
    found = yield from read_object((yield from skip_space()))
    expect((yield from skip_space()), END_FENCE[0])
    yield from literal(END_FENCE[1:])
    return Call(plain_name(name.strip()), found.text)


def deepseek_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """Marked calls as V3.1 writes them."""
    before = marker_rule(DEEPSEEK_MARKS.before_arguments, token_id)
    rules = (f"{text_rule(function.name)} {before} {arguments_rule(function)}" for function in functions)
    return _marked_rules(DEEPSEEK_MARKS, several, token_id) + call_rules(rules)


def deepseek_fenced_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """Marked calls as V3 and R1 write them."""
    kind, end = (
        f"{text_rule('function')} {marker_rule(DEEPSEEK_MARKS.before_arguments, token_id)}",
        text_rule("\n" + END_FENCE),
    )
    rules = (f"{kind} {text_rule(function.name + FENCE)} {arguments_rule(function)} {end}" for function in functions)
    return _marked_rules(DEEPSEEK_MARKS, several, token_id, text_rule("\n")) + call_rules(rules)


DEEPSEEK = ToolFormat("deepseek", DEEPSEEK_MARKS.begin, "", read_deepseek, deepseek_rules)
DEEPSEEK_FENCED = ToolFormat("deepseek-fenced", DEEPSEEK_MARKS.begin, "", read_deepseek, deepseek_fenced_rules)


# -- Kimi --------------------------------------------------------------------------------------------------------------

KIMI_MARKS = Marks(
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
)


def read_kimi() -> Reader:
    """Marked calls, each named by the id `functions.NAME:NUMBER`."""
    return _marked_calls(KIMI_MARKS, _kimi_call)


def _kimi_call(call_id: str) -> Generator[None, str, Call]:
    call_id = call_id.strip()
    name, colon, number = call_id.removeprefix("functions.").rpartition(":")
    found = yield from read_object((yield from skip_space()))
    if not colon or not number.isdecimal():
        raise NoCall
    return Call(plain_name(name), found.text, call_id)


def kimi_rules(functions: Sequence[Function], several: bool, token_id: TokenId) -> str:
    """Marked calls with ids that name the function."""
    before = marker_rule(KIMI_MARKS.before_arguments, token_id)
    rules = (
        f"{text_rule(f'functions.{function.name}:')} /[0-9]{{1,3}}/ {before} {arguments_rule(function)}"
        for function in functions
    )
    return _marked_rules(KIMI_MARKS, several, token_id) + call_rules(rules)


KIMI = ToolFormat("kimi", KIMI_MARKS.begin, "", read_kimi, kimi_rules)
