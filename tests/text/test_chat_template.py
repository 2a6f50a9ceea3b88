"""Chat templates: the dialect of transformers, and what a bad or hostile template gets."""

import time
from datetime import datetime

import pytest

from mpillama.errors import UserError
from mpillama.text.chat_template import ChatTemplate

CHAT = """{{ bos_token }}
{% for message in messages %}
    {% if message['role'] == 'tool' %}
        {{ raise_exception('no tools here') }}
    {% endif %}
<{{ message['role'] }}>{{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<assistant>{% endif %}"""


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>")


def render(source: str, **variables) -> str:
    return template(source).render([{"role": "user", "content": " hi "}], **variables)


def test_conversation():
    messages = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "yes <b>"}]
    text = template(CHAT).render(messages, add_generation_prompt=False)
    # The blocks' own lines and indentation leave nothing behind; {{ }} keeps the line end after it.
    assert text == "<s>\n<user>hi</s>\n<assistant>yes <b></s>\n"
    assert template(CHAT).render(messages) == text + "<assistant>"


def test_variables_and_tools():
    assert render("{{ tools[0].name }}{{ date }}", tools=[{"name": "f"}], date="today") == "ftoday"
    assert render("{{ tools is none }}{{ documents is none }}{{ other is defined }}") == "TrueTrueFalse"


def test_tojson_is_plain_json():
    assert render("{{ x | tojson }}", x={"b": "é<&>'", "a": 1}) == '{"b": "é<&>\'", "a": 1}'
    assert render("{{ x | tojson(indent=2) }}", x=[1]) == "[\n  1\n]"


def test_content_is_not_escaped_for_html():
    assert render("{{ x }}", x="<a> & 'b'") == "<a> & 'b'"


def test_loop_controls_and_generation_block():
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("a{% generation %}b{{ messages|length }}{% endgeneration %}c") == "ab1c"


def test_strftime_now():
    before = datetime.now().strftime("%Y-%m-%d")
    assert before <= render("{{ strftime_now('%Y-%m-%d') }}") <= datetime.now().strftime("%Y-%m-%d")


def test_refusal_names_line_and_message():
    with pytest.raises(UserError, match=r"line 4: no tools here"):
        template(CHAT).render([{"role": "tool", "content": "x"}])


def test_refusal_within_a_macro_names_the_line_of_the_macro():
    source = "{% macro check(x) %}\n{{ raise_exception(x) }}\n{% endmacro %}\n\n{{ check('bad') }}"
    with pytest.raises(UserError, match=r"line 2: bad"):
        render(source)


@pytest.mark.parametrize("source", ["a\n{% if %}", "a\n{{ 'x }}", "a\n{% nonsense %}"])
def test_syntax_error_names_the_line(source):
    with pytest.raises(UserError, match=r"line 2: "):
        template(source)


@pytest.mark.parametrize(
    "source",
    ["{{ messages[0]['content'] + 1 }}", "{{ nothing.at.all }}", "{{ 1 // 0 }}", "{{ 'x'.index('y') }}"],
)
def test_failure_inside_is_the_users_to_mend(source):
    with pytest.raises(UserError, match=r"line 2: "):
        render("a\n" + source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ messages.append(1) }}",
        "{{ lipsum() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(999999999999999999999999) %}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 999999999 }}",
        "{{ 999999999 * [1] }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_hostile_template_ends_soon(source):
    start = time.process_time()
    with pytest.raises(UserError):
        render(source)
    assert time.process_time() - start < 2


def test_allowance_is_per_rendering():
    loop = template("{% for i in range(60000) %}{% endfor %}done")
    assert [loop.render([]), loop.render([])] == ["done", "done"]


def test_ordinary_multiplication_works():
    assert render("{{ 3 * 4 }}{{ '-' * 5 }}{{ ([1] * 2)|length }}") == "12-----2"
