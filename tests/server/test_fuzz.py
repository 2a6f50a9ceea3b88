"""Whatever strangers send: no 5xx, no crash, no trace, nothing left behind, and the next good request is answered."""

import copy
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
import psutil
import pytest
from pydantic import BaseModel

from mpillama.openai.bodies import DetokenizeBody, EmbeddingBody, ServedChat, ServedCompletion, TokenizeBody
from mpillama.openai.responses import ResponseBody
from mpillama.server.http_server import HEADER_BYTES, HEADER_SECONDS
from tests.server.conftest import Served, serving
from tests.server.raw import HOST, Answer, Wire, active, first_of, head, post, until
from tests.server.tooled import write_tooled
from tests.system.mpi.launch import ROOT, TIMEOUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 120)]

BODIES = 5_000
CONNECTIONS = 3
SLOW_CONNECTIONS = 4
FEW_FILES = 4
MEMORY = 50 << 20

# -- the server, and what must hold after everything -----------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """The server under fire, as it was before."""

    served: Served
    http: httpx.Client
    process: psutil.Process
    text: str
    """What it answers to a good request."""

    @property
    def url(self) -> str:
        return self.served.url

    def wire(self, **options: Any) -> Wire:
        return Wire(self.url, **options)

    def cpu_seconds(self) -> float:
        """What its first rank has computed so far."""
        return sum(self.process.cpu_times()[:2])

    def usual_seconds(self) -> float:
        """What it computes for 300 requests that are refused at once, on this machine: some 0.3 s on a quick one."""
        taken = []
        for _ in range(3):
            before = self.cpu_seconds()
            for _ in range(300):
                assert self.http.post("/tokenize", json={}).status_code == 400
            taken.append(self.cpu_seconds() - before)
        return min(taken)

    def check(self) -> None:
        """It lives and answers right."""
        assert self.served.launch.process.poll() is None, self.served.launch.stderr()
        found = self.http.post("/v1/completions", json=GOOD).raise_for_status().json()
        assert found["choices"][0]["text"] == self.text


GOOD = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 8, "logit_bias": {"1": -100}}
ENDED = {"temperature": 0, "max_tokens": 1, "logit_bias": {"1": 100}}
"""Two reasons to end at once, so that one of them may be spoiled."""
ENDLESS = {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    model = write_tooled(folder / "tooled.h5")
    options = ("--max-tokens", "4", "--prefill-chunk", "64", "--log-dir", str(folder / "log"), "--log-prompts")
    with serving(model, folder, 2, *options) as served, served.http() as http:
        text = http.post("/v1/completions", json=GOOD).raise_for_status().json()["choices"][0]["text"]
        yield Target(served, http, served.launch.ranks()[0], text)


@pytest.fixture
def target(running: Target) -> Iterator[Target]:
    yield running
    running.check()


# -- bodies ----------------------------------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "Be brief.", "name": "n"},
    {"role": "user", "content": [{"type": "text", "text": "Tell"}]},
    {
        "role": "assistant", "content": None, "refusal": None, "annotations": None, "audio": None,
        "function_call": {"name": "f", "arguments": "{}"}, "reasoning_content": "r", "reasoning": "r",
        "tool_calls": [{"id": "c", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "content": "3", "tool_call_id": "c"},
    {"role": "function", "content": [{"type": "refusal", "refusal": "no"}], "name": "f"},
]  # fmt: skip
SAMPLING = {
    **ENDED, "model": "tooled", "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "stop": ["x"], "presence_penalty": 0,
    "frequency_penalty": 0, "repetition_penalty": 1.1, "ignore_eos": False, "cache_prompt": True, "user": "u", "n": 1,
    "stream": False, "cache_salt": "s", "speculate": False, "metadata": {"a": "b"}, "store": False,
    "service_tier": "auto",
    "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_options": {}, "prompt_cache_retention": "24h",
    "moderation": None,
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
TOOL = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
JSON_FORMAT = {
    "type": "json_schema", "json_schema": {"name": "s", "description": "d", "schema": SCHEMA, "strict": True}
}  # fmt: skip
TEMPLATE = {
    "add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {"a": 1},
    "reasoning_effort": "low",
}  # fmt: skip
CHAT = {
    **SAMPLING, **TEMPLATE, "messages": TALK, "max_completion_tokens": 1, "prompt_logprobs": None, "verbosity": "low",
    "prediction": {}, "audio": {}, "modalities": ["text"], "web_search_options": None, "functions": [],
    "function_call": "auto",
}  # fmt: skip
ITEMS = [
    {"type": "message", "role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "input_text", "text": "Tell"}]},
    {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "s"}], "encrypted_content": "e"},
    {
        "type": "message", "id": "m", "status": "completed", "role": "assistant",
        "content": [{"type": "output_text", "text": "t", "annotations": [], "logprobs": []}],
    },
    {"type": "function_call", "id": "f", "call_id": "c", "name": "f", "arguments": "{}", "status": "completed"},
    {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "3"}]},
]  # fmt: skip
RESPONSE = {
    **{name: value for name, value in SAMPLING.items() if name != "n"}, "input": ITEMS, "instructions": "i",
    "max_output_tokens": 1, "max_tool_calls": 1, "store": False, "metadata": {"a": "b"}, "cache_salt": "s",
    "service_tier": "auto", "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_options": {},
    "prompt_cache_retention": "24h", "moderation": None, "add_generation_prompt": True, "continue_final_message": False,
    "chat_template_kwargs": {"a": 1}, "reasoning_effort": "low", "include": ["message.output_text.logprobs"],
    "top_logprobs": 1, "reasoning": {"effort": "low", "summary": "auto", "generate_summary": None},
    "truncation": "auto", "context_management": [], "background": False, "conversation": None, "prompt": None,
    "previous_response_id": None, "parallel_tool_calls": False,
}  # fmt: skip
SAMPLES: tuple[tuple[str, type[BaseModel], dict[str, Any]], ...] = (
    ("/v1/chat/completions", ServedChat, {**CHAT, "logprobs": True, "top_logprobs": 2, "response_format": JSON_FORMAT}),
    (
        "/v1/chat/completions", ServedChat,
        {
            **CHAT, "stream": True, "stream_options": {"include_usage": True}, "parallel_tool_calls": False,
            "tools": [{"type": "function", "function": TOOL}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        },
    ),
    (
        "/v1/completions", ServedCompletion,
        {
            **SAMPLING, "prompt": ["Once"], "echo": False, "logprobs": 2, "stream": True, "prompt_logprobs": None,
            "stream_options": {"include_obfuscation": True},
        },
    ),
    ("/v1/completions", ServedCompletion, {**SAMPLING, "prompt": [[5, 6]], "suffix": "", "best_of": 1}),
    ("/v1/completions", ServedCompletion, {**SAMPLING, "prompt": [5, "a"], "prompt_logprobs": 1, "stream": False}),
    (
        "/v1/responses", ResponseBody,
        {**RESPONSE, "text": {"format": {"type": "json_schema", **JSON_FORMAT["json_schema"]}, "verbosity": "low"}},
    ),
    (
        "/v1/responses", ResponseBody,
        {
            **RESPONSE, "stream": True, "stream_options": {"include_obfuscation": False},
            "tools": [{"type": "function", **TOOL}],
            "tool_choice": {
                "type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}],
            },
        },
    ),
    (
        "/v1/embeddings", EmbeddingBody,
        {
            "input": ["a", [5, "a"]], "model": "tooled", "encoding_format": "float", "pooling": "mean", "user": "u",
            "dimensions": 3, "cache_salt": "s",
        },
    ),
    (
        "/tokenize", TokenizeBody,
        {**TEMPLATE, "messages": TALK, "with_pieces": True, "tools": [{"type": "function", "function": TOOL}]},
    ),
    (
        "/tokenize", TokenizeBody,
        {"content": "a", "model": "tooled", "add_special_tokens": True, "with_pieces": True},
    ),
    ("/tokenize", TokenizeBody, {"prompt": "a", "model": "tooled"}),
    ("/detokenize", DetokenizeBody, {"tokens": [5], "model": "tooled"}),
)  # fmt: skip


def test_the_samples_know_every_field():
    """A new field must be fuzzed as well: add it to a sample."""
    for _, kind, _ in SAMPLES:
        given = {name for _, other, sample in SAMPLES if other is kind for name in sample}
        assert given == {field.alias or name for name, field in kind.model_fields.items()}
        for sample in (sample for _, other, sample in SAMPLES if other is kind):
            kind.model_validate(sample)


DEEP = 80
TOO_DEEP = 400
VALUES: tuple[bytes, ...] = (
    b"null", b"true", b"false", b"0", b"-0", b"1", b"-1", b"2", b"0.5", b"-0.0", b"1e-320", b"5e-324", b"1e-308",
    b"1e308", b"-1e308", b"1e999", b"-1e999", b"NaN", b"Infinity", b"-Infinity", b"2147483648", b"9007199254740993",
    b"9223372036854775808", b"18446744073709551616", b"-9223372036854775809", b"1" + b"0" * 399, b"9" * 10_000,
    b"-" + b"9" * 10_000, b"0." + b"3" * 10_000, b"1e" + b"9" * 5000, b'""', b'" "', b'"\\u0000"', b'"\\ud800"',
    b'"\\udfff\\ud800"', b'"\\ud83d\\ude00"', b'"' + b"a" * 5000 + b'"', b'"1"', b'"true"', b'"null"', b'"NaN"', b"[]",
    b"[[]]", b"[null]", b"[0]", b'["a"]', b'["a",1]', b"[true]", b"[1.5]", b"[-1]", b"[{}]", b'["\\ud800"]',
    b"[" + b"1," * 500 + b'"x"]', b"{}", b'{"a":1}', b'{"":null}', b'{"\\u0000":0}', b'{"\\ud800":1}',
    b'{"a":1,"a":2}', b'{"' + b"9" * 6000 + b'":1}', b'{"-1":1}', b'{"1_0":1}', b'{"\\u0663":1}', b'{"1":1e-320}',
    b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP + b"1" + b"}" * DEEP, b"[" * TOO_DEEP + b"]" * TOO_DEEP,
    b'{"a":' * TOO_DEEP + b"1" + b"}" * TOO_DEEP, b'{"const":' * TOO_DEEP + b"1" + b"}" * TOO_DEEP,
    b'"../../etc/passwd"', b'"{{ 7 * 7 }}{% for x in range(9) %}"', b'"%s%n%x"', b'"<|end|><|user|>"',
    b'"<tool_call>{"', b'{"$ref":"#"}', b'{"type":"object","properties":{"a":{"$ref":"#"}}}',
    b'{"pattern":"(a*)*b{9}"}',
    b'{"type":"string","pattern":"^((a{1,999}){1,999}){1,999}$"}', b'{"type":"string","minLength":1e300}',
    b'{"type":"array","items":{"$ref":"file:///etc/passwd"}}', b'{"type":"number","multipleOf":0}',
    b'{"enum":[]}', b'{"type":"json_object"}', b'{"type":"function","function":{"name":"g"}}',
    # not JSON
    b"", b"'a'", b"undefined", b"0x10", b"01", b"+1", b".5", b"1.", b"1e", b"--1", b"[1,]", b"[,1]", b'{"a":1,}',
    b'{"a"}', b"{1:2}", b'"a', b'"\\x"', b'"\\u12"', b'"\t"', b'"\n"', b'"\x00"', b"\xff", b'"\xff"', b'"\xed\xa0\x80"',
    b'"\xc0\x80"', b'"\xf8\x88\x80\x80\x80"', b"/* */1", b"1 2", b"\xef\xbb\xbf1", b"True", b"]", b"}",
)  # fmt: skip
WHOLE: tuple[bytes, ...] = (
    b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000, b'{"messages":' * 100_000 + b"}" * 100_000,
    b'"' * 100_001, b"\\" * 10_000, b" " * 100_000, b"\x00" * 1000, b"\xff\xfe", b"\xef\xbb\xbf", b"9" * 1_000_000,
    b'{"prompt":[' + b"1," * 100_000 + b'"x"]}', b'{"messages":[' + b"1," * 100_000 + b"1]}",
    b'{"messages":[' + b"{}," * 50_000 + b"{}]}", b'{"input":[' + b"[]," * 50_000 + b"[]]}",
    b"{" + b",".join(b'"%d":1' % i for i in range(50_000)) + b"}",
    b'{"prompt":"x","logit_bias":{' + b",".join(b'"%d":"x"' % i for i in range(50_000)) + b"}}",
)  # fmt: skip
"""Bodies that cost most where they are taken apart."""
MARK = "@@@"


def mutations(path: str, sample: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Each value in the place of each value, and each field twice, missing, and unknown."""
    for place in places(sample):
        before, _, after = json.dumps(changed(sample, place, MARK)).partition(f'"{MARK}"')
        for value in VALUES:
            yield path, before.encode() + value + after.encode()
        yield path, json.dumps(changed(sample, place)).encode()
        if isinstance(place[-1], str):
            doubled = b'"x", "' + place[-1].encode() + b'": "x"'
            yield path, before.encode() + doubled + after.encode()
            yield path, json.dumps(changed(sample, (*place[:-1], place[-1] + "\0"), 1)).encode()


def places(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """All ways to a value inside of another one."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*place, key)
        yield from places(inner, (*place, key))


def changed(sample: Any, place: tuple[str | int, ...], *value: Any) -> Any:
    """A copy with another value in a place, or none."""
    found = copy.deepcopy(sample)
    around = found
    for key in place[:-1]:
        around = around[key]
    if value:
        around[place[-1]] = value[0]
    else:
        del around[place[-1]]
    return found


def damaged(body: bytes, dice: random.Random) -> bytes:
    """Bytes removed, repeated, or replaced, or another encoding."""
    at, length = dice.randrange(len(body)), dice.choice((1, 1, 2, 5, 20))
    new = dice.choice((b"", b"", body[at : at + length] * 2, dice.randbytes(length), b"\0", b'"', b"}", b"[", b"\\"))
    spoiled = body[:at] + new + body[at + length :]
    if dice.random() < 0.05:
        return body.decode().encode(dice.choice(("utf-16", "utf-32", "utf-16-be", "utf-7", "cp037")))
    return spoiled[:at] if dice.random() < 0.2 else spoiled


@cache
def all_bodies() -> list[bytes]:
    """Requests with bodies that are mostly wrong: a part of all that there are, the same on every run."""
    dice = random.Random(17)
    cases = [case for path, _, sample in SAMPLES for case in mutations(path, sample)]
    cases += [(path, body) for path, _, _ in SAMPLES for body in WHOLE[2:]] + [(SAMPLES[0][0], b) for b in WHOLE[:2]]
    cases += [(path, damaged(json.dumps(sample).encode(), dice)) for path, _, sample in SAMPLES for _ in range(120)]
    dice.shuffle(cases)
    return [post(path, body) for path, body in cases[:BODIES]]


def test_thousands_of_wrong_bodies_are_refused_in_the_api_s_words(dawdlers: list[float], target: Target):
    requests = all_bodies()
    assert len(requests) == BODIES
    before = target.cpu_seconds()
    in_threads(requests, lambda part: ask_all(target, part))
    assert target.cpu_seconds() - before < max(60, 200 * target.usual_seconds())


def in_threads(requests: Sequence[bytes], work: Callable[[Sequence[bytes]], list[str]]) -> None:
    """Share the work; AssertionError with what it complains of."""
    complaints: list[str] = []

    def run(part: Sequence[bytes]) -> None:
        try:
            complaints.extend(work(part))
        except Exception as error:  # noqa: BLE001 - must not be lost with its thread
            complaints.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(requests[i::CONNECTIONS],)) for i in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "requests hang"
    assert not complaints, first_of(complaints)


def ask_all(target: Target, requests: Sequence[bytes]) -> list[str]:
    """Ask on one connection that the server must keep; complaints."""
    found = []
    with target.wire(seconds=120) as wire:
        for request in requests:
            answer = wire.ask(request)
            if answer is None:
                return [*found, f"the connection ended at {request[:300]!r} … {request[-100:]!r}"]
            if complaint := answer.complaint():
                found.append(f"{complaint} … to {request[:3000]!r}")
    return found


def test_options_at_their_limits_end_no_server(target: Target):
    """What a field allows must not overflow in the sampler, where an exception would end every rank."""
    extremes: dict[str, tuple[float, ...]] = {
        "repetition_penalty": (5e-324, 1e-308, 1e-3, 0.01, 100), "temperature": (5e-324, 1e-308, 2),
    "top_k": (3, 10**300),
        "top_p": (5e-324, 0.5, 1), "min_p": (5e-324, 0.1, 1), "seed": (0, 2**63 - 1), "presence_penalty": (-2, 2),
        "frequency_penalty": (-2, 2),
    }  # fmt: skip
    dice = random.Random(19)
    plain = {"prompt": [5, 6, 7], "max_tokens": 5, "temperature": 1}
    bodies = [{**plain, "repetition_penalty": tiny, name: v} for tiny in (5e-324, 1e-308, 0.01)
              for name, values in extremes.items() for v in values]  # fmt: skip
    for _ in range(200):
        chosen = {name: dice.choice(values) for name, values in extremes.items() if dice.random() < 0.5}
        bias = {str(token): dice.choice((-100, 100, 1e-320)) for token in range(dice.choice((0, 5, 320)))}
        bodies.append({**plain, **chosen, "logit_bias": bias})
    in_threads([post("/v1/completions", body) for body in bodies], lambda part: ask_all(target, part))


def test_unknown_fields_of_any_value_are_told_to_a_library_s_client(target: Target):
    """Through httpx with keep-alive: other framing than by hand."""
    values = [json.loads(v) for v in VALUES[:14]]
    for value in values:
        for path, _, sample in SAMPLES:
            answer = target.http.post(path, json={**sample, "unknown": value})
            assert answer.status_code == 200, answer.text
            assert answer.headers.get("x-mpillama-ignored") == (None if value is None else "unknown")


# -- heads -----------------------------------------------------------------------------------------------------------

PATHS = (
    "/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/models/tooled", "/v1/models/",
    "/v1/chat/completions",
    "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize", "/v1/responses", "/v1/responses/resp_0",
    "/v1/responses/%00/input_items?limit=-1&after=%ff", "/page/none", "//", "/v1", "/v1/", "/docs",
    "/redoc",
    "/.git/config", "/page/..", "/page/../secret", "/page/..%2fsecret", "/page/%2e%2e/secret", "/page/..%5csecret",
    "/page//etc/passwd", "/%00", "/v1/models/%00", "/v1/models/%ff%fe", "/v1/models/%ed%a0%80", "/v1/models/%2f%2e",
    "/v1/models/%", "/v1/models/%zz", "/v1/models/{{7*7}}", "/v1/models/" + "a" * 10_000, "/" + "../" * 1000,
    "/" + "%25" * 3000, "/?" + "a=b&" * 3000, "/health?%00=%ff", "/health;a=b", "/health/", "/HEALTH", "*",
    "http://localhost/health", "http://elsewhere.test/", "localhost:80", "\\", "/a|b", "/<script>", "?", "#", "/#",
)  # fmt: skip
METHODS = (
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "PATCH",
    "DELETE",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "PROPFIND",
    "get",
    "G",
    "X-Y",
)
BODY = json.dumps({**ENDED, "prompt": "x"}).encode()
GOOD_POST = post("/v1/completions", BODY)
START = b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
LENGTHS = (
    b"", b"-1", b"+5", b"5.0", b"0x5", b"5 5", b"5,5", b"5, 6", b"\xd9\xa3", b"1e3", b"99999999999999999999",
    b"9" * 400,
    b"17000000", b"18446744073709551617", b"a", b'"5"', b"\t", b"5;", b"00005",
)  # fmt: skip
CHUNKS = (
    b"zz\r\n", b"-5\r\n", b"5\r\nhell\r\n0\r\n\r\n", b"fffffffffffffffffff\r\n", b"5\r\nhelloXX0\r\n\r\n", b"\r\n\r\n",
    b"0x5\r\nhello\r\n0\r\n\r\n", b"5 \r\nhello\r\n0\r\n\r\n", b"5;" + b"e" * 70_000 + b"\r\nhello\r\n",
    b"5\nhello\n0\n\n",
    b"0\r\n" + b"A: b\r\n" * 12_000 + b"\r\n", b"0\r\nbad trailer\r\n\r\n", b"1\r\n{\r\n" * 3000 + b"0\r\n\r\n",
    b"\xff\xff",
)  # fmt: skip
HEADERS = (
    b"X: " + b"a" * (HEADER_BYTES + 10), b"X" * 70_000 + b": a", b"no colon", b": empty", b"X : a", b"X\0: a", b"X: \0",
    b"X: a\rb", b"X: a\nY: b", b"\xc3\xa9: a", b"X: \xff\xfe", b" folded", b"X: a\r\n\tfolded",
    b"Cookie: " + b";" * 9000,
    b"Content-Type: multipart/form-data; boundary=x", b"Content-Type: application/json; charset=utf-16",
    b"Content-Type: application/json;;=\xff", b"Content-Type: text/plain", b"Content-Encoding: gzip",
    b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding: identity",
    b"Transfer-Encoding: \x0bchunked", b"Transfer-Encoding: chunked\r\nContent-Length: 5",
    b"Connection: Upgrade, HTTP2-Settings",
    b"Connection: close, keep-alive, \xff", b"Upgrade: h2c", b"TE: trailers", b"Range: bytes=0-,1-,2-",
    b"If-Range: \xff",
    b"Range: bytes=" + b"0-1," * 5000, b"If-Modified-Since: nonsense", b"If-None-Match: *",
    b"Accept: " + b"*/*," * 5000,
    b"Host: localhost", b"Host: ", b"Host: [", b"Host: a b", b"Authorization: Bearer " + b"x" * 30_000,
    b"Authorization: \xff\xfe", b"Authorization: Basic Og==", b"Origin: null", b"Origin: \xff",
    b"X-Forwarded-For: 1.2.3.4", b"X-Forwarded-Host: elsewhere.test", b"Forwarded: for=\"_x\"", b"Expect: 200-ok",
    b"Max-Forwards: -1", b"Access-Control-Request-Method: \xff",
)  # fmt: skip
GARBAGE = (
    b"\0" * 100, b"\xff" * 100, b"\r\n" * 100, b"\n" * 100, b"GET\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n", b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", b"GET / HTTP/1.1 \r\n" + HOST + b"\r\n",
    b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n", b"GET / http/1.1\r\n" + HOST + b"\r\n", b"GET / HTTP/0.9\r\n\r\n",
    b"GET /health HTTP/1.0\r\n\r\n", b"GET /health HTTP/1.0\r\n" + HOST + b"\r\n",
    b"GET / HTTP/1.1\n" + b"Host: localhost\n\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04" * 20,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 60,
    b"HELO x\r\n", b"SSH-2.0-x\r\n", b"\x80\x2e\x01\x03\x01", b"{}", b"[" * 70_000, b"GET " + b"/" * 200_000,
    b"A" * 200_000, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000, b"GET / HTTP/1.1\r\n" + HOST * 2 + b"\r\n",
)  # fmt: skip
UPGRADE = (
    b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)  # fmt: skip


def with_length(*lines: bytes) -> bytes:
    return START + b"".join(b"Content-Length: " + line + b"\r\n" for line in lines) + b"\r\n" + BODY


def all_heads() -> list[bytes]:
    """Whole requests, each for a connection of its own."""
    requests = [head(method, path) for method in METHODS for path in PATHS]
    requests += [with_length(line) for line in LENGTHS]
    requests += [with_length(line, other) for line in LENGTHS for other in (b"5", line)]
    requests += [START + b"\r\n", START + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"]
    requests += [START + b"Transfer-Encoding: chunked\r\n\r\n" + chunks for chunks in CHUNKS]
    requests += [head("POST", "/nowhere", b"Transfer-Encoding: chunked") + chunks for chunks in CHUNKS]
    requests += [head("GET", "/v1/models", line) for line in HEADERS]
    requests += [post("/v1/completions", BODY, line) for line in HEADERS]
    requests += [head("GET", "/health", *(b"X-%d: y" % i for i in range(count))) for count in (100, 3000, 9000)]
    requests += [head("GET", "/health", *UPGRADE), head("POST", "/tokenize", *UPGRADE), *GARBAGE]
    dice = random.Random(18)
    requests += [dice.randbytes(dice.choice((1, 10, 300))) + b"\r\n\r\n" for _ in range(100)]
    requests += [damaged(GOOD_POST.partition(b"\r\n\r\n")[0], dice) + b"\r\n\r\n" + BODY for _ in range(400)]
    return requests


def ask_each(target: Target, requests: Sequence[bytes]) -> list[str]:
    """Ask on connections of their own, close after the first response; complaints."""
    found = []
    for request in requests:
        with target.wire() as wire:
            wire.send(request)
            wire.end_input()  # what is not whole now will not be: the server may end it without a word
            if (answer := wire.answer()) and (complaint := answer.complaint()):
                found.append(f"{complaint} … to {request[:1000]!r}")
    return found


def ask_slowly(target: Target, requests: Sequence[bytes]) -> list[str]:
    """As ask_each, but the connection stays open: the server has to say something, or may wait for more."""
    found = []
    for request in requests:
        with target.wire(seconds=0.25) as wire:
            wire.send(request)
            try:
                answer = wire.answer()
            except TimeoutError:
                continue
            if answer and (complaint := answer.complaint()):
                found.append(f"{complaint} … to {request[:1000]!r}")
    return found


def test_wrong_heads_are_refused_or_dropped(target: Target):
    requests = all_heads()
    assert len(requests) > 1200
    in_threads(requests, lambda part: ask_slowly(target, part))


def test_connections_end_at_every_byte(target: Target):
    """Half-sent requests, then an end, a reset, or an end of the input only."""
    stops = range(0, len(GOOD_POST), 2)

    def end(part: Sequence[bytes]) -> list[str]:
        for i, request in enumerate(part):
            wire = target.wire()
            wire.send(request)
            (wire.close, wire.reset, wire.end_input)[i % 3]()
            wire.close()
        return []

    in_threads([GOOD_POST[:stop] for stop in stops for _ in range(3)], end)
    until(lambda: active(target.http) == 0, "no answers are under way")


def test_known_paths_refuse_other_methods(target: Target):
    for path in PATHS[:11]:
        for method in ("PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
            with target.wire() as wire:
                answer = wire.ask(head(method, path))
                assert answer
                assert answer.status in ((405, 404) if path.endswith("/models/") else (405,)), (method, path, answer)
                assert answer.error["message"]


def test_pipelined_requests_are_answered_in_their_order(target: Target):
    bad, missing = post("/v1/completions", b'{"prompt": 3}'), head("GET", "/nowhere")
    with target.wire() as wire:
        wire.send((GOOD_POST + bad + missing) * 8)
        statuses = [answer.status for answer in (wire.answer() for _ in range(24)) if answer]
    assert statuses == [200, 400, 404] * 8


def test_older_and_odd_ways_to_ask_are_answered(target: Target):
    """HTTP/1.0 (also a stream), an absolute path in pieces, Expect: 100-continue, an offer to upgrade."""
    with target.wire() as wire:
        answer = wire.ask(GOOD_POST.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert answer
        assert answer.status == 200
        assert wire.receive() == b""
    streamed = post("/v1/completions", {**ENDED, "prompt": "x", "stream": True}).replace(b"HTTP/1.1", b"HTTP/1.0")
    with target.wire() as wire:
        answer = wire.ask(streamed)
        assert answer
        assert answer.body.endswith(b"data: [DONE]\n\n")
    with target.wire() as wire:
        for byte in GOOD_POST:
            wire.send(bytes([byte]))
        assert (answer := wire.answer())
        assert answer.status == 200
    with target.wire() as wire:
        wire.send(post("/v1/completions", BODY, b"Expect: 100-continue").removesuffix(BODY))
        assert wire.receive().startswith(b"HTTP/1.1 100 ")
        assert (answer := wire.ask(BODY))
        assert answer.status == 200
    with target.wire() as wire:
        assert (answer := wire.ask(head("GET", "/health", *UPGRADE)))
        assert answer.status == 200


def test_json_in_any_spelling_of_its_type_is_taken(target: Target):
    for kind in ("application/json", "Application/JSON", "application/json; charset=utf-8", "application/json ;x"):
        answer = target.http.post("/v1/completions", content=BODY, headers={"Content-Type": kind})
        assert answer.status_code == 200, kind


def test_bodies_in_other_encodings_than_utf_8_are_refused(target: Target):
    with target.wire() as wire:
        for encoding in ("utf-16", "utf-16-le", "utf-32", "utf-7" if b"+" in BODY else "cp037"):
            answer = wire.ask(post("/v1/completions", BODY.decode().encode(encoding)))
            assert answer
            assert answer.status == 400, encoding
            assert answer.error["code"] == "invalid_value"


# -- clients that go away or dawdle ----------------------------------------------------------------------------------


def test_clients_that_go_away_leave_no_task_behind(target: Target):
    """In the midst of a stream, before its first event, and while a whole answer is computed; 60 in all."""
    endless = post("/v1/completions", ENDLESS)
    whole = post("/v1/completions", {**ENDLESS, "stream": False})
    long = post("/v1/completions", {**ENDLESS, "prompt": [9] * 3000})
    for round_ in range(20):
        wires = [target.wire() for _ in range(3)]
        for wire, request in zip(wires, (endless, whole, long), strict=True):
            wire.send(request)
        assert wires[0].receive()
        for wire in wires:
            (wire.close, wire.reset)[round_ % 2]()
    until(lambda: active(target.http) == 0, "no answers are under way")


def test_one_request_cannot_make_the_others_wait_for_long(target: Target):
    """Bodies with a million mistakes, and long texts: meanwhile /health answers."""
    usual = target.usual_seconds()
    costly = [
        post("/v1/completions", b'{"prompt":[' + b"1," * 1_000_000 + b'"x"]}'),
        post("/v1/chat/completions", b'{"messages":[' + b"1," * 1_000_000 + b"1]}"),
        post("/v1/completions", {"prompt": " " * 2_000_000}),
        post("/tokenize", {"content": "a" * 500_000, "with_pieces": True}),
    ]
    for request in costly:
        with target.wire(seconds=60) as wire:
            wire.send(request)
            slowest = 0.0
            for _ in range(20):
                begin, computed = time.monotonic(), target.cpu_seconds()
                target.http.get("/health").raise_for_status()
                seconds = min(time.monotonic() - begin, target.cpu_seconds() - computed)  # others may have the core
                slowest = max(slowest, seconds)
                time.sleep(0.02)
            assert (answer := wire.answer())
            assert not answer.complaint()
            assert slowest < max(2, 7 * usual), request[:60]


def test_an_answer_comes_without_waiting_for_acknowledgements(target: Target):
    """Head and body are two packets: with Nagle's algorithm the second would wait 40 ms for the client."""
    times = []
    with socket.create_connection((httpx.URL(target.url).host, httpx.URL(target.url).port or 80), 10) as plain:
        for _ in range(60):
            begin, data = time.monotonic(), b""
            plain.sendall(head("GET", "/health"))
            while not data.endswith(b"}"):
                data += plain.recv(1 << 16)
            times.append(time.monotonic() - begin)
    assert sorted(times)[5] < 0.03


@pytest.fixture(scope="module")
def dawdlers(running: Target) -> Iterator[list[float]]:
    """How long each of some connections lived that send a byte of a head every half second."""
    lives, stop = [], threading.Event()

    def dawdle(start: bytes) -> None:
        with running.wire() as wire:
            if start:
                wire.ask(head("GET", "/health"))
            wire.wait_at_most(0.5)
            begin = time.monotonic()
            while not stop.is_set():
                alive = wire.send(start[:1] or b"X")
                start = start[1:] or b"a"
                try:
                    alive = alive and bool(wire.receive())
                except TimeoutError:
                    continue
                if not alive:
                    lives.append(time.monotonic() - begin)
                    return

    starts = [b"" if i % 2 else b"GET /" + b"a" * 999 for i in range(SLOW_CONNECTIONS)]
    threads = [threading.Thread(target=dawdle, args=(start,)) for start in starts]
    for thread in threads:
        thread.start()
    yield lives
    stop.set()
    for thread in threads:
        thread.join(5)


def test_those_who_never_finish_a_head_are_dropped(dawdlers: list[float], target: Target):
    until(lambda: len(dawdlers) == SLOW_CONNECTIONS, "slow connections are dropped", HEADER_SECONDS + 30)
    assert max(dawdlers) < HEADER_SECONDS + 20
    assert min(dawdlers) > HEADER_SECONDS - 5


# -- what is left ----------------------------------------------------------------------------------------------------


def test_nothing_grows_and_nothing_is_left(target: Target):
    """The same again, once the first round has filled what is kept: threads, pools of memory, caches."""
    requests = [*all_bodies()[:400], *(post(path, body) for path, _, _ in SAMPLES[::3] for body in WHOLE)]
    in_threads(requests, lambda part: ask_all(target, part))
    files, memory = target.process.num_fds(), target.process.memory_info().rss
    for _ in range(2):
        in_threads(requests, lambda part: ask_all(target, part))
        in_threads([GOOD_POST[: 3 * i] for i in range(60)], lambda part: ask_each(target, part))
    until(lambda: active(target.http) == 0, "no answers are under way")
    until(lambda: target.process.num_fds() <= files + FEW_FILES, "connections are closed")
    assert target.process.memory_info().rss - memory < MEMORY
    assert "Traceback" not in target.served.launch.stderr()


def test_the_server_says_nothing_of_all_that(target: Target):
    """Neither standard error nor the log has a trace of what strangers did wrong."""
    assert "Traceback" not in target.served.launch.stderr(), target.served.launch.stderr()[-3000:]
    logs = sorted((target.served.rendezvous.parent / "log").iterdir())
    assert logs
    assert not [log.name for log in logs if "Traceback" in log.read_text(errors="replace")]


def test_an_answer_knows_what_it_must_not_show():
    """The checks of this file find what they are for."""
    safe = {"x-content-type-options": "nosniff"}
    assert Answer(500, safe, b"{}").complaint()
    assert Answer(400, safe, b"Bad Request").complaint()
    assert Answer(400, safe, b'{"error":{"message":"m","type":"t"}}').complaint()
    assert Answer(200, safe, f"see {ROOT}/x".encode()).complaint()
