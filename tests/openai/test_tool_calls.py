"""Calls of tools: what is a call in each format, that cuts do not matter, and grammars that force calls."""

import itertools
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import jsonschema_rs
import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mpillama.errors import UserError
from mpillama.openai.answer_formats import tool_format
from mpillama.openai.harmony import HARMONY
from mpillama.openai.invoked_calls import MINIMAX
from mpillama.openai.marked_calls import DEEPSEEK, DEEPSEEK_FENCED, KIMI
from mpillama.openai.object_calls import HERMES, LISTED, LLAMA3, MISTRAL, MISTRAL_ARGS
from mpillama.openai.pythonic_calls import LLAMA4, LLAMA4_PYTHONIC
from mpillama.openai.tagged_calls import GLM
from mpillama.openai.tool_calls import CallPiece, Delta, for_template, new_call_id
from mpillama.text.chat_template import ChatTemplate
from mpillama.text.constraint import Grammars
from mpillama.text.tokenizer import Tokenizer
from tests.text import vocabularies
from tests.tiny_models import toy_tokenizer

TEMPLATES = Path(__file__).parents[1] / "golden" / "chat_templates"
FORMATS = [HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, DEEPSEEK, DEEPSEEK_FENCED, KIMI, LISTED, LLAMA4]
formats = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)


def ids():
    counter = itertools.count()
    return lambda: f"call_{next(counter)}"


def read(form, pieces, names=None):
    """Content, and calls as (name, arguments, index, id), of an answer in pieces."""
    parser = form.parser(ids(), names)
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    assert parser.finish() == []
    assert all((delta.call is None) == bool(delta.content) for delta in deltas)
    return "".join(delta.content for delta in deltas), joined(deltas)


def joined(deltas):
    calls = {}
    for piece in (delta.call for delta in deltas if delta.call):
        name, arguments, call_id = calls.get(piece.index, (piece.name, "", piece.id))
        calls[piece.index] = (name, arguments + piece.arguments, call_id)
    assert list(calls) == list(range(len(calls)))
    for index, (name, _, call_id) in calls.items():
        assert call_id == f"call_{index}" or call_id.startswith(f"functions.{name}:")
    return [(name, arguments) for name, arguments, _ in calls.values()]


CALLS = [
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [("f", '{"a": 1}')]),
    (
        HERMES,
        'Let me see.\n\n<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>"}}\n</tool_call>\n'
        '<tool_call>{"arguments":{},"name":"g"}</tool_call>\n Done. ',
        "Let me see.Done. ",
        [("f", '{"a": "</tool_call>"}'), ("g", "{}")],
    ),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "}"}]}}', "", [("f", '{"a": [1, {"b": "}"}]}')]),
    (LLAMA3, '{"name": "f", "parameters": {"a": "x;y"}}', "", [("f", '{"a": "x;y"}')]),
    (LLAMA3, '\n {"type": "function", "name": "f", "parameters": {}} ', "", [("f", "{}")]),
    (LLAMA3, '<|python_tag|>{"name": "f", "parameters": {"a": 1.50}}', "", [("f", '{"a": 1.50}')]),
    (LLAMA3, 'I look. <|python_tag|>{"name": "f", "parameters": {}}', "I look.", [("f", "{}")]),
    (
        LLAMA3,
        '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"b": null}};',
        "",
        [("f", "{}"), ("g", '{"b": null}')],
    ),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": -1e5}}]', "", [("f", '{"a": -1e5}')]),
    (
        MISTRAL,
        'Yes: [TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abcdefghi"}, '
        '{"name":"g","arguments":{"ü":"\\u00e9"}}]',
        "Yes:",
        [("f", "{}"), ("g", '{"ü":"\\u00e9"}')],
    ),
    (MISTRAL_ARGS, '[TOOL_CALLS]get_x-1.y[ARGS]{"a": {}}', "", [("get_x-1.y", '{"a": {}}')]),
    (
        MISTRAL_ARGS,
        '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{}[TOOL_CALLS]g[ARGS] {"a":[]} bye',
        "bye",
        [("f", "{}"), ("g", '{"a":[]}')],
    ),
]
CALLS += [
    (LISTED, '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]', "", [("f", '{"a": 1}')]),
    (
        LISTED,
        'I look.\n<|tool_call|> [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"b": []}}]<|/tool_call|>',
        "I look.",
        [("f", "{}"), ("g", '{"b": []}')],
    ),
    (
        LLAMA4,
        '{"name": "f", "parameters": {}}{"name": "g", "parameters": {"b": 2}}',
        "",
        [("f", "{}"), ("g", '{"b": 2}')],
    ),
    (LLAMA4, 'So:<|python_start|>{"name": "f", "parameters": {}}<|python_end|>', "So:", [("f", "{}")]),
    (
        LLAMA4,
        '[f(a="x\\n\\"]", b=[1, -2.5, {"c": None}]), g()]',
        "",
        [("f", '{"a": "x\\n\\"]", "b": [1, -2.5, {"c": null}]}'), ("g", "{}")],
    ),
    (
        LLAMA4,
        "<|python_start|>[get.it(a='ü', b=True, c=false)]<|python_end|> ",
        "",
        [("get.it", '{"a": "ü", "b": true, "c": false}')],
    ),
]
D, K = "<｜tool▁{}｜>", "<|tool_{}|>"
DEEPSEEK_BEGIN, DEEPSEEK_END = D.format("calls▁begin"), D.format("calls▁end")
KIMI_BEGIN, KIMI_END = K.format("calls_section_begin"), K.format("calls_section_end")


def deepseek(name, arguments):
    return f"{D.format('call▁begin')}{name}{D.format('sep')}{arguments}{D.format('call▁end')}"


def fenced(name, arguments):
    return deepseek("function", f"{name}\n```json\n{arguments}\n```")


def kimi(call_id, arguments):
    return f"{K.format('call_begin')}{call_id}{K.format('call_argument_begin')}{arguments}{K.format('call_end')}"


CALLS += [
    (DEEPSEEK, DEEPSEEK_BEGIN + deepseek("f", '{"a": 1}') + DEEPSEEK_END, "", [("f", '{"a": 1}')]),
    (
        DEEPSEEK,
        f"I look.\n{DEEPSEEK_BEGIN}{deepseek('f', '{}')}{deepseek('g.h-1', '{}')}{DEEPSEEK_END} So.",
        "I look.So.",
        [("f", "{}"), ("g.h-1", "{}")],
    ),
    (
        DEEPSEEK_FENCED,
        DEEPSEEK_BEGIN + fenced("f", "{}") + "\n" + fenced("g", '{"b": [2]}') + DEEPSEEK_END,
        "",
        [("f", "{}"), ("g", '{"b": [2]}')],
    ),
    (DEEPSEEK_FENCED, DEEPSEEK_BEGIN + fenced("f", '{"a": "```"}'), "", [("f", '{"a": "```"}')]),
    (KIMI, KIMI_BEGIN + kimi("functions.f:0", '{"a": 1}') + KIMI_END, "", [("f", '{"a": 1}')]),
    (
        KIMI,
        f"Both: {KIMI_BEGIN} {kimi('functions.f:3', '{}')}{kimi(' functions.g.h:4 ', '{}')}{KIMI_END}",
        "Both:",
        [("f", "{}"), ("g.h", "{}")],
    ),
]

NO_CALLS = [
    (LISTED, '<|tool_call|>{"name": "f", "arguments": {}}'),
    (LISTED, "<|tool_call|>[]"),
    (LISTED, '<|tool_call|>[{"name": "f", "arguments": {}}] and more'),
    *(
        (LLAMA4, text)
        for text in ("[1, 2]", "[a link](https://a.b)", "[f(1)]", "[f(a=b)]", "[f(**{})]", "[f(a=1+2)]", "[]")
    ),
    *(
        (LLAMA4, text)
        for text in ("[f(a=1)] and more", "[f(a=1), {}]", "[f(a=1)", "[f(a=(1, 2))]", "[f(a='x\n')]", "[f(a=1e999)]")
    ),
    *(
        (LLAMA4, text)
        for text in (
            "[f(a={1: 2})]",
            "[f(a={[)]",
            "So [f(a=1)]",
            "<|python_start|>print(1)<|python_end|>",
            "[f(a='\\ud800')]",
        )
    ),
    (LLAMA4, "[f(a=" + "[" * 5000 + "]" * 5000 + ")]"),
    (DEEPSEEK, f"The mark {DEEPSEEK_BEGIN} alone, and {DEEPSEEK_BEGIN}{DEEPSEEK_END}"),
    (DEEPSEEK, DEEPSEEK_BEGIN + deepseek("f", "[]") + DEEPSEEK_END),
    (DEEPSEEK, DEEPSEEK_BEGIN + deepseek("no name", "{}") + DEEPSEEK_END),
    (DEEPSEEK, DEEPSEEK_BEGIN + deepseek("f" * 400, "{}") + DEEPSEEK_END),
    (DEEPSEEK_FENCED, DEEPSEEK_BEGIN + deepseek("function", "f\n{}") + DEEPSEEK_END),
    (KIMI, KIMI_BEGIN + kimi("functions.f", "{}") + KIMI_END),
    (KIMI, KIMI_BEGIN + kimi("functions.f:x", "{}") + KIMI_END),
    (KIMI, f"{KIMI_BEGIN}{KIMI_END} and {KIMI_BEGIN[:-3]}"),
    (HERMES, "The tag <tool_call> begins a call, <tool_call> {"),
    (HERMES, '<tool_call>{"name": "f", "arguments": "x"}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>'),
    (HERMES, '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {}}</tool'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "cut'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 01}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "\n"}}</tool_call>'),
    (HERMES, '{"name": "f", "arguments": {}}'),
    (HERMES, "  \n  "),
    (HERMES, " <"),
    (LLAMA3, '{"name": "f", "parameters": {}} and more'),
    (LLAMA3, 'So: {"name": "f", "parameters": {}}'),
    (LLAMA3, '{"name": "f", "parameters": {}}; no'),
    (LLAMA3, '{"answer": {"name": "f", "parameters": {}}}'),
    (LLAMA3, "<|python_tag|>print(1)"),
    (LLAMA3, "<|python_tag|>"),
    (LLAMA3, "{"),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {}}'),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {}},]'),
    (MISTRAL, "[TOOL_CALLS][]"),
    (MISTRAL, "a[0][1] = [TOOL_CALLS"),
    (MISTRAL_ARGS, "[TOOL_CALLS][ARGS]{}"),
    (MISTRAL_ARGS, "[TOOL_CALLS]f g[ARGS]{}"),
    (MISTRAL_ARGS, "[TOOL_CALLS]f[ARGS]5"),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CALLS)
def test_calls_are_found_however_the_text_is_cut(form, text, content, calls):
    assert read(form, [text]) == (content, calls)
    assert read(form, text) == (content, calls)
    for cut in range(len(text)):
        assert read(form, [text[:cut], text[cut:]]) == (content, calls)
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)


@pytest.mark.parametrize(("form", "text"), [(form, text) for form, text, *_ in CALLS])
def test_wherever_an_answer_ends_its_text_or_its_calls_are_left(form, text):
    for end in range(len(text) + 1):
        content, calls = read(form, [text[:end]])
        assert content or calls or not text[:end].strip()


@pytest.mark.parametrize(("form", "text"), NO_CALLS)
def test_what_is_no_call_is_content_to_the_last_character(form, text):
    assert read(form, [text]) == (text, [])
    assert read(form, text) == (text, [])


def test_a_broken_call_does_not_hide_the_next():
    broken, call = '<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>', '{"name": "g", "arguments": {}}'
    text = f"{broken}\n<tool_call>\n{call}\n</tool_call>"
    assert read(HERMES, text) == (broken, [("g", "{}")])


def test_functions_that_nobody_offered_are_content():
    text = '{"name": "Ann", "parameters": {"age": 5}}'
    assert read(LLAMA3, text, names={"f"}) == (text, [])
    assert read(LLAMA3, text, names={"Ann"}) == ("", [("Ann", '{"age": 5}')])


def test_content_is_not_held_longer_than_needed():
    parser = HERMES.parser(ids())
    assert parser.push("Hello ") == [Delta("Hello")]
    assert parser.push("<b> you") == [Delta(" <b> you")]
    assert parser.push(" <tool_") == []
    assert parser.push("call>\n") == []
    assert parser.push("no") == [Delta(" <tool_call>\nno")]
    parser = LLAMA3.parser(ids())
    assert parser.push('{"answer"') == [Delta('{"answer"')]


def test_content_and_calls_come_in_their_order():
    parser = HERMES.parser(ids())
    deltas = parser.push('a <tool_call>{"name": "f", "arguments": {}}</tool_call> b')
    assert deltas == [Delta("a"), Delta(call=CallPiece(0, "call_0", "f", "{}")), Delta("b")]
    assert deltas[0].fields() == {"content": "a"}
    function = {"name": "f", "arguments": "{}"}
    assert deltas[1].fields() == {
        "tool_calls": [{"index": 0, "id": "call_0", "type": "function", "function": function}]
    }
    later = Delta(call=CallPiece(0, None, None, "x"))
    assert later.fields() == {"tool_calls": [{"index": 0, "function": {"arguments": "x"}}]}


def test_ids_are_of_24_hex_digits():
    assert re.fullmatch(r"call_[0-9a-f]{24}", new_call_id())
    assert new_call_id() != new_call_id()


def test_depth_costs_no_recursion():
    arguments = '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}"
    assert read(LLAMA3, [f'{{"name": "f", "parameters": {arguments}}}']) == ("", [("f", arguments)])


PARTS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[", "]", "{", "}", ",",
    ";", '{"name": "f", "arguments": {"a": 1}}', '{"name": "g", "parameters": {}}', '"name"', ":", '"f"', "f", " ",
    "\n", "<", "tool", '"', "\\", "1", "é", '{"name": "f", "arguments": {"b": "<tool_call>[',
]  # fmt: skip


@formats
@given(parts=st.lists(st.sampled_from(PARTS), max_size=14), data=st.data())
@example(parts=["<tool_call>", '{"name": "f", "arguments": {"a": 1}}', "</tool_call>"], data=None)
@settings(max_examples=150, deadline=None)
def test_any_cut_gives_the_same_and_nothing_is_lost(form, parts, data):
    text = "".join(parts)
    whole = read(form, [text])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6))) if data else []
    assert read(form, [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]) == whole
    assert read(form, text) == whole
    content, calls = whole
    if not calls:
        assert content == text
    for name, arguments in calls:
        assert name in text
        assert arguments in text
        assert isinstance(json.loads(arguments), dict)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)
objects = st.dictionaries(st.text(max_size=5), json_values, max_size=4)


@formats
@given(
    calls=st.lists(st.tuples(st.sampled_from(["f", "get_it"]), objects), min_size=1, max_size=3), escaped=st.booleans()
)
@settings(max_examples=100, deadline=None)
def test_calls_come_back_as_they_were_written(form, calls, escaped):
    texts = [(name, json.dumps(arguments, ensure_ascii=escaped)) for name, arguments in calls]
    key = "parameters" if form in (LLAMA3, LLAMA4) else "arguments"
    found = [f'{{"name": "{name}", "{key}": {arguments}}}' for name, arguments in texts]
    written = {
        "hermes": "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in found),
        "llama3": "; ".join(found),
        "llama4": "".join(found),
        "listed": f"<|tool_call|>[{', '.join(found)}]",
        "mistral": f"[TOOL_CALLS][{', '.join(found)}]",
        "mistral-args": "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in texts),
        "deepseek": DEEPSEEK_BEGIN + "".join(deepseek(*call) for call in texts) + DEEPSEEK_END,
        "deepseek-fenced": DEEPSEEK_BEGIN + "\n".join(fenced(*call) for call in texts) + DEEPSEEK_END,
        "kimi": KIMI_BEGIN + "".join(kimi(f"functions.{n}:{i}", a) for i, (n, a) in enumerate(texts)) + KIMI_END,
    }[form.name]
    assert read(form, [written]) == ("", texts)


@given(text=st.text(st.sampled_from('{}[]:,"\\ \n0.-e1tru'), max_size=12))
@example(text='{"a":1,}')
@example(text='{"a":-}')
@settings(max_examples=400, deadline=None)
def test_the_reader_of_json_agrees_with_pythons(text):
    text = f'{{"name":"f","parameters":{{"k":{text}}}}}'
    try:
        json.loads(text, parse_constant=lambda name: pytest.fail(name))
        valid = True
    except ValueError:
        valid = False
    # Valid JSON may still have these two names a second time, with other values.
    content, calls = read(LLAMA3, [text])
    assert (content, calls) == (text, []) or valid
    if valid and text.count('"name"') == 1:
        assert json.loads(calls[0][1]) == json.loads(text)["parameters"]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("qwen3", HERMES), ("llama3", LLAMA3), ("mistral", MISTRAL), ("kimi", KIMI), ("granite", LISTED)),
        *(("llama4", LLAMA4_PYTHONIC), ("ministral3", MISTRAL_ARGS), ("glm", GLM), ("minimax", MINIMAX)),
        *(("harmony", HARMONY), ("gemma2", None), ("gemma3", None), ("olmo2", None)),
        ("deepseek_r1", replace(DEEPSEEK_FENCED, text_arguments=True)),
        *(("llama2", None), ("smollm", None), ("zephyr", None), ("deepseek", replace(DEEPSEEK, text_arguments=True))),
    ],
)
def test_formats_are_known_by_their_templates(name, form):
    assert tool_format((TEMPLATES / f"{name}.jinja").read_text()) == form


def test_other_formats_are_not_mistaken_for_known_ones():
    assert tool_format("{% if tools %}<tool_call><function=x>{% endif %}") is None
    fence = "{% if tools %}<｜tool▁calls▁begin｜>\n```json\n{{ call.arguments | tojson }}{% endif %}"
    assert tool_format(fence) == DEEPSEEK_FENCED
    assert tool_format("{# tools: <tool_call> #}{{ messages }}") is None
    assert tool_format("{% if tools %}[TOOL_CALLS]{{ name }}[ARGS]{% endif %}") is MISTRAL_ARGS


@pytest.mark.filterwarnings("error")
def test_what_python_would_warn_of_is_read():
    assert read(LLAMA4, [r'[f(pattern="\d+")]'])[1][0][:2] == ("f", r'{"pattern": "\\d+"}')


@pytest.mark.parametrize("name", ["qwen3", "llama3", "llama4", "mistral", "ministral3", "deepseek", "kimi", "granite"])
def test_what_a_template_writes_is_read_again(name):
    source = (TEMPLATES / f"{name}.jinja").read_text()
    form = tool_format(source)
    call = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": '{"a": ["é", 1]}'}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "functions.f:0", "content": "5"},
    ]
    template = ChatTemplate(source, bos_token="", eos_token="")
    text = template.render([form.for_template(message) for message in messages], tools=None)
    ways = (
        r"<tool_call>.*</tool_call>",
        r"<.tool_call.>\[.*?\}\}\]",
        r"\[TOOL_CALLS\]f\[ARGS\]\{.*?\}",
        r"\[TOOL_CALLS\].*?\}\]",
        r"\{\"name.*?\}\}",
        r"<.tool.calls.*calls.{0,9}end.>",
    )
    answer = re.search("|".join(ways), text, re.DOTALL)[0]
    assert read(form, answer) == ("", [("f", '{"a": ["é", 1]}')])
    assert "5" in text


@pytest.mark.parametrize("arguments", ["[1]", "{", '{"a": NaN}', "5", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_arguments_that_are_no_object_stay_as_they_are(arguments):
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    assert for_template(message) == message


def test_messages_are_changed_in_a_copy():
    message = {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": '{"a": 1}'}}, {}]}
    before = json.dumps(message)
    changed = for_template(message)
    assert changed["tool_calls"][0] == {"id": "x", "function": {"name": "f", "arguments": {"a": 1}}}
    assert json.dumps(message) == before
    assert for_template({"role": "user", "content": "x"}) == {"role": "user", "content": "x"}


def test_mistrals_ids_have_nine_characters_and_belong_together():
    asked = MISTRAL.for_template({"role": "assistant", "tool_calls": [{"id": "call_0"}, {"id": "abcdefghi"}]})
    told = MISTRAL.for_template({"role": "tool", "tool_call_id": "call_0", "content": ""})
    assert re.fullmatch("[0-9a-f]{9}", told["tool_call_id"])
    assert [call["id"] for call in asked["tool_calls"]] == [told["tool_call_id"], "abcdefghi"]


MARKERS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"]
MARKERS += [DEEPSEEK_BEGIN, D.format("call▁begin"), D.format("sep"), KIMI_BEGIN, K.format("call_end"), KIMI_END]
TOOLS = [
    {"type": "function", "function": {"name": "get", "description": "x", "parameters": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 14}},
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"city": {"enum": ["Köln", "京都", 'a"b']}},
    }}},
    {"type": "function", "function": {"name": "get_all", "parameters": {
        "properties": {"deep": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}}, "required": ["deep"],
        "additionalProperties": False,
    }}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip
VALID = {
    "get": jsonschema_rs.validator_for(TOOLS[0]["function"]["parameters"]),
    "get_all": jsonschema_rs.validator_for(TOOLS[1]["function"]["parameters"]),
    "now": jsonschema_rs.validator_for({"type": "object", "maxProperties": 0}),
}


@cache
def tokenizer_with(markers, pieces=False):
    """A tokenizer of bytes or pieces with markers as added tokens, half of them special, and its grammars."""
    given = vocabularies.sentencepiece().to_str().encode() if pieces else toy_tokenizer()
    source = tokenizers.Tokenizer.from_buffer(given)
    for index, marker in enumerate(markers):
        source.add_tokens([tokenizers.AddedToken(marker, special=index % 2 == 0, normalized=False)])
    tokenizer = Tokenizer(source.to_str().encode(), bos_token_id=0, eos_token_ids=(1, 3), add_bos=False)
    return tokenizer, Grammars(tokenizer, tokenizer.vocab_size + 20)


def say(tokenizer, constraint, seed, size):
    rng, said = np.random.default_rng(seed), []
    while not constraint.finished and len(said) < 3000:
        said.append(int(np.argmax(constraint.masked(rng.gumbel(size=size).astype(np.float32)))))
        constraint.accept(said[-1])
    assert constraint.finished
    ends = tokenizer.eos_token_ids
    return tokenizer.decode([token for token in said if token not in ends], skip_special=False)


@formats
@pytest.mark.parametrize("markers", [(), tuple(MARKERS), tuple(reversed(MARKERS))])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("pieces", [True, False])
def test_a_random_model_makes_valid_calls(form, markers, parallel, pieces):
    if pieces and form.name.startswith("deepseek"):
        pytest.skip("SentencePiece takes the \u2581 within these markers for a space, and cannot write them")
    tokenizer, grammars = tokenizer_with(markers, pieces)
    grammar = form.grammar(TOOLS, "required", parallel, grammars.token_id)
    grammars.check(grammar)
    counts, called = set(), set()
    for seed in range(40):
        text = say(tokenizer, grammars.constraint(grammar), seed, tokenizer.vocab_size + 20)
        content, calls = read(form, text, names=set(VALID))
        assert (content, bool(calls)) == ("", True), text
        assert all(VALID[name].is_valid(json.loads(arguments)) for name, arguments in calls), text
        counts.add(len(calls))
        called |= {name for name, _ in calls}
        if seed > 5 and called == set(VALID) and (max(counts) > 1) == parallel:
            break
    assert called == set(VALID)
    assert (max(counts) > 1) == parallel


@formats
def test_a_named_function_is_the_only_one(form):
    tokenizer, grammars = tokenizer_with(tuple(MARKERS))
    choice = {"type": "function", "function": {"name": "get"}}
    grammar = form.grammar(TOOLS, choice, False, grammars.token_id)
    text = say(tokenizer, grammars.constraint(grammar), 0, tokenizer.vocab_size + 20)
    assert [name for name, _ in read(form, text)[1]] == ["get"]


@formats
def test_the_usual_way_to_write_calls_is_allowed(form):
    tokenizer, grammars = tokenizer_with(tuple(MARKERS))
    one, two = '{"city": "Köln", "days": 3}', '{"deep": [true, false]}'
    key = "parameters" if form in (LLAMA3, LLAMA4) else "arguments"
    calls = [f'{{"name": "get", "{key}": {one}}}', f'{{"name": "get_all", "{key}": {two}}}']
    text = {
        "hermes": "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls),
        "llama3": "; ".join(calls),
        "llama4": "; ".join(calls),
        "listed": f"<|tool_call|>[{', '.join(calls)}]",
        "mistral": f'[TOOL_CALLS] [{calls[0][:-1]}, "id": "abcDEF123"}}, {calls[1]}]',
        "mistral-args": f"[TOOL_CALLS]get[ARGS]{one}[TOOL_CALLS]get_all[ARGS]{two}",
        "deepseek": DEEPSEEK_BEGIN + deepseek("get", one) + deepseek("get_all", two) + DEEPSEEK_END,
        "deepseek-fenced": f"{DEEPSEEK_BEGIN}{fenced('get', one)}\n{fenced('get_all', two)}{DEEPSEEK_END}",
        "kimi": KIMI_BEGIN + kimi("functions.get:0", one) + kimi("functions.get_all:1", two) + KIMI_END,
    }[form.name]
    constraint = grammars.constraint(form.grammar(TOOLS, "required", True, grammars.token_id))
    for token in tokenizer.encode(text, add_bos=False):
        assert np.isfinite(constraint.masked(np.zeros(tokenizer.vocab_size, np.float32))[token]), text
        constraint.accept(token)
    assert np.isfinite(constraint.masked(np.zeros(tokenizer.vocab_size, np.float32))[[1, 3]]).all()


@pytest.mark.parametrize("form", [HERMES, LLAMA3, MISTRAL])
def test_any_name_can_be_called(form):
    tokenizer, grammars = tokenizer_with(())
    tools = [{"type": "function", "function": {"name": 'a"\\/\n{%é🦙\u2028'}}]
    text = say(tokenizer, grammars.constraint(form.grammar(tools, "required", False, grammars.token_id)), 0, 400)
    assert [name for name, _ in read(form, text)[1]] == [tools[0]["function"]["name"]]


@formats
def test_nothing_is_forced_where_nothing_is_demanded(form):
    assert form.grammar(TOOLS, "auto", True, lambda text: None) is None
    assert form.grammar(TOOLS, "none", True, lambda text: None) is None


@formats
def test_wrong_choices_and_parameters_are_refused_by_name(form):
    with pytest.raises(UserError, match="tool_choice"):
        form.grammar(TOOLS, {"type": "function", "function": {"name": "nothing"}}, True, lambda text: None)
    with pytest.raises(UserError, match="tool_choice"):
        form.grammar([], "required", True, lambda text: None)
    wrong = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": 3}}}}
    with pytest.raises(UserError, match=r"'f'.*wrong at /properties/a"):
        form.grammar([wrong], "required", True, lambda text: None)
    wrong = {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}
    with pytest.raises(UserError, match="'f' must be of the type 'object'"):
        form.grammar([wrong], "required", True, lambda text: None)
