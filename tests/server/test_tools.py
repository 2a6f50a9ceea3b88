"""Tools end to end: a model whose template knows them must call them, in the form of OpenAI's API."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests import tiny_models as models
from tests.server.conftest import serving
from tests.system.mpi.launch import TIMEOUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 60)]

TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for message in messages %}{{ '<|' + message.role.replace('tool', 'user') + '|>' }}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}{% endfor %}<|assistant|>"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "maxLength": 8},
                "days": {"type": "integer", "minimum": 1, "maximum": 5},
            },
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
ASK = [{"role": "user", "content": "How is the weather?"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder: Path = tmp_path_factory.mktemp("tools")
    texts = {
        "tokenizer.json": models.toy_tokenizer(),
        "chat_template.jinja": TEMPLATE.encode(),
        "generation_config.json": json.dumps({"bos_token_id": models.BOS, "eos_token_id": [models.EOS]}).encode(),
    }
    models.write_random(folder / "caller.h5", models.TOY, "q8_0", texts)
    with serving(folder / "caller.h5", folder, 2) as served:
        yield served.client


def ask(client: openai.OpenAI, **fields):
    given = {"model": "caller", "messages": ASK, "tools": [WEATHER, CLOCK], "temperature": 1.0, "max_tokens": 400}
    return client.chat.completions.create(**{**given, **fields})


def check_weather(call) -> None:
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"place", "days"}
    assert 1 <= arguments["days"] <= 5


@pytest.mark.parametrize("seed", range(4))
def test_a_named_tool_is_called_once_with_fitting_arguments(client, seed):
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = ask(client, tool_choice=choice, seed=seed).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert call.id.startswith("call_")
    check_weather(call)


@pytest.mark.parametrize("seed", range(4))
def test_some_tool_is_called_if_required(client, seed):
    answer = ask(client, tool_choice="required", seed=seed, parallel_tool_calls=False).choices[0]
    (call,) = answer.message.tool_calls
    assert call.function.name in ("weather", "clock")
    if call.function.name == "weather":
        check_weather(call)


def test_a_stream_has_the_same_call(client):
    fields = {"tool_choice": {"type": "function", "function": {"name": "weather"}}, "seed": 3}
    whole = ask(client, **fields).choices[0].message.tool_calls[0].function
    pieces = [c.choices[0] for c in ask(client, stream=True, **fields)]
    calls = [call for piece in pieces for call in piece.delta.tool_calls or []]
    assert calls[0].index == 0
    assert calls[0].id.startswith("call_")
    assert calls[0].function.name == whole.name
    assert "".join(call.function.arguments for call in calls) == whole.arguments
    assert pieces[-1].finish_reason == "tool_calls"


def test_results_of_tools_go_back_into_the_conversation(client):
    """As the client sends them: the answer's own message, then a message of the role tool."""
    answer = ask(client, tool_choice="required", seed=1).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in answer.tool_calls]
    told = ask(client, messages=[*ASK, answer, *results], max_tokens=5)
    assert told.usage.prompt_tokens > ask(client, max_tokens=5).usage.prompt_tokens


def test_none_hides_the_tools_and_auto_lets_the_model_choose(client):
    assert (
        ask(client, tool_choice="none", max_tokens=5).usage.prompt_tokens
        < ask(client, max_tokens=5).usage.prompt_tokens
    )
    free = ask(client, tool_choice="auto", max_tokens=5, seed=2).choices[0]
    assert free.message.tool_calls is None


FORM = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {
            "type": "object",
            "properties": {"sunny": {"type": "boolean"}},
            "required": ["sunny"],
            "additionalProperties": False,
        },
    },
}
BEGIN_CALL = "<tool_call>"


def bias(client: openai.OpenAI, value: int) -> dict[str, int]:
    """For the tokens that begin a call: makes the model call, or not."""
    url = f"{client.base_url}".replace("/v1/", "/tokenize")
    found = httpx.post(url, json={"content": BEGIN_CALL, "add_special_tokens": False}, trust_env=False).json()
    return {str(found["tokens"][0]): value}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_with_a_format_the_answer_is_a_call_or_fits_it(client, seed, streams):
    """Which of both is the model's choice, unless the request makes it."""
    fields = {"response_format": FORM, "seed": seed, "stream": streams, "parallel_tool_calls": False}
    called = message_of(ask(client, logit_bias=bias(client, 100), **fields))
    assert called["calls"]
    assert called["reason"] == "tool_calls"
    assert called["content"] == ""
    said = message_of(ask(client, logit_bias=bias(client, -100), **fields))
    assert not said["calls"]
    assert said["reason"] == "stop"
    assert isinstance(json.loads(said["content"])["sunny"], bool)
    for choice in ("none", "auto", None):
        free = message_of(ask(client, tool_choice=choice, **fields))
        if not free["calls"]:
            assert set(json.loads(free["content"])) == {"sunny"}
        assert not (free["calls"] and choice == "none")
    assert message_of(ask(client, tool_choice="required", **fields))["calls"]


def message_of(answer) -> dict[str, Any]:
    """Content, number of calls and reason of the end, streamed or not."""
    if not isinstance(answer, openai.Stream):
        (choice,) = answer.choices
        calls = choice.message.tool_calls or []
        return {"content": choice.message.content or "", "calls": len(calls), "reason": choice.finish_reason}
    choices = [chunk.choices[0] for chunk in answer if chunk.choices]
    return {
        "content": "".join(choice.delta.content or "" for choice in choices),
        "calls": sum(bool(call.id) for choice in choices for call in choice.delta.tool_calls or []),
        "reason": choices[-1].finish_reason,
    }


@pytest.mark.parametrize("seed", range(3))
def test_only_the_tools_that_are_allowed_are_called(client, seed):
    named = {"type": "function", "function": {"name": "clock"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    answer = ask(client, tool_choice=choice, seed=seed, parallel_tool_calls=False).choices[0]
    (call,) = answer.message.tool_calls
    assert call.function.name == "clock"
    fields = {**choice["allowed_tools"], "mode": "auto"}
    free = ask(client, tool_choice={**choice, "allowed_tools": fields}, seed=seed, max_tokens=5)
    assert free.usage.prompt_tokens < ask(client, max_tokens=5).usage.prompt_tokens


def test_an_answer_with_calls_may_be_sent_back_as_it_came(client):
    answer = ask(client, tool_choice="required", seed=1).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in answer.tool_calls]
    counts = {
        ask(client, messages=[*ASK, given, *results], max_tokens=5).usage.prompt_tokens
        for given in (answer, answer.model_dump(), answer.model_dump(exclude_none=True))
    }
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, 400, "tool_choice"),
        ({"tool_choice": "sometimes"}, 400, "tool_choice"),
        ({"tools": [{"type": "retrieval"}]}, 400, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "bad name"}}]}, 400, "tools.0.function.name"),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "other"}}]},
                }
            },
            400,
            "tool_choice",
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
            400,
            "tool_choice.allowed_tools.tools",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}],
                "tool_choice": "required",
            },
            422,
            "tools",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(client, fields, status, param):
    with pytest.raises(openai.APIStatusError) as refusal:
        ask(client, **fields)
    assert (refusal.value.status_code, refusal.value.body["param"]) == (status, param), refusal.value.body
