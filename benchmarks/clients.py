"""Ask a running server through the programs that people use, and tell in a table what works.

python -m venv clients; clients/bin/pip install 'mpillama[clients]'
clients/bin/python benchmarks/clients.py --url http://127.0.0.1:8000

lm-evaluation-harness, openai, litellm, langchain-openai, openai-agents and pydantic-ai; what is not installed is
skipped. The model need not be clever, since calls of tools and structured output are forced, but its chat template
must know tools, and it must come to an end: openai-agents takes a stream that the limit cuts for an error. The exit
status is 1 if anything failed.
"""

import argparse
import asyncio
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.request import Request, urlopen

from pydantic import BaseModel, Field

TIMEOUT = 120
HARNESS_TIMEOUT = 600
"""Seconds; it loads many modules before it asks."""
QUESTION = "What is a llama? Answer in five words."
LIMIT = 24
"""Tokens of a text."""
ROOM = 400
"""Tokens for what must come to its end."""


class Llama(BaseModel):
    """What structured answers must look like."""

    name: Annotated[str, Field(max_length=12)]
    age: Annotated[int, Field(ge=1, le=30)]


WEATHER = {
    "name": "weather",
    "description": "Tell the weather of a place.",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 12}},
        "required": ["place"],
        "additionalProperties": False,
    },
}


def weather(place: Annotated[str, Field(max_length=12)]) -> str:
    """Tell the weather of a place."""
    return f"It is sunny in {place}."


@dataclass(frozen=True)
class Server:
    """Where to ask."""

    url: str
    key: str
    model: str

    @property
    def api(self) -> str:
        """The base of OpenAI's API."""
        return f"{self.url}/v1"


Check = Callable[[Server], Any]
CHECKS: dict[str, dict[str, Check]] = {}


def check(client: str, what: str) -> Callable[[Check], Check]:
    """Note a check of a client, named as its package; it raises if something is wrong."""

    def note(function: Check) -> Check:
        CHECKS.setdefault(client, {})[what] = function
        return function

    return note


def is_llama(text: Any) -> None:
    """Text that fits the schema."""
    Llama.model_validate_json(text)


def is_weather(name: str, arguments: Any) -> None:
    """A call of the tool."""
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert name == "weather", name
    assert set(given) == {"place"}, given


def is_unit(vector: Any) -> None:
    """An embedding."""
    assert math.isclose(sum(x * x for x in vector), 1, rel_tol=1e-4)


# -- openai ------------------------------------------------------------------------------------------------------------


def openai_client(server: Server) -> Any:
    """OpenAI's client."""
    import openai

    return openai.OpenAI(base_url=server.api, api_key=server.key, timeout=TIMEOUT, max_retries=0)


def talk(server: Server) -> dict[str, Any]:
    """What chats have in common."""
    return {"model": server.model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": LIMIT}


@check("openai", "chat")
def openai_chat(server: Server) -> None:
    """An answer, which is sent back as the clients dump it."""
    client, fields = openai_client(server), talk(server)
    answer = client.chat.completions.create(**fields)
    assert answer.usage.completion_tokens > 0
    fields["messages"] += [answer.choices[0].message.model_dump(), {"role": "user", "content": "Go on."}]
    client.chat.completions.create(**fields)


@check("openai", "stream")
def openai_stream(server: Server) -> None:
    """The same text in pieces."""
    client, fields = openai_client(server), {**talk(server), "temperature": 0}
    parts = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**fields, stream=True)]
    assert "".join(parts) == (client.chat.completions.create(**fields).choices[0].message.content or "")


@check("openai", "tools")
def openai_tools(server: Server) -> None:
    """A forced call, and its result sent back."""
    client, fields = openai_client(server), {**talk(server), "max_tokens": ROOM}
    tools = [{"type": "function", "function": WEATHER}]
    message = client.chat.completions.create(**fields, tools=tools, tool_choice="required").choices[0].message
    (call, *_) = message.tool_calls
    is_weather(call.function.name, call.function.arguments)
    fields["messages"] += [message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    client.chat.completions.create(**fields, tools=tools)


@check("openai", "structured")
def openai_structured(server: Server) -> None:
    """Pydantic's model as the answer's form."""
    answer = openai_client(server).chat.completions.parse(**{**talk(server), "max_tokens": ROOM}, response_format=Llama)
    assert answer.choices[0].message.parsed is not None


@check("openai", "embeddings")
def openai_embeddings(server: Server) -> None:
    """Two texts."""
    found = openai_client(server).embeddings.create(model=server.model, input=["llama", "queue"])
    for one in found.data:
        is_unit(one.embedding)


@check("openai", "logprobs")
def openai_logprobs(server: Server) -> None:
    """Those of an echoed prompt: the names joined are the text."""
    found = openai_client(server).completions.create(
        model=server.model, prompt="Once upon a time", echo=True, logprobs=1, max_tokens=0
    )
    assert "".join(found.choices[0].logprobs.tokens) == found.choices[0].text == "Once upon a time"


@check("openai", "responses")
def openai_responses(server: Server) -> None:
    """A text, its stream, a forced call and a form."""
    client = openai_client(server)
    fields = {"model": server.model, "input": QUESTION, "max_output_tokens": ROOM}
    answer = client.responses.create(**fields, temperature=0)
    assert answer.object == "response"
    with client.responses.stream(**fields, temperature=0) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(pieces) == answer.output_text
    called = client.responses.create(**fields, tools=[{"type": "function", **WEATHER}], tool_choice="required")
    (call, *_) = [item for item in called.output if item.type == "function_call"]
    is_weather(call.name, call.arguments)
    assert client.responses.parse(**fields, text_format=Llama).output_parsed is not None


# -- litellm -----------------------------------------------------------------------------------------------------------


def litellm_fields(server: Server) -> dict[str, Any]:
    """How litellm asks a server of its own."""
    return {"model": f"openai/{server.model}", "api_base": server.api, "api_key": server.key}


@check("litellm", "chat")
def litellm_chat(server: Server) -> None:
    """An answer."""
    import litellm

    assert litellm.completion(**{**talk(server), **litellm_fields(server)}).usage.completion_tokens > 0


@check("litellm", "stream")
def litellm_stream(server: Server) -> None:
    """The same text in pieces."""
    import litellm

    fields = {**talk(server), **litellm_fields(server), "temperature": 0}
    parts = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**fields, stream=True)]
    assert "".join(parts) == (litellm.completion(**fields).choices[0].message.content or "")


@check("litellm", "tools")
def litellm_tools(server: Server) -> None:
    """A forced call."""
    import litellm

    tools = [{"type": "function", "function": WEATHER}]
    fields = {**talk(server), **litellm_fields(server), "max_tokens": ROOM}
    answer = litellm.completion(**fields, tools=tools, tool_choice="required")
    function = answer.choices[0].message.tool_calls[0].function
    is_weather(function.name, function.arguments)


@check("litellm", "structured")
def litellm_structured(server: Server) -> None:
    """Pydantic's model as the answer's form."""
    import litellm

    fields = {**talk(server), **litellm_fields(server), "max_tokens": ROOM}
    answer = litellm.completion(**fields, response_format=Llama)
    is_llama(answer.choices[0].message.content)


@check("litellm", "embeddings")
def litellm_embeddings(server: Server) -> None:
    """One text."""
    import litellm

    is_unit(litellm.embedding(input=["llama"], **litellm_fields(server)).data[0]["embedding"])


@check("litellm", "responses")
def litellm_responses(server: Server) -> None:
    """A text, and its stream."""
    import litellm

    fields = {**litellm_fields(server), "input": QUESTION, "max_output_tokens": LIMIT}
    assert litellm.responses(**fields).object == "response"
    kinds = [str(getattr(event.type, "value", event.type)) for event in litellm.responses(**fields, stream=True)]
    assert kinds[-1] in ("response.completed", "response.incomplete"), kinds


# -- langchain ---------------------------------------------------------------------------------------------------------


def langchain_model(server: Server, **fields: Any) -> Any:
    """LangChain's chat model."""
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        model=server.model, base_url=server.api, api_key=server.key, timeout=TIMEOUT, max_retries=0,
        max_tokens=ROOM, **fields,
    )  # fmt: skip


@check("langchain-openai", "chat")
def langchain_chat(server: Server) -> None:
    """An answer."""
    assert langchain_model(server).invoke(QUESTION).usage_metadata["output_tokens"] > 0


@check("langchain-openai", "stream")
def langchain_stream(server: Server) -> None:
    """The same text in pieces."""
    model = langchain_model(server, temperature=0)
    assert "".join(part.text for part in model.stream(QUESTION)) == model.invoke(QUESTION).text


@check("langchain-openai", "tools")
def langchain_tools(server: Server) -> None:
    """A forced call."""
    call = (
        langchain_model(server)
        .bind_tools([{"type": "function", "function": WEATHER}], tool_choice="weather")
        .invoke(QUESTION)
        .tool_calls[0]
    )
    assert call["name"] == "weather", call


@check("langchain-openai", "structured")
def langchain_structured(server: Server) -> None:
    """In both ways: a schema, and a call."""
    for method in ("json_schema", "function_calling"):
        assert isinstance(langchain_model(server).with_structured_output(Llama, method=method).invoke(QUESTION), Llama)


@check("langchain-openai", "embeddings")
def langchain_embeddings(server: Server) -> None:
    """One text; without this option LangChain sends the ids of OpenAI's tokenizer."""
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(
        model=server.model, base_url=server.api, api_key=server.key, check_embedding_ctx_length=False
    )
    is_unit(embeddings.embed_query("llama"))


@check("langchain-openai", "responses")
def langchain_responses(server: Server) -> None:
    """A text, its stream, and a forced call."""
    model = langchain_model(server, use_responses_api=True, temperature=0)
    assert "".join(part.text for part in model.stream(QUESTION)) == model.invoke(QUESTION).text
    call = (
        model.bind_tools([{"type": "function", "function": WEATHER}], tool_choice="weather")
        .invoke(QUESTION)
        .tool_calls[0]
    )
    assert call["name"] == "weather", call


# -- openai-agents -----------------------------------------------------------------------------------------------------


def run_agent(server: Server, by_responses: bool, stream: bool = False, **fields: Any) -> Any:
    """Let an agent answer, by one of the two APIs."""
    import agents
    import openai

    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=server.api, api_key=server.key, timeout=TIMEOUT, max_retries=0)
    kind = agents.OpenAIResponsesModel if by_responses else agents.OpenAIChatCompletionsModel
    settings = agents.ModelSettings(max_tokens=ROOM, temperature=0, **fields.pop("settings", {}))
    agent = agents.Agent(
        "llama", instructions="Be short.", model=kind(server.model, client), model_settings=settings, **fields
    )

    async def go() -> Any:
        async with client:
            if not stream:
                return await agents.Runner.run(agent, QUESTION)
            result = agents.Runner.run_streamed(agent, QUESTION)
            events = [event async for event in result.stream_events()]
            assert any(event.type == "raw_response_event" for event in events)
            return result

    return asyncio.run(go())


def agent_tools(server: Server, by_responses: bool) -> None:
    """A forced call of a Python function, which the agent runs."""
    import agents

    result = run_agent(
        server, by_responses, tools=[agents.function_tool(weather)], settings={"tool_choice": "required"},
        tool_use_behavior="stop_on_first_tool",
    )  # fmt: skip
    assert "sunny" in result.final_output, result.final_output


def agent_structured(server: Server, by_responses: bool) -> None:
    """Pydantic's model as the answer's form."""
    assert isinstance(run_agent(server, by_responses, output_type=Llama).final_output, Llama)


@check("openai-agents", "chat")
def agents_chat(server: Server) -> None:
    """By chat completions."""
    assert isinstance(run_agent(server, False).final_output, str)


@check("openai-agents", "stream")
def agents_stream(server: Server) -> None:
    """By chat completions."""
    assert isinstance(run_agent(server, False, stream=True).final_output, str)


@check("openai-agents", "tools")
def agents_tools(server: Server) -> None:
    """By chat completions."""
    agent_tools(server, False)


@check("openai-agents", "structured")
def agents_structured(server: Server) -> None:
    """By chat completions."""
    agent_structured(server, False)


@check("openai-agents", "responses")
def agents_responses(server: Server) -> None:
    """All of it by the Responses API, its default."""
    assert isinstance(run_agent(server, True).final_output, str)
    assert isinstance(run_agent(server, True, stream=True).final_output, str)
    agent_tools(server, True)
    agent_structured(server, True)


# -- pydantic-ai -------------------------------------------------------------------------------------------------------


def pydantic_agent(server: Server, by_responses: bool = False, **fields: Any) -> Any:
    """An agent of pydantic-ai."""
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    kind = OpenAIResponsesModel if by_responses else OpenAIChatModel
    model = kind(server.model, provider=OpenAIProvider(base_url=server.api, api_key=server.key))
    return Agent(model, model_settings={"max_tokens": ROOM, "timeout": TIMEOUT}, **fields)


@check("pydantic-ai-slim", "chat")
def pydantic_chat(server: Server) -> None:
    """An answer."""
    assert isinstance(pydantic_agent(server).run_sync(QUESTION).output, str)


@check("pydantic-ai-slim", "stream")
def pydantic_stream(server: Server) -> None:
    """A text in pieces."""

    async def go() -> list[str]:
        async with pydantic_agent(server).run_stream(QUESTION) as result:
            return [part async for part in result.stream_text(delta=True)]

    assert "".join(asyncio.run(go()))


@check("pydantic-ai-slim", "tools")
def pydantic_tools(server: Server) -> None:
    """An output that is the call of a function."""
    assert "sunny" in pydantic_agent(server, output_type=weather).run_sync(QUESTION).output


@check("pydantic-ai-slim", "structured")
def pydantic_structured(server: Server) -> None:
    """In both ways: a call, and a schema."""
    from pydantic_ai import NativeOutput

    for kind in (Llama, NativeOutput(Llama)):
        assert isinstance(pydantic_agent(server, output_type=kind).run_sync(QUESTION).output, Llama)


@check("pydantic-ai-slim", "responses")
def pydantic_responses(server: Server) -> None:
    """A text, and a form."""
    assert isinstance(pydantic_agent(server, by_responses=True).run_sync(QUESTION).output, str)
    assert isinstance(pydantic_agent(server, by_responses=True, output_type=Llama).run_sync(QUESTION).output, Llama)


# -- lm-evaluation-harness ---------------------------------------------------------------------------------------------

ROWS = [
    {"question": "The cat sat on the", "choices": [" mat", " seven purple"], "answer": 0},
    {"question": "One, two, three,", "choices": [" of the xyz", " four"], "answer": 1},
]
TASK = """
task: likelier
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: '{{question}}'
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ''
metric_list: [{metric: acc}]
"""


@check("lm-eval", "likelihood")
def lm_eval_likelihood(server: Server) -> None:
    """A task of multiple choice, made here."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
        (folder / "task.yaml").write_text(TASK.replace("ROWS", str(folder / "rows.jsonl")))
        arguments = f"base_url={server.api}/completions,model={server.model},auth_token={server.key}"
        command = [
            sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments,
            "--include_path", name, "--tasks", "likelier", "--batch_size", "2", "--output_path", f"{name}/out",
        ]  # fmt: skip
        env = {**os.environ, "HF_HOME": f"{name}/hf", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": server.key}
        done = subprocess.run(command, env=env, cwd=name, timeout=HARNESS_TIMEOUT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-400:]
        (path,) = folder.glob("out/**/results_*.json")
        accuracy = json.loads(path.read_text())["results"]["likelier"]["acc,none"]
        assert accuracy in (0, 0.5, 1), accuracy


# ----------------------------------------------------------------------------------------------------------------------


def version(package: str) -> str | None:
    """Of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def outcome(function: Check, server: Server) -> str:
    """How a check went, in a line."""
    start = time.monotonic()
    try:
        function(server)
    except Exception as error:  # noqa: BLE001 - whatever a client raises is the result
        return f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return f"passed ({time.monotonic() - start:.1f} s)"


def find_model(url: str, key: str) -> str:
    """The name of the model that is served."""
    with urlopen(Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}), timeout=TIMEOUT) as answer:
        return str(json.load(answer)["data"][0]["id"])


def main() -> int:
    """Run the checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server, without /v1")
    parser.add_argument("--key", default="none")
    parser.add_argument("--only", nargs="*", default=list(CHECKS), choices=list(CHECKS), help="these clients")
    options = parser.parse_args()
    os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_AGENTS_DISABLE_TRACING": "1"}
    url = options.url.rstrip("/")
    server = Server(url, options.key, find_model(url, options.key))
    failed = 0
    for client in options.only:
        found = version(client)
        for what, function in CHECKS[client].items():
            result = outcome(function, server) if found else f"skipped: {client} is not installed"
            failed += result.startswith("FAILED")
            print(f"{client:18} {found or '-':10} {what:12} {result}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
