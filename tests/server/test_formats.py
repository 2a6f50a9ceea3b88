"""The formats of model families end to end: thoughts, words and calls in both APIs, streamed or not."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import serving
from tests.server.reciting import write_reciting
from tests.system.mpi.launch import TIMEOUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 60)]

TEMPLATES = Path(__file__).parents[1] / "golden" / "chat_templates"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
}
TOOL = {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}
WEATHER = {"type": "function", "function": TOOL}
CALLING, TALKING = ([{"role": "user", "content": text}] for text in ("Is it raining?", "Are llamas kind?"))
ARGUMENTS = {"city": "New York", "days": 3}
JSON = json.dumps(ARGUMENTS)
THOUGHT, WORDS = "I look it up.", "Yes: <b>always</b>."


@dataclass(frozen=True)
class Format:
    """A template, the marks of its vocabulary, pieces of an answer that calls and of one that talks, and its thoughts.

    `said` is what stands before a call; `ends` are tokens that end an answer.
    """

    template: str
    marks: str
    calling: tuple[str, ...]
    talking: tuple[str, ...]
    thoughts: tuple[str, str] = ("", "")
    said: str = ""
    ends: tuple[str, ...] = ("<|done|>",)


GLM_CALL = (
    "<tool_call>", "weather\n", "<arg_key>", "city", "</arg_key>", "\n", "<arg_value>", "New York", "</arg_value>",
    "\n", "<arg_key>", "days", "</arg_key>", "\n", "<arg_value>", "3", "</arg_value>", "\n", "</tool_call>",
)  # fmt: skip
OF_DEEPSEEK = (
    "<｜User｜> <｜Assistant｜> <think> </think> <｜tool▁calls▁begin｜> <｜tool▁call▁begin｜> <｜tool▁sep｜> "
    "<｜tool▁call▁end｜> <｜tool▁calls▁end｜>"
)
NS, DSML = "]<]minimax[>[", "｜DSML｜"
THINKS = ("<think>", f"\n{THOUGHT}\n", "</think>")
FORMATS = {
    "gpt-oss": Format(
        "harmony",
        "<|start|> <|end|> <|message|> <|channel|> <|constrain|>",
        (
            *("<|channel|>", "analysis", "<|message|>", THOUGHT, "<|end|>", "<|start|>", "assistant", "<|channel|>"),
            *("commentary to=functions.weather ", "<|constrain|>", "json", "<|message|>", JSON, "<|call|>"),
        ),
        (
            *("<|channel|>", "analysis", "<|message|>", THOUGHT, "<|end|>", "<|start|>", "assistant"),
            *("<|channel|>", "final", "<|message|>", WORDS, "<|return|>"),
        ),
        (THOUGHT, THOUGHT),
        ends=("<|return|>", "<|call|>"),
    ),
    "glm": Format(
        "glm",
        "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <think> </think> <tool_call> </tool_call> "
        "<arg_key> </arg_key> <arg_value> </arg_value>",
        (*THINKS, "\n", *GLM_CALL),
        (*THINKS, f"\n{WORDS}"),
        (THOUGHT, THOUGHT),
    ),
    "hy3": Format(
        "hy3",
        "<think:toy> </think:toy> <tool_calls:toy> </tool_calls:toy> <tool_call:toy> </tool_call:toy> <tool_sep:toy> "
        "<arg_key:toy> </arg_key:toy> <arg_value:toy> </arg_value:toy>",
        (
            *("<tool_calls:toy>", "\n", "<tool_call:toy>", "weather", "<tool_sep:toy>", "\n"),
            *(p.replace(">", ":toy>") for p in GLM_CALL[2:]),
            "\n",
            "</tool_calls:toy>",
        ),
        (WORDS,),
    ),
    "minimax-m2": Format(
        "minimax",
        "]~!b[ ]~b] [e~[ <think> </think> <minimax:tool_call> </minimax:tool_call>",
        (
            *(f"{THOUGHT}\n", "</think>", "\n\n", "<minimax:tool_call>", '\n<invoke name="weather">\n'),
            *('<parameter name="city">New York</parameter>\n<parameter name="days">3</parameter>\n</invoke>\n',),
            "</minimax:tool_call>",
        ),
        (f"{THOUGHT}\n", "</think>", f"\n\n{WORDS}"),
        (THOUGHT, THOUGHT),
    ),
    "minimax-m3": Format(
        "minimax_m3",
        "]~!b[ ]~b] [e~[ <mm:think> </mm:think> ]<]minimax[>[",
        (
            *(f"{THOUGHT}\n", "</mm:think>", "\n\n", NS, "<tool_call>\n", NS, '<invoke name="weather">\n', NS),
            *("<city>New York", NS, "</city>\n", NS, "<days>3", NS, "</days>\n", NS, "</invoke>\n", NS, "</tool_call>"),
        ),
        (f"{THOUGHT}\n", "</mm:think>", f"\n\n{WORDS}"),
        (THOUGHT, THOUGHT),
    ),
    "deepseek-v3.2": Format(
        "deepseek_v32",
        "<｜User｜> <｜Assistant｜> <think> </think> ｜DSML｜",
        (
            *("\n\n<", DSML, "function_calls>\n<", DSML, 'invoke name="weather">\n<', DSML),
            *('parameter name="city" string="true">New York</', DSML, "parameter>\n<", DSML),
            *('parameter name="days" string="false">3</', DSML, "parameter>\n</", DSML, "invoke>\n</", DSML),
            "function_calls>",
        ),
        (WORDS,),
    ),
    "deepseek-v3.1": Format(
        "deepseek",
        OF_DEEPSEEK,
        (
            *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "weather", "<｜tool▁sep｜>", JSON),
            *("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
        ),
        (WORDS,),
    ),
    "deepseek-r1": Format(
        "deepseek_r1",
        OF_DEEPSEEK,
        (
            *(
                f"{THOUGHT}\n",
                "</think>",
                "<｜tool▁calls▁begin｜>",
                "<｜tool▁call▁begin｜>",
                "function",
                "<｜tool▁sep｜>",
            ),
            *(f"weather\n```json\n{JSON}\n```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
        ),
        (f"{THOUGHT}\n", "</think>", f"\n\n{WORDS}"),
        (THOUGHT, THOUGHT),
    ),
    "kimi-k2": Format(
        "kimi",
        "<|im_system|> <|im_middle|> <|im_user|> <|im_assistant|> <|im_end|> <think> </think> "
        "<|tool_calls_section_begin|> <|tool_call_begin|> <|tool_call_argument_begin|> "
        "<|tool_call_end|> <|tool_calls_section_end|>",
        (
            *(*THINKS, "I look.", "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "functions.weather:0"),
            *("<|tool_call_argument_begin|>", JSON, "<|tool_call_end|>", "<|tool_calls_section_end|>"),
        ),
        (WORDS,),
        (THOUGHT, ""),
        said="I look.",
    ),
    "ministral-3": Format(
        "ministral3",
        "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [INST] [/INST] [THINK] [/THINK] [TOOL_CALLS] [ARGS] [AVAILABLE_TOOLS] "
        "[/AVAILABLE_TOOLS]",
        ("[THINK]", THOUGHT, "[/THINK]", "[TOOL_CALLS]", "weather", "[ARGS]", JSON),
        ("[THINK]", THOUGHT, "[/THINK]", WORDS),
        (THOUGHT, THOUGHT),
    ),
    "llama-4": Format(
        "llama4",
        "<|header_start|> <|header_end|> <|eot|> <|python_start|> <|python_end|>",
        ("<|python_start|>", '[weather(city="New York", days=3)]', "<|python_end|>"),
        (WORDS,),
    ),
}


@pytest.fixture(scope="module", params=FORMATS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Format, httpx.Client]]:
    form, folder = FORMATS[request.param], tmp_path_factory.mktemp("formats")
    how = {"tools": [WEATHER], "add_generation_prompt": True}
    answers = [({"messages": CALLING, **how}, form.calling), ({"messages": TALKING, **how}, form.talking)]
    source = (TEMPLATES / f"{form.template}.jinja").read_text("utf-8")
    write_reciting(folder / "model", source, form.marks.split(), answers, form.ends)
    with serving(folder / "model", folder, 1, "--kv-type", "f32") as server, server.http() as http:
        yield form, http


def events(text: str) -> list[dict[str, Any]]:
    lines = (line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {"))
    return [json.loads(line) for line in lines]


def expected(form: Format, calls: bool) -> tuple[str, str, list[tuple[str, Any]]]:
    said = form.said if calls else WORDS
    return form.thoughts[0 if calls else 1], said, [("weather", ARGUMENTS)] if calls else []


@pytest.mark.parametrize("calls", [True, False])
def test_a_chat(served, calls):
    form, http = served
    body = {"messages": CALLING if calls else TALKING, "tools": [WEATHER], "temperature": 0, "max_tokens": 300}
    choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    message, called = choice["message"], choice["message"].get("tool_calls", [])
    found = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in called]
    assert (message.get("reasoning_content", "").strip(), message["content"] or "", found) == expected(form, calls)
    assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
    chunks = events(http.post("/v1/chat/completions", json={**body, "stream": True}).text)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    pieces = [call["function"] for delta in deltas for call in delta.get("tool_calls", [])]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message.get("reasoning_content", "")
    assert "".join(delta.get("content") or "" for delta in deltas) == (message["content"] or "")
    assert "".join(piece["arguments"] for piece in pieces) == "".join(c["function"]["arguments"] for c in called)
    assert [piece["name"] for piece in pieces if "name" in piece] == [name for name, _ in found]


@pytest.mark.parametrize("calls", [True, False])
def test_a_response(served, calls):
    form, http = served
    asked = {"input": CALLING if calls else TALKING, "tools": [{"type": "function", **TOOL}], "temperature": 0}
    body = {**asked, "max_output_tokens": 300}
    whole = http.post("/v1/responses", json=body).json()["output"]
    streamed = events(http.post("/v1/responses", json={**body, "stream": True}).text)[-1]["response"]["output"]
    for output in (whole, streamed):
        thought, said, found = "", "", []
        for item in output:
            if item["type"] == "reasoning":
                thought = item["content"][0]["text"].strip()
            elif item["type"] == "message":
                said = item["content"][0]["text"]
            else:
                found.append((item["name"], json.loads(item["arguments"])))
        assert (thought, said, found) == expected(form, calls)
