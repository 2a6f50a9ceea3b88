"""`serve --pipeline`: a server whose layers lie on one stage of ranks after the other."""

import asyncio
import json

import openai
import pytest

from tests.server.conftest import Served, serving
from tests.system.mpi.launch import DEMO_MODEL, PROGRAM, TIMEOUT, run

pytestmark = pytest.mark.timeout(2 * TIMEOUT)

PROMPTS = ("Tell me a story.", "Once upon a time a llama waited in the queue.")
TOKENS = 24


def alone(prompt: str) -> str:
    """What one rank answers, without a server."""
    amount = ("--temperature", "0", "--max-tokens", str(TOKENS), "--threads", "1", "--json")
    result = run(None, *PROGRAM, "generate", "--model", DEMO_MODEL, "--chat", "--prompt", prompt, *amount)
    assert result.status == 0, result.stderr
    return json.loads(result.stdout)["text"]


def fields(prompt: str) -> dict[str, object]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": TOKENS}


async def streamed(served: Served, prompts: list[str]) -> list[str]:
    """The answers to one client's requests, which are under way at the same time."""
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

        async def ask(prompt: str) -> str:
            stream = await client.chat.completions.create(**fields(prompt), stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        return await asyncio.gather(*(ask(prompt) for prompt in prompts))


def test_two_stages_answer_with_the_tokens_of_one_rank(tmp_path):
    """One request at a time, and streams of two clients, whose sequences keep both stages busy."""
    expected = {prompt: alone(prompt) for prompt in PROMPTS}
    assert len(set(expected.values())) == len(PROMPTS)

    async def both(served: Served, count: int) -> list[list[str]]:
        return await asyncio.gather(*(streamed(served, [prompt] * count) for prompt in PROMPTS))

    with serving(DEMO_MODEL, tmp_path, 2, "--pipeline", "2", "--threads", "1") as served:
        for prompt in PROMPTS:
            answer = served.client.chat.completions.create(**fields(prompt))
            assert answer.choices[0].message.content == expected[prompt]
            assert answer.usage.completion_tokens == TOKENS
        for count in (1, 8):
            assert asyncio.run(both(served, count)) == [[expected[prompt]] * count for prompt in PROMPTS]
