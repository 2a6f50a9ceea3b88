"""OpenAI's own client against a running server: fields have their effect, and what cannot be is refused by name."""

import asyncio
import json
import math
import re
import shutil
import subprocess
import time

import httpx
import numpy as np
import openai
import pytest

from tests.server.conftest import Served
from tests.server.raw import until
from tests.system.mpi.launch import PROGRAM, ROOT, TIMEOUT, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 60)]

STORY = [{"role": "user", "content": "Tell me a story."}]
GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return served.client


def chat(client: openai.OpenAI, **fields):
    return client.chat.completions.create(**{**GREEDY, "messages": STORY, **fields})


def text_of(stream) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


# -- answers -------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_as_by_generate(client):
    """The same text as without a server, on another number of ranks."""
    answer = chat(client)
    words = ("--chat", "--temperature", "0", "--max-tokens", "24", "--json", "--prompt", STORY[0]["content"])
    alone = json.loads(run(1, *PROGRAM, "generate", *words).stdout)
    assert answer.choices[0].message.content == alone["text"]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "demo"
    assert abs(answer.created - time.time()) < 60


def test_a_stream_adds_up_to_the_whole_answer(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == chat(client).choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_usage_ends_with_done(served):
    with served.http() as http:
        body = {**GREEDY, "messages": STORY, "stream": True}
        lines = http.post("/v1/chat/completions", json=body).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line[6:]) for line in lines[:-1])


def test_the_asynchronous_client_streams_many_at_once(served):
    async def ask(number: int) -> str:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            fields = {**GREEDY, "messages": STORY, "seed": number, "temperature": 1.0, "stream": True}
            stream = await client.chat.completions.create(**fields)
            return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(ask(number) for number in range(20)))

    together, again = asyncio.run(all_of_them()), asyncio.run(all_of_them())
    assert together == again  # a seed's answer does not depend on company
    assert len(set(together)) > 5


def test_a_completion_continues_each_prompt(client):
    answer = client.completions.create(**GREEDY, prompt=["Once upon a time", "The llama"], n=2)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text
    single = client.completions.create(**GREEDY, prompt="The llama")
    assert single.choices[0].text == answer.choices[2].text
    assert answer.usage.completion_tokens == 4 * 24
    ids = httpx.post(f"{client.base_url}".replace("/v1/", "/tokenize"), json={"content": "The llama"}).json()["tokens"]
    assert client.completions.create(**GREEDY, prompt=ids).choices[0].text == single.choices[0].text
    assert "".join(c.choices[0].text for c in client.completions.create(**GREEDY, prompt=ids, stream=True)) == (
        single.choices[0].text
    )


def test_a_completion_without_max_tokens_has_16(client):
    fields = {k: v for k, v in GREEDY.items() if k != "max_tokens"}
    assert (
        client.completions.create(**fields, prompt="Once", extra_body={"ignore_eos": True}).usage.completion_tokens
        == 16
    )


@pytest.mark.parametrize("document", ["README.md", "docs/serve.md"])
def test_the_documents_command_works(served, document):
    """As it stands there, but for the port."""
    text = (ROOT / document).read_text()
    command = re.search(r"^curl (?:.*\\\n)*.*$", text, re.MULTILINE)
    assert command, f"{document} has no curl command"
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    spoken = command[0].replace("http://127.0.0.1:8000", served.url)
    done = subprocess.run(["bash", "-c", spoken], capture_output=True, timeout=60)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"], done.stderr


# -- fields, each with an effect ------------------------------------------------------------------------------------


def test_content_may_come_in_parts_and_roles_differ(client):
    parts = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "a story."}]
    assert chat(client, messages=[{"role": "user", "content": parts}]).choices == chat(client).choices
    told = [{"role": "system", "content": "You tell stories."}, *STORY, {"role": "assistant", "content": "No."}, *STORY]
    assert chat(client, messages=told).usage.prompt_tokens > chat(client).usage.prompt_tokens


def test_max_completion_tokens_counts_before_max_tokens(client):
    assert chat(client, max_completion_tokens=3).usage.completion_tokens == 3


def test_without_max_tokens_a_chat_may_fill_the_context(client):
    answer = chat(client, max_tokens=None)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 24


def test_seeds_repeat_and_n_gives_different_answers(client):
    fields = {"temperature": 1.2, "seed": 11, "n": 3}
    first, second = chat(client, **fields), chat(client, **fields)
    assert [c.message.content for c in first.choices] == [c.message.content for c in second.choices]
    assert len({c.message.content for c in first.choices}) == 3
    assert first.choices[0].message.content == chat(client, temperature=1.2, seed=11).choices[0].message.content
    assert first.usage.completion_tokens == sum([24, 24, 24])
    streamed = list(chat(client, stream=True, **fields))
    for index, choice in enumerate(first.choices):
        assert text_of(c for c in streamed if c.choices[0].index == index) == choice.message.content


@pytest.mark.parametrize("filters", [{"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}])
def test_filters_that_leave_one_token_are_greedy(client, filters):
    assert (
        chat(client, temperature=1.5, **filters).choices[0].message.content == chat(client).choices[0].message.content
    )


@pytest.mark.parametrize("stop", ["a llama", ["xyzzy", "a llama"]])
def test_stop_ends_before_the_text(client, stop):
    whole = chat(client, max_tokens=200).choices[0].message.content
    answer = chat(client, max_tokens=200, stop=stop)
    assert answer.choices[0].message.content == whole[: whole.index("a llama")]
    assert answer.choices[0].finish_reason == "stop"


def test_logit_bias_bans_and_forces(served, client):
    ids = served.http().post("/tokenize", json={"content": "llama", "add_special_tokens": False}).json()["tokens"]
    forced = chat(client, logit_bias={str(ids[0]): 100}, max_tokens=3)
    assert (
        forced.choices[0].message.content
        == served.http().post("/detokenize", json={"tokens": ids[:1] * 3}).json()["content"]
    )


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"extra_body": {"repetition_penalty": 5.0}}]
)
def test_penalties_change_a_repetitive_answer(client, penalty):
    fields = {"max_tokens": 120, "logit_bias": None}
    assert (
        chat(client, **fields, **penalty).choices[0].message.content
        != chat(client, **fields).choices[0].message.content
    )


def test_ignore_eos_goes_on_to_the_limit(client):
    assert chat(client, max_tokens=400, extra_body={"ignore_eos": True}).usage.completion_tokens == 400


def test_cached_tokens_are_told_and_may_be_refused(client):
    long = [{"role": "user", "content": "Tell me a story about a llama and a cluster. " * 12}]
    chat(client, messages=long)
    assert chat(client, messages=long).usage.prompt_tokens_details.cached_tokens >= 64
    anew = chat(client, messages=long, extra_body={"cache_prompt": False})
    assert anew.usage.prompt_tokens_details.cached_tokens == 0
    assert anew.choices == chat(client, messages=long).choices
    four = chat(client, messages=[{"role": "user", "content": "Say it again, llama. " * 30}], n=4)
    assert four.usage.prompt_tokens < 400


def test_logprobs_are_those_of_the_model(client):
    answer = chat(client, logprobs=True, top_logprobs=5)
    found = answer.choices[0].logprobs.content
    assert len(found) == 24
    assert b"".join(bytes(one.bytes) for one in found).decode() == answer.choices[0].message.content
    for one in found:
        assert one.top_logprobs[0].logprob == max(t.logprob for t in one.top_logprobs) == one.logprob  # greedy
        assert sum(math.exp(t.logprob) for t in one.top_logprobs) < 1 + 1e-9
    assert answer.choices[0].logprobs.content == [
        one for chunk in chat(client, logprobs=True, top_logprobs=5, stream=True)
        if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content
    ]  # fmt: skip
    none = chat(client, logprobs=True).choices[0].logprobs.content[0]
    assert none.top_logprobs == []
    old = client.completions.create(**GREEDY, prompt="Once upon", logprobs=3).choices[0].logprobs
    assert len(old.top_logprobs[0]) == 3
    assert old.token_logprobs[0] == max(old.top_logprobs[0].values())


def test_a_prompt_is_echoed_with_its_log_probabilities(client):
    """The same ones as of sampled tokens, and all of them, also where the cache knows the prompt."""
    prompt = "Once upon a time 🐫 a llama. " * 8
    for _ in range(2):
        fields = {**GREEDY, "prompt": prompt, "logprobs": 2, "echo": True}
        answer = client.completions.create(**fields).choices[0]
        found = answer.logprobs
        alone = client.completions.create(**{**fields, "echo": False}).choices[0]
        assert answer.text == prompt + alone.text
        assert found.tokens[-24:] == alone.logprobs.tokens
        assert found.token_logprobs[-24:] == alone.logprobs.token_logprobs
        assert found.top_logprobs[-24:] == alone.logprobs.top_logprobs
        assert found.text_offset[-24:] == [len(prompt) + at for at in alone.logprobs.text_offset]
        assert found.token_logprobs[0] is None is found.top_logprobs[0]
        assert all(value <= 0 for value in found.token_logprobs[1:])
        for name, at in zip(found.tokens, found.text_offset, strict=True):
            assert answer.text[at:].startswith(name) or (name.startswith("bytes:\\x") and answer.text[at] == "🐫")
        whole = [name for name in found.tokens if not name.startswith("bytes:")]
        assert "".join(whole) == answer.text.replace("🐫", "")
        assert (
            "".join(n.removeprefix("bytes:") for n in found.tokens[:20] if n not in whole)[:16] == r"\xf0\x9f\x90\xab"
        )


def test_what_was_sampled_has_the_same_probability_in_a_prompt(client):
    first = client.completions.create(**GREEDY, prompt="Once upon", logprobs=0).choices[0]
    again = client.completions.create(
        model="demo", prompt="Once upon" + first.text, logprobs=0, echo=True, max_tokens=0
    ).choices[0]
    assert again.text == "Once upon" + first.text
    assert again.finish_reason == "length"
    assert again.logprobs.token_logprobs[-24:] == first.logprobs.token_logprobs
    assert again.logprobs.tokens[-24:] == first.logprobs.tokens


def test_an_echo_streams(client):
    fields = {**GREEDY, "prompt": ["The llama said: ", "Once 🐫"], "logprobs": 1, "echo": True, "n": 2}
    whole = client.completions.create(**fields).choices
    for choice in whole:
        parts = [c.choices[0] for c in client.completions.create(**fields, stream=True)]
        parts = [part for part in parts if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [one for part in parts for one in getattr(part.logprobs, column)]
            assert joined == getattr(choice.logprobs, column)
    plain = client.completions.create(**{**fields, "logprobs": None}).choices
    assert [choice.text for choice in plain] == [choice.text for choice in whole]


def test_prompts_have_log_probabilities_in_the_form_of_vllm(client):
    fields = {"model": "demo", "max_tokens": 0, "extra_body": {"prompt_logprobs": 2}}
    answer = client.completions.create(prompt="Once upon a time", logprobs=1, echo=True, **fields)
    choice = answer.choices[0].model_dump()
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert [next(iter(one.values()))["logprob"] for one in rest] == choice["logprobs"]["token_logprobs"][1:]
    assert [next(iter(one.values()))["decoded_token"] for one in rest] == choice["logprobs"]["tokens"][1:]
    assert all(2 <= len(one) <= 3 for one in rest)
    assert all({1, 2} <= {alternative["rank"] for alternative in one.values()} for one in rest)
    assert answer.usage.completion_tokens == 0
    talk = client.chat.completions.create(messages=STORY, n=2, **{**fields, "max_tokens": 1}).model_dump()
    assert len(talk["prompt_logprobs"]) == talk["usage"]["prompt_tokens"]
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs"):
        client.completions.create(prompt="Once", stream=True, **fields)


def test_a_prompt_alone_is_computed_for_whoever_comes_next(client):
    prompt = "A story that nobody has told yet, about a llama in a queue. " * 6
    empty = client.completions.create(model="demo", prompt=prompt, max_tokens=0)
    assert (empty.choices[0].text, empty.choices[0].finish_reason) == ("", "length")
    again = client.completions.create(model="demo", prompt=prompt, max_tokens=1)
    assert again.usage.prompt_tokens_details.cached_tokens >= 64


def test_json_is_forced(client):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 3, "maximum": 9},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    for seed in range(4):
        form = {"type": "json_schema", "json_schema": {"name": "llama", "schema": schema, "strict": True}}
        answer = chat(client, response_format=form, temperature=1.0, seed=seed, max_tokens=200)
        found = json.loads(answer.choices[0].message.content)
        assert set(found) == {"name", "age"}
        assert 3 <= found["age"] <= 9
        assert answer.choices[0].finish_reason == "stop"
    free = chat(client, response_format={"type": "json_object"}, logit_bias=None, max_tokens=500)
    assert free.choices[0].message.content.lstrip().startswith("{")
    assert (
        chat(client, response_format={"type": "text"}).choices[0].message.content
        == chat(client).choices[0].message.content
    )


def test_user_is_taken(client):
    assert chat(client, user="somebody").choices == chat(client).choices


# -- other paths ------------------------------------------------------------------------------------------------------


def test_embeddings_are_unit_vectors_in_both_encodings(client):
    texts = ["a llama in a cluster", "a llama in a cluster", "warm milk"]
    found = [np.array(one.embedding) for one in client.embeddings.create(model="demo", input=texts).data]  # base64
    floats = client.embeddings.create(model="demo", input=texts, encoding_format="float")
    for one, other in zip(found, floats.data, strict=True):
        np.testing.assert_allclose(one, other.embedding, rtol=1e-6)
        assert abs(np.linalg.norm(one) - 1) < 1e-6
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0] @ found[2] < 0.999
    assert floats.usage.prompt_tokens == floats.usage.total_tokens > 6
    last = client.embeddings.create(model="demo", input=texts[0], extra_body={"pooling": "last"}).data[0].embedding
    assert np.abs(np.array(last) - found[0]).max() > 1e-3


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "mpillama"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_texts_become_tokens_and_texts_again(served):
    with served.http() as http:
        found = http.post("/tokenize", json={"content": "Once upon a llama", "with_pieces": True}).json()
        assert found["count"] == len(found["tokens"]) == len(found["pieces"])
        assert (
            http.post("/detokenize", json={"tokens": found["tokens"]}).json()["content"].endswith("Once upon a llama")
        )
        talk = http.post("/tokenize", json={"messages": STORY}).json()
        assert talk["count"] == served.client.chat.completions.create(**GREEDY, messages=STORY).usage.prompt_tokens


def test_health_metrics_and_the_document(served):
    with served.http() as http:
        assert http.get("/health").json()["status"] == "ok"
        until(lambda: 'mpillama_memory_bytes{rank="1"}' in http.get("/metrics").text, "memory was asked for")
        text = http.get("/metrics").text
        counted = "requests_total first_token_seconds_bucket token_seconds_bucket blocks_used cached_tokens_total"
        for name in f"{counted} communication_seconds_total active_tasks request_seconds_count".split():
            assert f"mpillama_{name}" in text
        assert 'mpillama_memory_bytes{rank="1"}' in text
        assert set(http.get("/openapi.json").json()["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/health"}


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n"),
        ({"n": 1000}, 400, "n"),
        ({"max_tokens": -2}, 400, "max_tokens"),
        ({"seed": 2**63}, 400, "seed"),
        ({"stop": ""}, 400, "stop"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"logit_bias": {"99999999": 1}}, 400, "logit_bias"),
        ({"top_logprobs": 3}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content.0.type"),
        ({"web_search_options": {}}, 400, "web_search_options"),
        ({"model": "gpt-4"}, 404, "model"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 422, "tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "oops"}}}}, 422,
         "response_format"),
        ({"messages": [{"role": "user", "content": "llama " * 5000}]}, 400, "messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(client, fields, status, param):
    with pytest.raises(openai.APIStatusError) as refusal:
        chat(client, **fields)
    assert refusal.value.status_code == status
    assert refusal.value.body["param"] == param
    assert param.split(".")[0] in refusal.value.body["message"] or status == 404
    assert refusal.value.body["type"] == "invalid_request_error"


def test_a_prompt_that_is_too_long_has_its_own_code(client):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model="demo", prompt="llama " * 5000)
    assert refusal.value.body["code"] == "context_length_exceeded"
