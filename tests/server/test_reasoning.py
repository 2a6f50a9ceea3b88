"""Thoughts end to end: a model whose template opens them, with special tokens for marks that no text shows."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tokenizers

from tests import tiny_models as models
from tests.server.conftest import serving
from tests.system.mpi.launch import TIMEOUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 60)]

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' }}"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}{% endfor %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>\n{% endif %}"
)
MARKS = ("<think>", "</think>")
ASK = [{"role": "user", "content": "Are llamas kind?"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder: Path = tmp_path_factory.mktemp("thinker")
    tokenizer = tokenizers.Tokenizer.from_buffer(models.toy_tokenizer())
    tokenizer.add_tokens([tokenizers.AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    texts = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "chat_template.jinja": TEMPLATE.encode(),
        "generation_config.json": json.dumps({"bos_token_id": models.BOS, "eos_token_id": [models.EOS]}).encode(),
    }
    config = {**models.TOY, "vocab_size": tokenizer.get_vocab_size()}
    models.write_random(folder / "thinker.h5", config, "q8_0", texts)
    with serving(folder / "thinker.h5", folder, 2) as served, served.http() as http:
        yield http


def id_of(client: httpx.Client, text: str) -> int:
    found = client.post("/tokenize", json={"content": text, "add_special_tokens": False}).json()
    assert found["count"] == 1
    return int(found["tokens"][0])


def asked(client: httpx.Client, **more) -> dict:
    """A request whose answer closes its thought sooner or later."""
    bias = {str(id_of(client, "</think>")): 4.0, str(id_of(client, "<think>")): -100.0}
    return {"messages": ASK, "max_tokens": 120, "temperature": 1.0, "logit_bias": bias, "ignore_eos": True, **more}


def message_of(client: httpx.Client, **more) -> tuple[dict, dict]:
    answer = client.post("/v1/chat/completions", json=asked(client, **more)).json()
    return answer["choices"][0]["message"], answer["usage"]


@pytest.mark.parametrize("seed", range(3))
def test_thought_and_words_are_apart_and_nothing_is_lost(client, seed):
    message, usage = message_of(client, seed=seed)
    prompt = client.post("/tokenize", json={"messages": ASK}).json()["tokens"]
    bare = asked(client, seed=seed, prompt=prompt)
    del bare["messages"]
    text = client.post("/v1/completions", json=bare).json()["choices"][0]["text"]
    assert message["reasoning_content"] == message["reasoning"]
    assert message["reasoning"]
    assert message["content"]
    assert "".join((message["reasoning"] + message["content"]).split()) == "".join(text.split())
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < 119


def test_a_stream_has_the_same(client):
    message, usage = message_of(client, seed=1)
    body = asked(client, seed=1, stream=True, stream_options={"include_usage": True})
    lines = client.post("/v1/chat/completions", json=body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    for name in ("content", "reasoning_content", "reasoning"):
        assert "".join(delta.get(name) or "" for delta in deltas) == message[name]
    assert chunks[-1]["usage"] == {**usage, "prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]}


def test_a_thought_that_is_sent_back_is_in_the_prompt(client):
    message, _ = message_of(client, seed=1)
    said = {name: message[name] for name in ("role", "content")}
    without, _ = [client.post("/tokenize", json={"messages": [*ASK, m, *ASK]}).json() for m in (said, message)]
    assert _["count"] > without["count"]


def test_an_answer_within_a_grammar_is_no_thought(client):
    message, usage = message_of(client, response_format={"type": "json_object"}, logit_bias=None, max_tokens=40)
    assert message["content"].startswith("{")
    assert "reasoning_content" not in message
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_a_response_has_the_thought_as_an_item_and_takes_it_back(client):
    message, usage = message_of(client, seed=1)
    body = {name: value for name, value in asked(client, seed=1).items() if name != "messages"} | {"input": ASK}
    found = client.post("/v1/responses", json=body).json()
    thought, said = found["output"]
    assert (thought["type"], thought["content"][0]["text"]) == ("reasoning", message["reasoning"])
    assert (said["type"], said["content"][0]["text"]) == ("message", message["content"])
    assert found["usage"]["output_tokens_details"] == usage["completion_tokens_details"]
    counts = [
        client.post("/v1/responses/input_tokens", json={"input": [*ASK, *items, *ASK]}).json()["input_tokens"]
        for items in ([said], [thought, said])
    ]
    assert counts[1] > counts[0]
