"""The Responses API with OpenAI's own client: whole answers, events in their order, and what is kept between them."""

import json
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.server.conftest import Served, serving
from tests.server.tooled import write_tooled
from tests.system.mpi.launch import TIMEOUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 60)]

EVENT: TypeAdapter = TypeAdapter(ResponseStreamEvent)
GREEDY = {"model": "tooled", "temperature": 0, "max_output_tokens": 12}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "name": "weather", "description": "Tell it.", "parameters": CITY, "strict": True}
CLOCK = {"type": "function", "name": "clock", "parameters": {"type": "object", "properties": {}}}


class Place(BaseModel):
    """What is asked for in JSON."""

    is_warm: bool


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("responses")
    with serving(write_tooled(folder / "tooled.h5"), folder, 2) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return server.client


def respond(client: openai.OpenAI, given="Tell me a story.", **fields):
    return client.responses.create(**{**GREEDY, "input": given, **fields})


def called(client: openai.OpenAI, **fields):
    """A response that is a call of the weather."""
    choice = {"type": "function", "name": "weather"}
    more = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "max_output_tokens": 400, **fields}
    return respond(client, "How is the weather?", **more)


# -- whole answers -------------------------------------------------------------------------------------------------


def test_a_response_says_what_a_chat_says(client):
    found = respond(client, instructions="Be brief.", metadata={"who": "me"})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me a story."}]
    chat = client.chat.completions.create(model="tooled", temperature=0, max_tokens=12, messages=messages)
    assert found.output_text == chat.choices[0].message.content
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.usage.input_tokens == chat.usage.prompt_tokens
    assert found.usage.output_tokens == 12
    assert found.usage.total_tokens == found.usage.input_tokens + 12
    assert found.usage.output_tokens_details.reasoning_tokens == 0
    assert (found.metadata, found.instructions, found.temperature) == ({"who": "me"}, "Be brief.", 0)
    assert found.id.startswith("resp_")
    (message,) = found.output
    assert (message.id[:4], message.role, message.status) == ("msg_", "assistant", "incomplete")


def test_a_response_has_every_field_that_the_client_s_types_demand(server):
    with server.http() as http:
        for body in ({**GREEDY, "input": "x"}, {**GREEDY, "input": "x", "tools": [CLOCK], "tool_choice": "required"}):
            Response.model_validate(http.post("/v1/responses", json=body).raise_for_status().json())


def test_items_of_every_form_are_a_conversation(client):
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Tell me"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "???"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "No.", "annotations": []}], "id": "msg_1"},
        {"role": "user", "content": "Please."},
    ]
    chat = client.chat.completions.create(
        model="tooled", temperature=0, max_tokens=12,
        messages=[
            {"role": "system", "content": "Be brief.\n\nBe kind."}, {"role": "user", "content": "Tell me"},
            {"role": "assistant", "content": "No."}, {"role": "user", "content": "Please."},
        ],
    )  # fmt: skip
    found = respond(client, items, instructions="Be brief.")
    assert found.output_text == chat.choices[0].message.content
    assert found.usage.input_tokens == chat.usage.prompt_tokens


def test_fields_of_other_servers_and_of_no_effect_are_taken(client):
    fields = {
        "service_tier": "auto", "safety_identifier": "s", "prompt_cache_key": "k", "user": "u", "truncation": "auto",
        "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low", "summary": "auto"},
        "max_tool_calls": 3, "text": {"verbosity": "low"}, "background": False, "metadata": None, "store": None,
        "tool_choice": "auto", "tools": [], "stream": None, "top_logprobs": 0,
    }  # fmt: skip
    assert respond(client, **fields).output_text == respond(client).output_text
    raw = client.responses.with_raw_response.create(**GREEDY, input="x", extra_body={"colour": "red"})
    assert raw.headers["x-mpillama-ignored"] == "colour"


def test_log_probabilities_come_if_they_are_included(client):
    found = respond(client, include=["message.output_text.logprobs"], top_logprobs=3)
    logprobs = found.output[0].content[0].logprobs
    assert len(logprobs) == 12
    assert all(len(one.top_logprobs) == 3 and one.top_logprobs[0].logprob == one.logprob for one in logprobs)
    assert respond(client).output[0].content[0].logprobs == []


def test_json_is_forced_and_parsed(client):
    fields = {"temperature": 1.0, "max_output_tokens": 400}
    found = client.responses.parse(model="tooled", input="x", text_format=Place, **fields)
    assert isinstance(found.output_parsed.is_warm, bool)
    assert found.text.format.name == "Place"
    with client.responses.stream(model="tooled", input="x", text_format=Place, **fields) as stream:
        stream.until_done()
    assert isinstance(stream.get_final_response().output_parsed.is_warm, bool)
    free = respond(client, text={"format": {"type": "json_object"}}, extra_body={"seed": 1}, max_output_tokens=40)
    assert free.output_text.lstrip().startswith("{")


def test_input_tokens_are_counted_without_an_answer(client):
    assert client.responses.input_tokens.count(model="tooled", input="x").input_tokens == (
        respond(client, "x").usage.input_tokens
    )


# -- tools ---------------------------------------------------------------------------------------------------------


def test_a_named_function_is_called(client):
    found = called(client)
    (call,) = found.output
    assert (call.type, call.name, call.status, found.status) == ("function_call", "weather", "completed", "completed")
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    assert call.call_id != call.id


def test_only_allowed_functions_are_called(client):
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    for seed in range(3):
        more = {"temperature": 1.0, "parallel_tool_calls": False}
        found = called(client, tool_choice=choice, extra_body={"seed": seed}, **more)
        assert {item.name for item in found.output} == {"weather"}


def test_one_call_only_if_parallel_calls_are_not_wanted(client):
    found = called(client, tool_choice="required", parallel_tool_calls=False)
    assert len(found.output) == 1
    assert found.parallel_tool_calls is False


def test_results_go_back_with_all_items_or_with_the_response_s_id(client):
    first = called(client)
    result = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "sunny"}
    asked = [{"role": "user", "content": "How is the weather?"}]
    tools = {"tools": [WEATHER, CLOCK]}
    whole = respond(client, [*asked, *first.output, result], store=False, **tools)
    reference = {"type": "item_reference", "id": first.output[0].id}
    referred = respond(client, [*asked, reference, result], **tools)
    kept = respond(client, [result], previous_response_id=first.id, **tools)
    assert whole.output_text == referred.output_text == kept.output_text
    assert whole.usage.input_tokens == referred.usage.input_tokens == kept.usage.input_tokens
    assert whole.usage.input_tokens > first.usage.input_tokens
    parts = {**result, "output": [{"type": "input_text", "text": "sunny"}]}
    assert respond(client, [parts], previous_response_id=first.id, **tools).output_text == kept.output_text


# -- events --------------------------------------------------------------------------------------------------------


def events_of(server: Served, **fields) -> list[dict]:
    """The events of a stream, each as the client's types want it."""
    with server.http() as http:
        answer = http.post("/v1/responses", json={**GREEDY, "stream": True, **fields}).raise_for_status()
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        EVENT.validate_python(found[-1])
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def names_of(events: list[dict]) -> list[str]:
    """Their types, runs of deltas as one."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for i, name in enumerate(names) if not name.endswith("delta") or names[i - 1] != name]


def test_the_events_of_a_text_are_in_order_and_add_up(server, client):
    events = events_of(server, input="Tell me a story.", include=["message.output_text.logprobs"])
    assert names_of(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    text = "".join(event["delta"] for event in deltas)
    assert text == events[-4]["text"] == events[-3]["part"]["text"] == respond(client).output_text
    assert sum(len(event["logprobs"]) for event in deltas) == len(events[-4]["logprobs"]) == 12
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert events[0]["response"]["id"] == events[-1]["response"]["id"]
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1


def test_the_events_of_a_call_are_in_order_and_add_up(server):
    choice = {"type": "function", "name": "weather"}
    events = events_of(server, input="?", tools=[WEATHER], tool_choice=choice, max_output_tokens=400)
    assert names_of(events) == [
        "created", "in_progress", "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    assert events[2]["item"]["arguments"] == ""
    deltas = "".join(event["delta"] for event in events if event["type"].endswith("arguments.delta"))
    assert deltas == events[-3]["arguments"] == events[-2]["item"]["arguments"]
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    assert events[-1]["response"]["usage"]["output_tokens"] > 0


def test_the_client_s_stream_ends_with_the_whole_response(client):
    with client.responses.stream(**GREEDY | {"max_output_tokens": 400}, input="?", tools=[WEATHER],
                                 tool_choice="required", parallel_tool_calls=False) as stream:  # fmt: skip
        kinds = [event.type for event in stream]
    final = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert final.output[0].name == "weather"
    assert client.responses.retrieve(final.id).output[0].arguments == final.output[0].arguments


# -- what is kept --------------------------------------------------------------------------------------------------


def test_a_conversation_goes_on_from_a_response(client):
    first = respond(client, "Tell me a story.", instructions="Be brief.")
    second = respond(client, "More.", previous_response_id=first.id)
    third = respond(client, "Still more.", previous_response_id=second.id)
    items = [
        {"role": "user", "content": "Tell me a story."}, *first.output, {"role": "user", "content": "More."},
        *second.output, {"role": "user", "content": "Still more."},
    ]  # fmt: skip
    alone = respond(client, items)
    assert third.output_text == alone.output_text
    assert third.usage.input_tokens == alone.usage.input_tokens  # the first one's instructions do not go on
    assert third.previous_response_id == second.id


def test_a_response_is_kept_listed_and_forgotten(client):
    found = respond(client, [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}])
    again = client.responses.retrieve(found.id)
    assert again.model_dump() == found.model_dump()
    items = list(client.responses.input_items.list(found.id, order="asc", limit=1))
    assert [item.content[0].text if isinstance(item.content, list) else item.content for item in items] == [
        "one", "two",
    ]  # fmt: skip
    newest = client.responses.input_items.list(found.id).data
    assert [item.id for item in newest] == [item.id for item in items][::-1]
    client.responses.delete(found.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(found.id)
    with pytest.raises(openai.NotFoundError) as refusal:
        respond(client, "x", previous_response_id=found.id)
    assert refusal.value.code == "previous_response_not_found"


def test_a_response_that_must_not_be_kept_is_not(client):
    found = respond(client, store=False)
    assert found.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(found.id)


def test_a_response_is_found_with_its_own_key_only(server, client):
    found = respond(client)
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="another", max_retries=0)
    with pytest.raises(openai.NotFoundError):
        other.responses.retrieve(found.id)
    with pytest.raises(openai.NotFoundError):
        respond(other, "More.", previous_response_id=found.id)


# -- refusals ------------------------------------------------------------------------------------------------------


IMAGE = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]
FILE = [{"role": "user", "content": [{"type": "input_text", "text": "x"}, {"type": "input_file", "file_id": "f"}]}]
NEVER = {"type": "object", "properties": {"a": {"type": "nonsense"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"tools": [{"type": "web_search"}]}, 400, "tools.0", "web_search"),
        ({"tools": [CLOCK, {"type": "mcp", "server_label": "s"}]}, 400, "tools.1", "mcp"),
        ({"tools": [{"type": "custom", "name": "c"}]}, 400, "tools.0", "custom"),
        ({"tools": [CLOCK], "tool_choice": {"type": "file_search"}}, 400, "tool_choice", "file_search"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "name": "no"}}, 400, "tool_choice", "'no'"),
        ({"tool_choice": "required"}, 400, "tool_choice", "needs tools"),
        ({"input": IMAGE}, 400, "input.0.content.0", "input_image"),
        ({"input": FILE}, 400, "input.0.content.1", "input_file"),
        ({"input": [{"type": "web_search_call", "id": "w", "status": "completed"}]}, 400, "input.0", "web_search_call"),
        ({"input": [{"type": "item_reference", "id": "msg_0"}]}, 400, "input.0", "msg_0"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, 400, "input.0.call_id", "required"),
        ({"input": 3}, 400, "input", "string"),
        ({"input": None}, 400, "input", "no message"),
        ({"input": []}, 400, "input", "no message"),
        ({"conversation": "conv_1"}, 400, "conversation", "previous_response_id"),
        ({"background": True}, 400, "background", "background"),
        ({"prompt": {"id": "pmpt_1"}}, 400, "prompt", "instructions"),
        ({"max_output_tokens": -5}, 400, "max_output_tokens", ""),
        ({"temperature": 3}, 400, "temperature", "2"),
        ({"metadata": {"a": 1}}, 400, "metadata.a", "string"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": NEVER}}}, 422, "text.format", "nonsense"),
        ({"input": "x" * 2_000_000}, 400, "input", "input: "),
        ({"model": "gpt-4o"}, 404, "model", "gpt-4o"),
        ({"previous_response_id": "resp_0"}, 404, "previous_response_id", "resp_0"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_refused_by_name(server, fields, status, param, says, stream):
    with server.http() as http:
        answer = http.post("/v1/responses", json={"input": "x", "max_output_tokens": 4, "stream": stream, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert says in error["message"]


def test_kept_responses_have_few_ways_to_be_asked_for(server):
    with server.http() as http:
        name = http.post("/v1/responses", json={"input": "x", "max_output_tokens": 1}).json()["id"]
        for query, place in (("?stream=true", "stream"), ("/input_items?limit=0", "limit"),
                             ("/input_items?after=msg_0", "after"), ("/input_items?order=up", "order")):  # fmt: skip
            answer = http.get(f"/v1/responses/{name}{query}")
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, place)
        assert http.get("/v1/responses/resp_0").status_code == 404
        assert http.delete("/v1/responses/resp_0").status_code == 404


# -- the same paths without /v1 ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
        ("/completions", {"prompt": "x", "max_tokens": 1}),
        ("/embeddings", {"input": "x"}),
        ("/responses", {"input": "x", "max_output_tokens": 1}),
        ("/models", None),
        ("/models/tooled", None),
    ],
)
def test_openai_s_paths_are_found_without_v1(server, path, body):
    with server.http() as http:
        assert (http.get(path) if body is None else http.post(path, json=body)).status_code == 200
        document: dict = http.get("/openapi.json").json()
    assert path.replace("tooled", "{name}") not in document["paths"]
    assert httpx.get(f"{server.url}/responses/resp_0", trust_env=False).status_code == 404
