"""Rows of a batch file: both forms, and everything that is wrong with a line is told and never more than that."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillama.batch import rows
from mpillama.batch.rows import Line, parse_row, read_lines, row_id
from mpillama.errors import UserError
from mpillama.openai.bodies import ChatBody, CompletionBody
from mpillama.openai.body import BadRequest


def line(fields: object) -> Line:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return Line(1, text, len(text))


MESSAGES = [{"role": "user", "content": "Hello"}]


def test_both_forms_are_read():
    openai = parse_row(
        line({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": MESSAGES}})
    )
    plain = parse_row(line({"id": "a", "messages": MESSAGES}))
    assert (openai.id, openai.url) == (plain.id, plain.url) == ("a", rows.CHAT_URL)
    assert openai.body == plain.body
    assert isinstance(openai.body, ChatBody)
    prompt = parse_row(line({"id": "b", "prompt": [1, 2], "max_tokens": 3, "stop": "x", "temperature": 1}))
    assert isinstance(prompt.body, CompletionBody)
    assert (prompt.url, prompt.body.stops, prompt.body.most_tokens) == (rows.COMPLETIONS_URL, ["x"], 3)


def test_content_may_come_in_parts():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    body = parse_row(line({"id": "a", "messages": [{"role": "developer", "content": parts}]})).body
    assert isinstance(body, ChatBody)
    assert body.messages[0].for_template() == {"role": "system", "content": "Hello"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (b"\x00\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        ([1], "no JSON object"),
        ({"prompt": "x"}, "id"),
        ({"id": 7, "prompt": "x"}, "id"),
        ({"id": "", "prompt": "x"}, "id"),
        ({"id": "a"}, "prompt or messages"),
        ({"id": "a", "prompt": "x", "messages": MESSAGES}, "prompt or messages"),
        ({"id": "a", "prompt": "x", "suffix": "y"}, "suffix: a text between"),
        ({"id": "a", "prompt": "x", "best_of": 2}, "best_of"),
        ({"id": "a", "prompt": "x", "logprobs": 1}, "logprobs: rows"),
        ({"id": "a", "prompt": ["x"]}, "prompt"),
        ({"id": "a", "messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format: rows"),
        ({"id": "a", "messages": MESSAGES, "tools": [{}]}, "tools: rows"),
        ({"id": "a", "messages": MESSAGES, "tool_choice": "required"}, "tool_choice"),
        ({"id": "a", "messages": MESSAGES, "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ({"id": "a", "prompt": "x", "max_tokens": -2}, "max_tokens"),
        ({"id": "a", "prompt": "x", "max_tokens": "9"}, "max_tokens"),
        ({"id": "a", "prompt": "x", "temperature": 3}, "temperature"),
        ({"id": "a", "prompt": "x", "n": 2}, "n"),
        ({"id": "a", "prompt": "x", "stream": True}, "stream"),
        ({"id": "a", "prompt": []}, "prompt"),
        ({"id": "a", "messages": []}, "messages"),
        ({"id": "a", "messages": [{"role": "king", "content": "x"}]}, "role"),
        ({"id": "a", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
        ({"custom_id": "a", "url": "/v1/images", "body": {}}, "url"),
        ({"custom_id": "a", "url": "/v1/completions", "method": "GET", "body": {"prompt": "x"}}, "method"),
        ({"custom_id": "a", "url": "/v1/completions"}, "body"),
        ({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x"}, "more": 1}, "more: unknown field"),
        (b'{"id": "\\ud800", "prompt": "x"}', "Unicode"),
        (b'{"id": "a", "prompt": "x", "temperature": NaN}', "temperature"),
    ],
)
def test_what_is_wrong_is_named(fields, words):
    with pytest.raises(BadRequest, match=words):
        parse_row(line(fields))


def test_fields_without_an_effect_are_taken_and_unknown_ones_are_named():
    harmless = {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "user": "u", "stream_options": None}
    row = parse_row(
        line({"id": "a", "messages": MESSAGES, **harmless, "response_format": {"type": "text"}, "tools": []})
    )
    assert row.body.unknown_fields() == []
    row = parse_row(line({"id": "a", "messages": [{**MESSAGES[0], "mood": 1}], "colour": 1, "size": None}))
    assert row.body.unknown_fields() == ["colour", "messages.0.mood"]


@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_a_bad_request(text):
    with suppress(BadRequest):
        parse_row(line(text))
    found = row_id(line(text))
    assert found is None or isinstance(found, str)


NAMES = st.sampled_from(["id", "custom_id", "body", "url", "prompt", "messages", "stop", "seed", "logit_bias"])
LEAVES = st.none() | st.booleans() | st.floats() | st.text()


@given(st.recursive(LEAVES, lambda values: st.lists(values) | st.dictionaries(NAMES, values)))
def test_no_json_does_worse_than_a_bad_request(value):
    with suppress(BadRequest):
        parse_row(line(value))


def test_lines_are_numbered_and_long_ones_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "MAX_LINE", 1000)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"id": "a"}\n\n  \n' + b"x" * 5000 + b'\n{"id": "b"}')
    found = list(read_lines(str(path)))
    assert [(entry.number, entry.text) for entry in found] == [(1, b'{"id": "a"}\n'), (4, None), (5, b'{"id": "b"}')]
    assert found[-1].end == path.stat().st_size
    with pytest.raises(BadRequest, match="longer than"):
        parse_row(found[1])


def test_a_missing_input_is_a_mistake(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        list(read_lines(str(tmp_path / "none")))
