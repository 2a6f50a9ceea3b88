"""Items and events of the Responses API without a server: how they are made of a chat's, and how many are kept."""

import json
from typing import TYPE_CHECKING, Any

import pytest

from mpillama.openai.messages import Message
from mpillama.openai.responses import ITEM
from mpillama.server.responses_api_events import ResponseWriter

if TYPE_CHECKING:  # it imports what is compiled
    from mpillama.server.responses_api_store import ResponseStore

KIB = 1024
"""About the bytes of a small response."""


def entry(logprobs: list | None = None, **delta: Any) -> dict[str, Any]:
    """A `choices` entry of a chat's stream."""
    return {"index": 0, "delta": delta, "logprobs": {"content": logprobs} if logprobs else None, "finish_reason": None}


def call(index: int, arguments: str, name: str | None = None) -> dict[str, Any]:
    """A piece of a call, the first one with a name."""
    if name is None:
        return {"index": index, "function": {"arguments": arguments}}
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": f"call_{index}", "type": "function", "function": function}


def written(entries: list[dict[str, Any]], reason: str = "stop") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Events and the whole response."""
    writer = ResponseWriter({"id": "resp_1"})
    events = [*writer.begin()]
    for one in entries:
        events += writer.begin()
        events += writer.push(one)
    events += writer.end(reason, {})
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"] == writer.response
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == writer.response["output"]
    indices = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
    assert indices == list(range(len(done)))
    for event in events:
        if "item_id" in event:
            assert event["item_id"] == done[event["output_index"]]["id"]
    return events, writer.response


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


TEXT = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done"]  # fmt: skip
THOUGHT = [name.replace("output_text", "reasoning_text") for name in TEXT]
CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]


def test_thoughts_texts_and_calls_are_items_of_their_own():
    entries = [
        entry(role="assistant", content=""),
        entry(reasoning_content="hm", reasoning="hm"),
        entry(content="Let me see."),
        entry(tool_calls=[call(0, '{"a":', "f")]),
        entry(tool_calls=[call(0, "1}")]),
        entry(tool_calls=[call(1, "{}", "g")]),
        entry(),
    ]
    events, response = written(entries)
    second = [*CALL[:2], CALL[1], *CALL[2:]]
    assert kinds(events) == ["created", "in_progress", *THOUGHT, *TEXT, *second, *CALL, "completed"]
    thought, text, first, other = response["output"]
    assert (thought["type"], thought["content"][0]) == ("reasoning", {"type": "reasoning_text", "text": "hm"})
    assert text["content"][0]["text"] == "Let me see."
    assert (first["name"], first["call_id"], first["arguments"]) == ("f", "call_0", '{"a":1}')
    assert (other["name"], other["arguments"], other["status"]) == ("g", "{}", "completed")


def test_log_probabilities_of_parts_of_characters_wait_for_their_character():
    events, response = written([entry([{"token": "a"}], content=""), entry([{"token": "b"}], content="é"),
                                entry([{"token": "c"}], content="")])  # fmt: skip
    deltas = [event for event in events if event["type"].endswith("text.delta")]
    assert [(event["delta"], len(event["logprobs"])) for event in deltas] == [("é", 2), ("", 1)]
    assert len(response["output"][0]["content"][0]["logprobs"]) == 3


def test_log_probabilities_of_a_call_make_no_message():
    _, response = written([entry([{"token": "a"}], content=""), entry(tool_calls=[call(0, "{}", "f")])])
    assert [item["type"] for item in response["output"]] == ["function_call"]


def test_an_empty_answer_is_an_empty_message():
    events, response = written([entry(role="assistant", content="")])
    assert kinds(events) == ["created", "in_progress", *[name for name in TEXT if "delta" not in name], "completed"]
    assert response["output"][0]["content"][0]["text"] == ""


def test_an_answer_that_was_cut_is_incomplete():
    _, response = written([entry(reasoning_content="hm")], "length")
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [(item["type"], item["status"]) for item in response["output"]] == [("reasoning", "incomplete")]


def test_an_answer_that_fails_tells_what_there_was():
    writer = ResponseWriter({"id": "resp_1"})
    events = [*writer.begin(), *writer.push(entry(content="a")), *writer.fail("gone", "server_error")]
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "gone"}
    assert events[-1]["response"]["output"][0]["status"] == "incomplete"
    assert events[-1]["sequence_number"] == len(events) - 1


# -- items to messages ---------------------------------------------------------------------------------------------


def messages(*items: dict[str, Any], instructions: str | None = None) -> list[dict[str, Any]]:
    from mpillama.server.responses_api_chat import messages_of

    found = messages_of(instructions, [ITEM.validate_python(item) for item in items])
    assert all(isinstance(message, Message) for message in found)
    return [message.model_dump(exclude_none=True, exclude_defaults=True) for message in found]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


F = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
G = {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"}
THINKS = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
SAYS = {"role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]}
CALLS_F = {"id": "c1", "function": {"name": "f", "arguments": "{}"}}
CALLS_G = {"id": "c2", "function": {"name": "g", "arguments": "{}"}}


def test_what_an_assistant_thought_said_and_called_is_one_message():
    result = {"type": "function_call_output", "call_id": "c1", "output": "3"}
    assert messages(user("x"), THINKS, SAYS, F, G, result, SAYS) == [
        user("x"),
        {"role": "assistant", "content": "Yes.", "reasoning_content": "hm", "tool_calls": [CALLS_F, CALLS_G]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "assistant", "content": "Yes."},
    ]


def test_two_answers_in_a_row_stay_two_messages():
    assert messages(user("x"), SAYS, SAYS) == [user("x"), *[{"role": "assistant", "content": "Yes."}] * 2]


def test_thoughts_without_an_answer_are_left_out():
    assert messages(THINKS, user("x")) == [user("x")]
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}]}
    assert messages(summary, SAYS)[0]["reasoning_content"] == "short"
    assert messages({"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"}, SAYS) == messages(SAYS)


def test_instructions_and_the_first_system_message_are_one():
    system = {"role": "developer", "content": "b"}
    assert messages(system, user("x"), instructions="a") == [{"role": "system", "content": "a\n\nb"}, user("x")]
    assert messages(user("x"), system)[1] == {"role": "developer", "content": "b"}


# -- what is kept --------------------------------------------------------------------------------------------------


def store_of(most_bytes: int) -> "ResponseStore":
    from mpillama.server.responses_api_store import ResponseStore

    return ResponseStore(most_bytes)


def said(text: str) -> tuple[bytes, ...]:
    from mpillama.server.responses_api_store import kept_items

    return kept_items([ITEM.validate_python(user(text))])


def is_gone(store: "ResponseStore", name: str) -> bool:
    from mpillama.server.errors import Refused

    with pytest.raises(Refused, match=f"'{name}' is not kept") as refusal:
        store.chain("me", name)
    return refusal.value.status == 404


def response(name: str, previous: str | None = None, text: str = "") -> dict[str, Any]:
    output = [{"id": f"msg_{name}", "type": "message", "role": "assistant", "content": text}]
    return {"id": name, "previous_response_id": previous, "output": output}


def test_the_longest_unused_responses_go_first():
    store = store_of(4 * KIB)
    for name in "abc":
        store.put("me", response(name), ())
    store.get("me", "a")
    store.put("me", response("d"), ())
    assert store.bytes <= store.most_bytes
    assert store.get("me", "a").whole() == response("a")
    assert is_gone(store, "b")
    assert store.item("me", "msg_b") is None
    assert json.loads(store.item("me", "msg_d") or b"")["id"] == "msg_d"


def test_what_is_larger_than_all_is_not_kept():
    store = store_of(2 * KIB)
    store.put("me", response("a", text="x" * 3 * KIB), ())
    assert store.bytes == 0


def test_a_chain_needs_all_of_its_responses():
    store = store_of(100 * KIB)
    store.put("me", response("a"), said("1"))
    store.put("me", response("b", "a"), said("2"))
    assert [json.loads(kept.input[0])["content"] for kept in store.chain("me", "b")] == ["1", "2"]
    assert store.chain("me", None) == []
    store.delete("me", "a")
    with pytest.raises(Exception, match="'a' is not kept"):
        store.chain("me", "b")


def test_nobody_sees_what_others_have():
    store = store_of(100 * KIB)
    store.put("me", response("a"), ())
    assert store.item("you", "msg_a") is None
    with pytest.raises(Exception, match="'a' is not kept"):
        store.get("you", "a")
    assert store.get("me", "a").whole() == response("a")
