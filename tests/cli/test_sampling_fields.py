"""A field that is added to SamplingParams is an option, a field of the API and a setting of the chat page by that."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from mpillama.cli.options import COMMANDS, options_of, parse, recorded_sampling
from mpillama.openai.bodies import ChatBody, CompletionBody, ServedChat, ServedCompletion
from mpillama.openai.responses import ResponseBody
from mpillama.server.chat_page import sampling_js
from mpillama.text.sampling_params import SamplingParams

BODIES = (ChatBody, CompletionBody, ServedChat, ServedCompletion, ResponseBody)
SAMPLING_COMMANDS = ("generate", "chat", "batch", "serve", "client")
OPTIONS = [name for name, about in SamplingParams.about().items() if about.option is not None]
ASKED = {name: about.asked for name, about in SamplingParams.about().items() if about.asked is not None}
SPELT_OTHERWISE = {"max_tokens", "top_k", "seed"}
"""Fields of which a request may have values, -1 or others, that mean something else."""


def page_fields(script: str) -> dict[str, dict[str, Any]]:
    line = script.splitlines()[0].removeprefix("export const FIELDS = ").removesuffix(";")
    return {field["name"]: field for field in json.loads(line)}


@pytest.mark.parametrize("command", SAMPLING_COMMANDS)
def test_each_command_has_all_options(command: str):
    assert set(OPTIONS) <= {name for name, _, _ in options_of(COMMANDS[command][0])}


def test_the_resume_check_of_batch_sees_every_option():
    given = {"temperature": 0.5, "logit_bias": {7: -1.5}, "stop": "END", "seed": 3}
    found = recorded_sampling(SamplingParams(**given))
    assert list(found) == OPTIONS
    assert {name: found[name] for name in given} == {
        "temperature": 0.5, "logit_bias": ["7=-1.5"], "stop": ["END"], "seed": 3
    }  # fmt: skip


def test_what_is_recorded_can_be_typed_again():
    given = ["--temperature", "0.5", "--logit-bias", "7=-1.5", "8=100", "--stop", "a", "b", "--seed", "3"]
    params = parse(["generate", *given])[1].sampling
    words: list[str] = []
    for name, value in recorded_sampling(params).items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)] if values else []
    assert parse(["generate", *words])[1].sampling == params


def numbers_in(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from (one for one in schema["anyOf"] if one["type"] in ("integer", "number"))


@pytest.mark.parametrize("body", BODIES)
def test_each_body_has_all_numbers_with_their_limits(body: type):
    properties = body.model_json_schema()["properties"]
    words = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    for name in set(ASKED) - SPELT_OTHERWISE:
        (found,) = numbers_in(properties[name])
        assert found == {
            "type": {int: "integer", float: "number"}[ASKED[name].kind],
            **{words[limit]: value for limit, value in ASKED[name].limits.items()},
        }


def test_the_page_has_all_fields_with_a_hint():
    fields = page_fields(sampling_js())
    assert list(fields) == [name for name, about in SamplingParams.about().items() if about.hint]
    assert fields["temperature"] == {
        "name": "temperature", "label": "Temperature", "min": 0, "max": 2, "step": "any",
        "hint": "0 takes the most likely token",
    }  # fmt: skip
    assert (fields["top_p"]["min"] > 0, fields["seed"]["max"], fields["seed"]["step"]) == (True, 2**53 - 1, 1)


ADDED = """
import json
from dataclasses import dataclass
from mpillama.text import sampling_params as module

@dataclass(frozen=True, kw_only=True)
class SamplingParams(module.SamplingParams):
    typical_p: float = module._param(
        1.0, module.SHARE, "0 to 1", option="keep the typical ones", metavar="P", asked=module.SHARE, hint="1 is off"
    )

module.SamplingParams = SamplingParams

from mpillama.openai.prompts import Prompter
from mpillama.openai.bodies import ServedChat
from mpillama.cli.options import parse, recorded_sampling
from mpillama.server.chat_page import sampling_js

body = ServedChat.model_validate({"messages": [{"role": "user", "content": "Hi"}], "typical_p": 0.25})
prompter = Prompter(None, None, 10, SamplingParams())
print(json.dumps({
    "option": parse(["--typical-p", "0.5"])[1].sampling.typical_p,
    "client": parse(["client", "--typical-p", "0.5"])[1].sampling,
    "resume": recorded_sampling(parse(["batch", "a", "b", "--typical-p", "0.75"])[1].sampling)["typical_p"],
    "body": prompter.sampling(body, 0).typical_p,
    "unknown": body.unknown_fields(),
    "page": "typical_p" in sampling_js(),
}))
"""


def test_a_field_that_is_added_is_everywhere():
    done = subprocess.run([sys.executable, "-c", ADDED], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "option": 0.5, "client": {"typical_p": 0.5}, "resume": 0.75, "body": 0.25, "unknown": [], "page": True,
    }  # fmt: skip


def test_a_value_out_of_range_is_refused_when_it_is_typed():
    with pytest.raises(Exception, match=r"top_p is 1\.5, but must be above 0, up to 1"):
        parse(["serve", "--top-p", "1.5"])
    with pytest.raises(Exception, match="--max-tokens is 0"):
        parse(["client", "--max-tokens", "0"])
