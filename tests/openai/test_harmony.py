"""Answers of gpt-oss in channels: thoughts, text and calls, wherever the pieces of an answer are cut."""

import json
from dataclasses import dataclass

import pytest

from mpillama.engine.answer import Mark
from mpillama.openai.answer_formats import reasoning_format, tool_format
from mpillama.openai.harmony import HARMONY, MARKS, harmony_format

IDS = {mark: 1000 + i for i, mark in enumerate(MARKS)}
PROMPT_END = "<|end|><|start|>assistant"
THINKS = "<|channel|>analysis<|message|>Let me see.<|end|>"
SAYS = "<|start|>assistant<|channel|>final<|message|>Hello <b>you</b>.<|return|>"
CALLS = (
    '<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>'
)


@dataclass
class Pushed:
    """What one token adds."""

    text: str
    marks: list[Mark]


def tokens_of(answer: str, shown: bool) -> list[Pushed]:
    """An answer as tokens: marks, which have text if they are `shown`, and single characters."""
    found, place = [], 0
    while answer:
        mark = next((mark for mark in MARKS if answer.startswith(mark)), None)
        piece = mark or answer[0]
        answer = answer[len(piece) :]
        text = piece if shown or not mark else ""
        marks = [Mark(len(found), IDS[mark], place, place + len(text))] if mark else []
        place += len(text)
        found.append(Pushed(text, marks))
    return found


def read(answer: str, shown: bool = False, at_once: int = 1, prompt_end: str = PROMPT_END):
    """Thought, text, calls, and the number of tokens of thoughts."""
    parser = harmony_format(IDS.get).parser_after(prompt_end, "")
    tokens, parts = tokens_of(answer, shown), []
    for i in range(0, len(tokens), at_once):
        group = tokens[i : i + at_once]
        parts += parser.push("".join(t.text for t in group), len(group), [m for t in group for m in t.marks])
    parts += parser.finish()
    assert all(part.text or part.call for part in parts)
    thought, said = ("".join(p.text for p in parts if p.is_thought is wanted) for wanted in (True, False))
    return thought, said, [(p.call.name, p.call.arguments) for p in parts if p.call], parser.tokens


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("at_once", [1, 2, 5, 1000])
def test_channels_are_told_apart(shown, at_once):
    expected = ("Let me see.", "Hello <b>you</b>.", [], 11)
    assert read(THINKS + SAYS, shown, at_once) == expected
    assert read(THINKS + SAYS.removesuffix("<|return|>"), shown, at_once) == expected
    call = [("weather", '{"city": "Rome"}')]
    assert read(THINKS + CALLS, shown, at_once) == ("Let me see.", "", call, 11)
    assert read(THINKS + CALLS.removesuffix("<|call|>"), shown, at_once) == ("Let me see.", "", call, 11)


def test_a_preamble_is_said_and_thoughts_add_up():
    preamble = "<|start|>assistant<|channel|>commentary<|message|>I look it up.<|end|>"
    again = "<|start|>assistant" + THINKS
    thought, said, calls, tokens = read(THINKS + preamble + again + CALLS)
    assert (thought, said, tokens) == (2 * "Let me see.", "I look it up.", 22)
    assert [name for name, _ in calls] == ["weather"]


def test_the_recipient_may_stand_before_the_channel():
    answer = " to=functions.get-time<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
    assert read(answer)[2] == [("get-time", "{}")]


def test_marks_that_are_only_spelled_are_text():
    spelled = "<|channel|>final<|message|>a".removesuffix("a")
    parser = harmony_format(IDS.get).parser_after(PROMPT_END, "")
    parts = parser.push(spelled + "a", 9, [])
    assert "".join(part.text for part in parts + parser.finish()) == spelled + "a"


def test_text_outside_of_messages_is_said_as_it_comes():
    parser = harmony_format(IDS.get).parser_after(PROMPT_END, "")
    assert [part.text for part in parser.push("{", 1)] == ["{"]
    assert [part.text for part in parser.push('"a": 1}', 4)] == ['"a": 1}']
    assert parser.finish() == []


@pytest.mark.parametrize(("channel", "thinks"), [("analysis", True), ("final", False)])
def test_a_message_may_be_continued(channel, thinks):
    end = f"<|start|>assistant<|channel|>{channel}<|message|>It was"
    thought, said, *_ = read(" so.<|end|>", prompt_end=end)
    assert (thought, said) == ((" so.", "") if thinks else ("", " so."))


def test_only_a_template_and_a_vocabulary_with_channels_have_them():
    source = "<|channel|>final<|message|>{{ tools }}"
    assert reasoning_format(source, IDS.get) == harmony_format(IDS.get)
    assert reasoning_format(source, {}.get) is None
    assert reasoning_format("<|im_start|>", IDS.get) is None
    assert tool_format(source) is HARMONY


def test_a_call_of_an_unknown_function_is_content():
    parser = HARMONY.parser(lambda: "id", {"weather": None})
    text = "a < b <|channel|> c"
    assert "".join(delta.content for delta in parser.push(text) + parser.finish()) == text
    unknown, known = (read(CALLS.replace("weather", name))[2][0] for name in ("other", "weather"))
    for (name, arguments), is_known in ((unknown, False), (known, True)):
        call = next(part.call for part in _parts(name, arguments))
        deltas = parser.take(call)
        assert [delta.call is not None for delta in deltas] == [is_known]
    assert json.loads(deltas[0].call.arguments) == {"city": "Rome"}


def _parts(name: str, arguments: str):
    parser = harmony_format(IDS.get).parser_after(PROMPT_END, "")
    answer = tokens_of(f"<|channel|>commentary to=functions.{name}<|message|>{arguments}<|call|>", False)
    return [p for t in answer for p in parser.push(t.text, 1, t.marks)] + parser.finish()


def test_templates_that_take_one_text_beside_calls_get_one():
    call = {"function": {"name": "weather", "arguments": "{}"}}
    message = {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [call]}
    assert HARMONY.for_template(message)["content"] == ""
    assert HARMONY.for_template({**message, "reasoning_content": ""})["content"] == "I look."
    assert HARMONY.for_template({**message, "tool_calls": []})["content"] == "I look."
