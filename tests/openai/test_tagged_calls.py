"""Calls of GLM, Hy3, MiniMax and Qwen: read wherever they are cut, values by the types of the functions, and forced."""

import json
from pathlib import Path

import numpy as np
import pytest

from mpillama.errors import UserError
from mpillama.openai.answer_formats import reasoning_format, tool_format
from mpillama.openai.invoked_calls import MINIMAX, MINIMAX_M3, dsml_format
from mpillama.openai.messages import TemplateFields, in_words_of
from mpillama.openai.pythonic_calls import LLAMA4_PYTHONIC
from mpillama.openai.reasoning import ReasoningFormat
from mpillama.openai.tagged_calls import GLM, QWEN
from mpillama.text.chat_template import ChatTemplate
from tests.openai.test_tool_calls import tokenizer_with

TEMPLATES = Path(__file__).parents[1] / "golden" / "chat_templates"
OF_HY3 = (TEMPLATES / "hy3.jinja").read_text()
HY = tool_format(OF_HY3)
DSML = dsml_format("function_calls")
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"}, "any": {},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "unit": {"enum": ["C", "F"]},
        "points": {"type": "array"},
    },
    "required": ["city"],
}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
VALUES = {
    "city": "New\n <b>York</b>", "days": "3", "exact": "true", "any": "[1, 2]", "maybe": "null", "unit": "C",
    "points": '[{"a": "b"}]',
}  # fmt: skip
TEXTS = ("city", "unit")
EXPECTED = {
    "city": "New\n <b>York</b>", "days": 3, "exact": True, "any": [1, 2], "maybe": None, "unit": "C",
    "points": [{"a": "b"}],
}  # fmt: skip


def glm(name: str, values: dict[str, str], line: str = "\n") -> str:
    pairs = (f"<arg_key>{k}</arg_key>{line}<arg_value>{v}</arg_value>{line}" for k, v in values.items())
    return f"<tool_call>{name}{line}{''.join(pairs)}</tool_call>"


def minimax(*calls: tuple[str, dict[str, str]]) -> str:
    text = "<minimax:tool_call>\n"
    for name, values in calls:
        pairs = (f'<parameter name="{k}">{v}</parameter>\n' for k, v in values.items())
        text += f'<invoke name="{name}">\n{"".join(pairs)}</invoke>\n'
    return text + "</minimax:tool_call>"


def minimax_m3(*calls: tuple[str, dict[str, str]]) -> str:
    mark = "]<]minimax[>["
    text = f"{mark}<tool_call>\n"
    for name, values in calls:
        pairs = (f"{mark}<{k}>{v}{mark}</{k}>\n" for k, v in values.items())
        text += f'{mark}<invoke name="{name}">\n{"".join(pairs)}{mark}</invoke>\n'
    return text + f"{mark}</tool_call>"


def dsml(*calls: tuple[str, dict[str, str]]) -> str:
    """Values that are JSON and no text say so."""
    text = "<｜DSML｜function_calls>\n"
    for name, values in calls:
        pairs = (
            f'<｜DSML｜parameter name="{k}" string="{"true" if k in TEXTS else "false"}">{v}</｜DSML｜parameter>\n'
            for k, v in values.items()
        )
        text += f'<｜DSML｜invoke name="{name}">\n{"".join(pairs)}</｜DSML｜invoke>\n'
    return text + "</｜DSML｜function_calls>"


def hy(*calls: tuple[str, dict[str, str]], line: str = "\n", end: str = ":toy") -> str:
    def tag(name: str) -> str:
        return f"<{name}{end}>"

    text = tag("tool_calls") + line
    for name, values in calls:
        pairs = (
            f"{tag('arg_key')}{key}{tag('/arg_key')}{line}{tag('arg_value')}{value}{tag('/arg_value')}{line}"
            for key, value in values.items()
        )
        text += f"{tag('tool_call')}{name}{tag('tool_sep')}{line}{''.join(pairs)}{tag('/tool_call')}{line}"
    return text + tag("/tool_calls")


def qwen(name: str, values: dict[str, str], line: str = "\n") -> str:
    pairs = (f"<parameter={k}>{line}{v}{line}</parameter>{line}" for k, v in values.items())
    return f"<tool_call>{line}<function={name}>{line}{''.join(pairs)}</function>{line}</tool_call>"


def written(form, *calls: tuple[str, dict[str, str]]) -> str:
    one = {GLM.name: glm, QWEN.name: qwen}.get(form.name)
    if one is not None:
        return "\n".join(one(*call) for call in calls)
    blocks = {HY.name: hy, MINIMAX.name: minimax, MINIMAX_M3.name: minimax_m3, DSML.name: dsml}
    return blocks[form.name](*calls)


def read(form, text: str, size: int = 1, names=None) -> tuple[str, list[tuple[str, dict]]]:
    parser = form.parser(lambda: "id", {"weather": PARAMETERS, "now": None} if names is None else names)
    found = [delta for i in range(0, len(text), size) for delta in parser.push(text[i : i + size])] + parser.finish()
    calls = [(d.call.name, json.loads(d.call.arguments)) for d in found if d.call]
    return "".join(d.content for d in found), calls


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("line", ["\n", ""])
def test_calls_of_glm(size, line):
    text = f"Let me look.\n{glm('weather', VALUES, line)}\n{glm('now', {}, line)}"
    assert read(GLM, text, size) == ("Let me look.", [("weather", EXPECTED), ("now", {})])


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("form", [MINIMAX, MINIMAX_M3, DSML], ids=lambda form: form.name)
def test_calls_that_are_invoked(form, size):
    text = "Let me look.\n" + written(form, ("weather", VALUES), ("now", {}))
    assert read(form, text, size) == ("Let me look.", [("weather", EXPECTED), ("now", {})])


@pytest.mark.parametrize("size", [1, 1000])
def test_tags_of_minimax_m3_lie_within_each_other(size):
    mark = "]<]minimax[>["
    inner = "".join(f"{mark}<item>{n}{mark}</item>" for n in ("7", "seven"))
    place = f"{mark}<street>Main </city> 5{mark}</street>{mark}<codes>{inner}{mark}</codes>"
    text = minimax_m3(("weather", {"city": "a ]<] b", "place": place}))
    expected = {"city": "a ]<] b", "place": {"street": "Main </city> 5", "codes": [7, "seven"]}}
    assert read(MINIMAX_M3, text, size) == ("", [("weather", expected)])


def test_a_parameter_that_says_it_is_a_text_is_one():
    values = 'name="{}" string="true">007</｜DSML｜parameter>'
    text = '<｜DSML｜function_calls><｜DSML｜invoke name="weather">'
    text += "".join(f"<｜DSML｜parameter {values.format(key)}" for key in ("city", "days"))
    text += '<｜DSML｜parameter name="any" string="false">no JSON</｜DSML｜parameter>'
    text += "</｜DSML｜invoke></｜DSML｜function_calls>"
    assert read(DSML, text) == ("", [("weather", {"city": "007", "days": "007", "any": "no JSON"})])


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("line", ["\n", ""])
def test_calls_of_hy3(size, line):
    text = "Let me look.\n" + hy(("weather", VALUES), ("now", {}), line=line)
    assert read(HY, text, size) == ("Let me look.", [("weather", EXPECTED), ("now", {})])
    unclosed = text.removesuffix("</tool_calls:toy>")
    assert read(HY, unclosed, size) == ("Let me look.", [("weather", EXPECTED), ("now", {})])


def test_tags_of_hy3_may_have_no_ending():
    form = tool_format("{{ tools }}<tool_calls><tool_call>name<tool_sep><arg_key>")
    assert read(form, hy(("weather", {"city": "Rome"}), end="")) == ("", [("weather", {"city": "Rome"})])
    assert reasoning_format("<think>", lambda text: None) == ReasoningFormat("<think>", "</think>")
    assert reasoning_format(OF_HY3, lambda text: None) == ReasoningFormat("<think:toy>", "</think:toy>")
    by_id = reasoning_format(OF_HY3, {"<think:toy>": 7, "</think:toy>": 8}.get)
    assert by_id == ReasoningFormat("<think:toy>", "</think:toy>", 7, 8)


@pytest.mark.parametrize(
    ("asked", "effort"),
    [(None, None), ("none", "no_think"), ("minimal", "low"), ("low", "low"), ("medium", "low"), ("max", "high")],
)
def test_efforts_are_those_that_the_template_of_hy3_knows(asked, effort):
    variables = in_words_of(OF_HY3, TemplateFields(reasoning_effort=asked).template_variables)
    assert variables.get("reasoning_effort") == effort
    text = ChatTemplate(OF_HY3, bos_token="", eos_token="").render([{"role": "user", "content": "Hi"}], **variables)
    assert text.endswith("<think:toy>") == (effort not in (None, "no_think"))
    switched = in_words_of(OF_HY3, {"thinking": False, "reasoning_effort": "high"})
    assert switched["reasoning_effort"] == "no_think"
    assert in_words_of("{{ reasoning_effort }}", {"reasoning_effort": "max"}) == {"reasoning_effort": "max"}


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("line", ["\n", ""])
def test_calls_of_qwen(size, line):
    text = f"Let me look.\n{qwen('weather', VALUES, line)}\n{qwen('now', {}, line)}"
    assert read(QWEN, text, size) == ("Let me look.", [("weather", EXPECTED), ("now", {})])


def test_words_of_python_are_values_where_these_are_asked_for():
    """As templates write them that put true through Jinja's `string`."""
    values = {"city": "True", "exact": "True", "maybe": "None", "any": "False"}
    expected = {"city": "True", "exact": True, "maybe": "None", "any": "False"}
    assert read(QWEN, qwen("weather", values))[1] == [("weather", expected)]


@pytest.mark.parametrize("form", [GLM, MINIMAX, MINIMAX_M3, QWEN, DSML], ids=lambda form: form.name)
def test_values_of_unknown_types_are_json_where_they_can_be(form):
    values = {"a": "7", "b": "seven", "c": '"7"', "d": "{}", "e": ""}
    text = written(form, ("weather", values))
    assert read(form, text, names={"weather": None})[1] == [
        ("weather", {"a": 7, "b": "seven", "c": "7", "d": {}, "e": ""})
    ]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (GLM, "<tool_call>{"),
        (GLM, "<tool_call>two words</tool_call>"),
        (GLM, "<tool_call>weather\n<arg_value>"),
        (GLM, "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>without an end"),
        (GLM, "<tool_call>other\n</tool_call>"),
        (HY, "<tool_calls:toy></tool_calls:toy>"),
        (HY, "<tool_calls:toy><tool_call:toy>weather</tool_call:toy>"),
        (HY, "<tool_calls:toy><tool_call:toy>weather<tool_sep:toy><arg_key:toy>city</arg_key:toy>no"),
        (HY, "<tool_calls>"),
        (MINIMAX, "<minimax:tool_call></minimax:tool_call>"),
        (MINIMAX, '<minimax:tool_call><invoke name="a b">'),
        (MINIMAX, '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Rome'),
        (MINIMAX, "a <minimal> b"),
        (MINIMAX_M3, "a ]<] b ]<]minimax[>[ c"),
        (MINIMAX_M3, "]<]minimax[>[<tool_call>]<]minimax[>[</tool_call>"),
        (MINIMAX_M3, ']<]minimax[>[<tool_call>]<]minimax[>[<invoke name="weather"><city>Rome</city>'),
        (MINIMAX_M3, minimax_m3(("weather", {"two words": "Rome"}))),
        (DSML, "<｜DSML｜function_calls></｜DSML｜function_calls>"),
        (DSML, '<｜DSML｜function_calls><｜DSML｜invoke name="weather"><parameter name="city">Rome'),
        (DSML, dsml(("other", {}))),
        (QWEN, '<tool_call>\n{"name": "weather"}</tool_call>'),
        (QWEN, "<tool_call>\n<function=two words>"),
        (QWEN, "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function> and more"),
        (QWEN, "<tool_call><function=other></function></tool_call>"),
    ],
)
def test_what_is_no_call_is_content(form, text):
    assert read(form, f"{text} and more") == (f"{text} and more", [])


def test_templates_tell_the_format():
    assert tool_format("{{ tools }} <tool_call>{name}<arg_key>") is GLM
    assert tool_format("{{ tools }} <minimax:tool_call>") is MINIMAX
    assert tool_format("<minimax:tool_call>") is None
    assert tool_format("{{ tools }} ]<]minimax[>[<tool_call>") is MINIMAX_M3
    assert tool_format("{{ tools }} <｜DSML｜function_calls>").marker == DSML.marker
    assert tool_format("{{ tools }} ｜DSML｜ tool_calls").marker == "<｜DSML｜tool_calls>", "of DeepSeek V4"
    assert tool_format("{{ tools }} <tool_call><function=name><parameter=key>") is QWEN


def matches(form, text: str, several: bool = True, tools=(WEATHER,)) -> bool:
    """Whether the grammar that demands a call takes a text as a whole."""
    llguidance = pytest.importorskip("llguidance")
    grammar = form.grammar(tools, "required", several, lambda text: None)
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


SIMPLE = {key: VALUES[key] for key in ("city", "days", "exact", "unit")}


@pytest.mark.parametrize("form", [GLM, MINIMAX, MINIMAX_M3, HY, QWEN, DSML], ids=lambda form: form.name)
def test_a_forced_call_is_one_that_is_read(form):
    def of(*values: dict[str, str]) -> str:
        return written(form, *(("weather", each) for each in values))

    simple = {**SIMPLE, "city": "New York"}
    assert matches(form, of(simple))
    assert matches(form, of({"city": "a < b"}))
    assert matches(form, of({"city": "x"}, {"city": "y"}))
    assert not matches(form, of({"city": "x"}, {"city": "y"}), several=False)
    assert not matches(form, of({"days": "3"}))  # a city is required
    assert not matches(form, of({"city": "x", "days": "three"}))
    assert not matches(form, of({"city": "x", "unit": "K"}))
    assert not matches(form, "Hello")
    assert read(form, of(simple))[1] == [("weather", {**{k: EXPECTED[k] for k in SIMPLE}, "city": "New York"})]


@pytest.mark.parametrize(
    ("form", "mark"),
    [(MINIMAX_M3, "]<]minimax[>["), (DSML, "｜DSML｜"), (GLM, "<arg_key>"), (MINIMAX, "</minimax:tool_call>")],
)
@pytest.mark.parametrize("is_token", [True, False])
def test_the_marks_of_a_forced_call_are_the_tokens_that_they_may_be(form, mark, is_token):
    pytest.importorskip("llguidance")
    tokenizer, grammars = tokenizer_with((mark,) if is_token else ())
    calls = [{"city": "New York [1] < 2", "days": "3"}, {"city": "", "unit": "F"}]
    text, size = written(form, *(("weather", values) for values in calls)), tokenizer.vocab_size + 20
    tokens = tokenizer.encode(text, add_bos=False)
    assert (tokenizer.token_id(mark) in tokens) == is_token
    constraint = grammars.constraint(form.grammar((WEATHER,), "required", True, grammars.token_id))
    for token in (*tokens, tokenizer.eos_token_ids[0]):
        wished = np.eye(1, size, token, dtype=np.float32)[0]
        assert np.argmax(constraint.masked(wished)) == token, tokenizer.decode([token])
        constraint.accept(token)
    assert constraint.finished


ASKS = {"type": "object", "properties": {"a-b": {"type": "string"}}}


def test_a_forced_call_in_python_is_one_that_is_read():
    form = LLAMA4_PYTHONIC
    call = '[weather(city="New York", days=3, exact=True, unit="C")]'
    assert matches(form, call)
    assert matches(form, '[weather(city="x"), weather(city="y", points=[{"a": "b"}])]')
    assert not matches(form, '[weather(city="x"), weather(city="y")]', several=False)
    assert not matches(form, "[weather(days=3)]")  # a city is required
    assert not matches(form, '[weather(city="x", days="three")]')
    assert read(form, call)[1] == [("weather", {"city": "New York", "days": 3, "exact": True, "unit": "C"})]
    free = {"properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": free}}]
    for text in ("[f()]", "[f(a=1)]", "[f(b=False)]", "[f(a=1, b=True)]"):
        assert matches(form, text, tools=tools), text
    with pytest.raises(UserError, match="'a-b' is no name"):
        form.grammar([{"type": "function", "function": {"name": "f", "parameters": ASKS}}], "required", True, {}.get)


@pytest.mark.parametrize("form", [GLM, MINIMAX, MINIMAX_M3, HY, QWEN, DSML], ids=lambda form: form.name)
def test_wherever_an_answer_ends_its_text_or_its_calls_are_left(form):
    text = written(form, ("weather", {"city": "Rome"}), ("now", {}))
    for end in range(1, len(text) + 1):
        content, calls = read(form, text[:end], size=7)
        assert content.strip() or calls, text[:end]


def test_a_text_that_may_be_left_out_is_a_text_without_quotation_marks():
    """As pydantic writes `str | None`."""
    optional = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    schema = {"type": "object", "properties": {"city": optional, "code": {"type": ["string", "null"]}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    text = glm("weather", {"city": "Rome", "code": "10115"})
    assert matches(GLM, text, tools=tools)
    assert read(GLM, text, names={"weather": schema})[1] == [("weather", {"city": "Rome", "code": "10115"})]
    nothing = glm("weather", {"city": "null", "code": "true"})
    assert read(GLM, nothing, names={"weather": schema})[1] == [("weather", {"city": None, "code": "true"})]


@pytest.mark.parametrize(
    "schema",
    [{"properties": None}, {"properties": [1]}, {"properties": {"a": {"enum": None}}},
     {"properties": {"a": {"anyOf": None}}}, {"properties": {"a": {"type": [{}]}}}, {"properties": {"a": True}}],
)  # fmt: skip
def test_odd_schemas_of_functions_make_no_difference_to_reading(schema):
    assert read(GLM, glm("f", {"a": "x"}), names={"f": schema}) == ("", [("f", {"a": "x"})])
