"""Whatever OpenAI's clients may send is taken: with its effect, without one where that does no harm, or not at all."""

import json
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai.types.chat import completion_create_params as chat_params
from openai.types.completion_create_params import CompletionCreateParamsBase
from openai.types.embedding_create_params import EmbeddingCreateParams

from tests.server.conftest import Served
from tests.system.mpi.launch import TIMEOUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 60)]

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
STORY = [{"role": "user", "content": "Tell me a story."}]
GREEDY = {"temperature": 0, "max_tokens": 8}
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {**GREEDY, "messages": STORY},
    COMPLETIONS: {**GREEDY, "prompt": "Once upon"},
    EMBEDDINGS: {"input": "a llama"},
    "/tokenize": {"content": "a llama"},
    "/detokenize": {"tokens": [5]},
}
OPENAI_FIELDS = {
    CHAT: {*chat_params.CompletionCreateParamsBase.__annotations__, "stream"},
    COMPLETIONS: {*CompletionCreateParamsBase.__annotations__, "stream"},
    EMBEDDINGS: set(EmbeddingCreateParams.__annotations__),
}
TOLD = "x-mpillama-ignored"


@pytest.fixture(scope="module")
def http(served: Served):
    with served.http() as client:
        yield client


def ask(http: httpx.Client, path: str, **fields: Any) -> httpx.Response:
    return http.post(path, json={**GOOD[path], **fields})


def said(answer: httpx.Response) -> Any:
    """What an answer says, without what differs between two equal ones."""
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return found.get("choices") or found.get("data") or found


# -- OpenAI's fields --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", list(OPENAI_FIELDS))
def test_null_is_never_refused(http: httpx.Client, path: str):
    """Each field alone, and all that may be left out together."""
    required = {"messages", "prompt", "input"}
    assert len(OPENAI_FIELDS[path]) >= 5
    nulls: dict[str, None] = dict.fromkeys(sorted(OPENAI_FIELDS[path] - required - set(GREEDY)))
    for name in nulls:
        answer = ask(http, path, **{name: None})
        assert said(answer) == said(ask(http, path)), name
        assert TOLD not in answer.headers
    assert said(ask(http, path, **nulls)) == said(ask(http, path))


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"store": True, "metadata": {"a": "b"}, "service_tier": "flex", "user": "u", "safety_identifier": "s"}),
        (CHAT, {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "auto"}}),
        (CHAT, {"verbosity": "low", "modalities": ["text"], "audio": {"voice": "alloy", "format": "wav"}}),
        (CHAT, {"prediction": {"type": "content", "content": "Once"}, "reasoning_effort": "low"}),
        (CHAT, {"stream_options": {"include_usage": True, "include_obfuscation": False}}),
        (CHAT, {"tool_choice": "auto", "tools": [], "functions": [], "function_call": "none"}),
        (CHAT, {"parallel_tool_calls": True, "top_logprobs": 0, "seed": 7, "top_k": -1, "model": ""}),
        (COMPLETIONS, {"suffix": "", "best_of": 1, "user": "u", "stream_options": {"include_usage": True}}),
        (EMBEDDINGS, {"user": "u"}),
    ],
)  # fmt: skip
def test_what_has_no_effect_does_no_harm(http: httpx.Client, path: str, fields: dict[str, Any]):
    answer = ask(http, path, **fields)
    assert said(answer) == said(ask(http, path))
    assert TOLD not in answer.headers


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"web_search_options": {}}, "web_search_options"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions"),
        (CHAT, {"function_call": {"name": "f"}}, "function_call"),
        (CHAT, {"moderation": {"model": "omni-moderation-latest"}}, "moderation"),
        (CHAT, {"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages.0.audio"),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        (CHAT, {"continue_final_message": True}, "continue_final_message"),
        (COMPLETIONS, {"suffix": "the end"}, "suffix"),
        (COMPLETIONS, {"best_of": 3, "n": 2}, "best_of"),
        (EMBEDDINGS, {"dimensions": 1_000_000}, "dimensions"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_s_meaning_is_refused_by_name(
    http: httpx.Client, path: str, fields: dict[str, Any], param: str
):
    answer = ask(http, path, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["message"].startswith(f"{param}: ")


# -- fields that nobody knows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", list(GOOD))
def test_an_unknown_field_is_told_in_a_header(http: httpx.Client, path: str):
    answer = ask(http, path, colour="red", nothing=None)
    assert answer.headers[TOLD] == "colour"
    assert said(answer) == said(ask(http, path))


def test_unknown_fields_inside_of_others_are_told_with_their_place(http: httpx.Client):
    messages = [{**STORY[0], "mood": 1}, {"role": "user", "content": [{"type": "text", "text": "Go", "size": 2}]}]
    answer = ask(http, CHAT, messages=messages, stream=True, stream_options={"extra": 1})
    assert answer.headers[TOLD] == "messages.0.mood, messages.1.content.0.size, stream_options.extra"
    assert answer.text.endswith("data: [DONE]\n\n")


def test_a_strangers_name_cannot_write_a_header(http: httpx.Client):
    names = ["a\r\nSet-Cookie: x=y", "\ud800", "ü", "a, b", "n" * 10_000, ""]
    body = json.dumps({**GOOD[COMPLETIONS], **dict.fromkeys(names, 1)})
    answer = http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200
    assert "set-cookie" not in answer.headers
    assert len(answer.headers.get_list(TOLD)) == 1
    assert answer.headers[TOLD] == f'a%0D%0ASet-Cookie%3A%20x%3Dy, %ED%A0%80, %C3%BC, a%2C%20b, {"n" * 100}, ""'
    many = ask(http, COMPLETIONS, **{f"x{i}": 1 for i in range(9000)})
    assert len(many.headers[TOLD]) < 200


# -- answers that are sent back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave_out_nulls", [False, True])
def test_an_answer_may_be_sent_back_as_it_came(served: Served, leave_out_nulls: bool):
    client, messages = served.client, [*STORY]
    answer = client.chat.completions.create(model="demo", messages=messages, **GREEDY).choices[0].message
    given = answer.model_dump(exclude_none=leave_out_nulls)
    assert leave_out_nulls or given["annotations"] is None
    plain = [*messages, {"role": "assistant", "content": answer.content}, *STORY]
    expected = client.chat.completions.create(model="demo", messages=plain, **GREEDY)
    for sent in ([*messages, given, *STORY], [*messages, answer, *STORY]):
        found = client.chat.completions.create(model="demo", messages=sent, **GREEDY)
        assert found.choices == expected.choices
        assert found.usage.prompt_tokens == expected.usage.prompt_tokens


def test_a_refusal_that_is_sent_back_is_what_was_said(http: httpx.Client):
    def answer(**message: Any) -> Any:
        return said(ask(http, CHAT, messages=[*STORY, {"role": "assistant", **message}, *STORY]))

    expected = answer(content="I will not.")
    assert answer(content=None, refusal="I will not.", annotations=[]) == expected
    assert answer(content=[{"type": "refusal", "refusal": "I will not."}]) == expected


def test_the_older_form_of_calls_is_read(http: httpx.Client):
    older = [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "3"},
    ]
    newer = [
        {"role": "assistant", "tool_calls": [{"id": "call_f", "type": "function", "function": {"name": "f"}}]},
        {"role": "tool", "name": "f", "tool_call_id": "call_f", "content": "3"},
    ]
    found = [ask(http, "/tokenize", content=None, messages=[*STORY, *given]) for given in (older, newer)]
    assert said(found[0]) == said(found[1])


# -- fields of others -------------------------------------------------------------------------------------------------


def test_minus_one_is_no_limit_no_seed_and_all_tokens(http: httpx.Client):
    """As llama.cpp and vLLM understand it."""
    unlimited = ask(http, CHAT, max_tokens=-1).json()
    assert unlimited["choices"][0]["finish_reason"] == "stop"
    assert unlimited["usage"]["completion_tokens"] > 24
    assert ask(http, CHAT, max_completion_tokens=-1).json()["usage"] == unlimited["usage"]
    fields = {"temperature": 1.5, "max_tokens": 24}
    assert len({json.dumps(said(ask(http, CHAT, seed=-1, **fields))) for _ in range(6)}) > 1
    for seed in (-2, -(2**63), 2**63 - 1):
        assert said(ask(http, CHAT, seed=seed, **fields)) == said(ask(http, CHAT, seed=seed, **fields))
    assert ask(http, CHAT, max_tokens=-2).json()["error"]["param"] == "max_tokens"
    assert ask(http, CHAT, seed=2**63).json()["error"]["param"] == "seed"


def test_json_may_be_asked_for_without_a_name(http: httpx.Client):
    schema = {"type": "array", "items": {"enum": [7]}, "minItems": 2, "maxItems": 2}
    for form in ({"type": "json_schema", "json_schema": {"schema": schema}}, {"type": "json_object", "schema": schema}):
        (choice,) = said(ask(http, CHAT, response_format=form, max_tokens=60))
        assert json.loads(choice["message"]["content"]) == [7, 7]


@pytest.mark.parametrize("cut", [3, 10])
def test_a_message_is_continued(http: httpx.Client, cut: int):
    whole = said(ask(http, CHAT, max_tokens=24))[0]["message"]["content"]
    begun = said(ask(http, CHAT, max_tokens=cut))[0]["message"]["content"]
    messages = [*STORY, {"role": "assistant", "content": begun}]
    for generation_prompt in (None, False):
        fields = {"continue_final_message": True, "add_generation_prompt": generation_prompt}
        rest = ask(http, CHAT, messages=messages, max_tokens=24 - cut, **fields)
        assert begun + said(rest)[0]["message"]["content"] == whole
    both = ask(http, CHAT, messages=messages, continue_final_message=True, add_generation_prompt=True)
    assert both.json()["error"]["param"] == "continue_final_message"


def test_tokenize_knows_how_the_template_is_used(http: httpx.Client):
    def tokens(messages: Any, **fields: Any) -> list[int]:
        return list(said(ask(http, "/tokenize", content=None, messages=messages, **fields))["tokens"])

    whole, closed = tokens(STORY), tokens(STORY, add_generation_prompt=False)
    assert whole[: len(closed)] == closed != whole
    begun = [*STORY, {"role": "assistant", "content": "Once upon"}]
    told = ask(http, CHAT, messages=begun, continue_final_message=True, add_generation_prompt=False)
    assert told.json()["usage"]["prompt_tokens"] == len(tokens(begun, continue_final_message=True))


def test_an_assistant_may_speak_twice_and_last(http: httpx.Client):
    twice = [*STORY, {"role": "assistant", "content": "Once."}, {"role": "assistant", "content": "Twice."}]
    assert said(ask(http, CHAT, messages=twice))
    assert said(ask(http, CHAT, messages=[*twice, *STORY]))


# -- texts and ids ----------------------------------------------------------------------------------------------------


def ids_of(http: httpx.Client, text: str, **fields: Any) -> list[int]:
    return list(said(ask(http, "/tokenize", content=text, **fields))["tokens"])


def test_texts_and_ids_may_be_mixed(http: httpx.Client):
    ids, more = ids_of(http, "Once upon"), ids_of(http, " a time", add_special_tokens=False)
    one = said(ask(http, COMPLETIONS, prompt=ids + more))
    assert said(ask(http, COMPLETIONS, prompt=[*ids, " a time"])) == one
    assert said(ask(http, COMPLETIONS, prompt=["Once upon", *more])) == one
    two = said(ask(http, COMPLETIONS, prompt=[ids + more, "Once upon"]))
    assert [choice["text"] for choice in two] == [one[0]["text"], said(ask(http, COMPLETIONS))[0]["text"]]
    assert [c["text"] for c in said(ask(http, COMPLETIONS, prompt=["Once upon", [*ids, " a time"]]))] == [
        two[1]["text"], two[0]["text"],
    ]  # fmt: skip
    for wrong in ([[]], [["a", "b"]], [1.5], [True], [-1, "a"], [None], [["a", [1]]], []):
        assert ask(http, COMPLETIONS, prompt=wrong).status_code == 400, wrong


def test_texts_and_ids_are_embedded_alike(http: httpx.Client):
    ids, more = ids_of(http, "a llama"), ids_of(http, " sings", add_special_tokens=False)
    expected = [said(ask(http, EMBEDDINGS, input=one))[0]["embedding"] for one in ("a llama", ids + more)]
    found = said(ask(http, EMBEDDINGS, input=["a llama", [*ids, " sings"], ids, [*ids, *more]]))
    vectors = [entry["embedding"] for entry in found]
    np.testing.assert_allclose(vectors, [expected[0], expected[1], expected[0], expected[1]], atol=1e-6)


def test_nothing_is_the_beginning_of_a_text(http: httpx.Client):
    """Also as a prompt that is null."""
    assert said(ask(http, COMPLETIONS, prompt="")) == said(ask(http, COMPLETIONS, prompt=None))
    vector = np.array(said(ask(http, EMBEDDINGS, input=""))[0]["embedding"])
    assert abs(np.linalg.norm(vector) - 1) < 1e-6
    assert len(said(ask(http, EMBEDDINGS, input=["", "a"]))) == 2
    assert http.post(COMPLETIONS, json=GREEDY).json()["error"]["param"] == "prompt"


def test_embeddings_are_shortened_to_the_dimensions_that_are_wanted(served: Served):
    whole = np.array(served.client.embeddings.create(model="demo", input="a llama").data[0].embedding)
    part = served.client.embeddings.create(model="demo", input="a llama", dimensions=16).data[0].embedding
    np.testing.assert_allclose(part, whole[:16] / np.linalg.norm(whole[:16]), rtol=1e-5)
    same = served.client.embeddings.create(model="demo", input="a llama", dimensions=len(whole)).data[0].embedding
    np.testing.assert_allclose(same, whole, rtol=1e-5)


# -- who shares the prefix cache --------------------------------------------------------------------------------------


def cached(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_nobody_learns_from_the_cache_what_others_asked(served: Served):
    """By default the key that was shown decides; a salt of the request divides further."""
    prompt = "A llama keeps a secret that nobody may find in the cache. " * 12

    def asked_by(key: str | None, **fields: Any) -> int:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=served.url, headers=headers, timeout=60, trust_env=False) as client:
            return cached(ask(client, COMPLETIONS, prompt=prompt, **fields))

    askers: list[tuple[str | None, dict[str, Any]]] = [
        (None, {}), ("alice", {}), ("bob", {}), ("alice", {"cache_salt": "team"}), ("bob", {"cache_salt": "team"}),
        (None, {"cache_salt": "team"}), ("alice", {"cache_salt": "other"}),
    ]  # fmt: skip
    assert [asked_by(key, **fields) for key, fields in askers] == [0] * len(askers)
    again = [asked_by(key, **fields) for key, fields in askers]
    assert min(again) == max(again) >= 64
    assert asked_by("alice", cache_salt="") == asked_by("alice", cache_salt=None) == again[0]
    assert asked_by("alice", n=2, cache_salt="new") == 0  # of the first; its second one finds the blocks


def test_answers_are_the_same_under_every_salt(http: httpx.Client):
    prompt = "The same words, whoever asks for them. " * 12
    found = [said(ask(http, COMPLETIONS, prompt=prompt, cache_salt=salt)) for salt in (None, "a", "b", "a")]
    assert found == [found[0]] * 4


def test_conversations_are_salted_as_well(http: httpx.Client):
    talk = [{"role": "user", "content": "A secret among friends, told again and again. " * 12}]
    assert [cached(ask(http, CHAT, messages=talk, cache_salt=salt)) > 0 for salt in ("a", "b", "a", "b")] == [
        False, False, True, True,
    ]  # fmt: skip


def test_the_library_sends_what_others_add(served: Served):
    """As users of vLLM write it."""
    more = {"cache_salt": "mine", "add_generation_prompt": True, "chat_template_kwargs": {"enable_thinking": False}}
    client: openai.OpenAI = served.client
    raw = client.chat.completions.with_raw_response.create(model="demo", messages=STORY, extra_body=more, **GREEDY)
    assert TOLD not in raw.headers
    assert raw.parse().choices[0].message.content
