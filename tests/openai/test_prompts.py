"""From bodies to prompts: how the chat template is used, messages that are continued, texts between ids."""

from typing import Any

import pytest

from mpillama.errors import UserError
from mpillama.openai.bodies import ChatBody, CompletionBody
from mpillama.openai.body import BadRequest, parse_body
from mpillama.openai.prompts import Prompter
from mpillama.text.chat_template import ChatTemplate
from mpillama.text.sampling_params import SamplingParams
from mpillama.text.tokenizer import Tokenizer
from tests import tiny_models as models

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TRIMMING = PLAIN.replace("m.content", "m.content | trim")
THINKING = PLAIN + (
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% if reasoning_effort is defined %}[{{ reasoning_effort }}]{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + PLAIN
)
FORGETFUL = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
STORY = [{"role": "user", "content": "Tell"}]


def prompter(template: str = PLAIN, bos: int | None = models.BOS, ends: tuple[int, ...] = (models.EOS,)) -> Prompter:
    tokenizer = Tokenizer(models.toy_tokenizer(), bos_token_id=bos, eos_token_ids=ends, add_bos=bos is not None)
    recorded = ChatTemplate(template, bos_token="", eos_token="</s>")
    return Prompter(tokenizer, lambda: recorded, 320, SamplingParams(max_tokens=9))


def text_of(asks: Prompter, messages: list[dict[str, Any]], **fields: Any) -> str:
    """The prompt of a conversation, as text."""
    body = parse_body(ChatBody, {"messages": messages, **fields})
    return asks.tokenizer.decode(asks.request(body, None).prompt_ids, skip_special=False).removeprefix("<|begin|>")


def test_the_template_is_told_its_own_variables():
    asks = prompter(THINKING)
    whole = text_of(asks, STORY)
    assert text_of(asks, STORY, chat_template_kwargs={"enable_thinking": True}) == whole
    assert text_of(asks, STORY, chat_template_kwargs={"enable_thinking": False}) == whole + "<think></think>"
    assert text_of(asks, STORY, reasoning_effort="none") == whole + "<think></think>[none]"
    assert text_of(asks, STORY, reasoning_effort="low") == whole + "[low]"
    kwargs = {"reasoning_effort": "mine"}
    assert text_of(asks, STORY, reasoning_effort="low", chat_template_kwargs=kwargs) == whole + "[mine]"
    assert text_of(asks, STORY, add_generation_prompt=False) + "<|assistant|>" == whole


@pytest.mark.parametrize(("effort", "told"), [("none", "False"), ("low", "True"), (None, "")])
def test_effort_switches_the_thinking_of_templates_that_know_it_by_this_name(effort: str | None, told: str):
    asks = prompter(PLAIN + "{% if thinking is defined %}{{ thinking }}{% endif %}")
    assert text_of(asks, STORY, reasoning_effort=effort) == text_of(prompter(PLAIN), STORY) + told


@pytest.mark.parametrize("name", ["self", "messages", "tools", "add_generation_prompt", "continue_final_message"])
def test_the_template_s_other_variables_are_fields_of_the_request(name: str):
    with pytest.raises(BadRequest, match=f"chat_template_kwargs: '{name}' is said by a field"):
        text_of(prompter(), STORY, chat_template_kwargs={name: 1})


@pytest.mark.parametrize("template", [PLAIN, TRIMMING, THINKING])
@pytest.mark.parametrize("content", ["Once upon", "Once ", "s", "</s>", "Tell", "", " ", "assistant"])
def test_a_message_is_continued_where_it_ends(template: str, content: str):
    """Wherever its words stand as well, and whatever the template writes behind it."""
    begun = [*STORY, {"role": "assistant", "content": content}]
    found = text_of(prompter(template), begun, continue_final_message=True)
    shown = content.lstrip() if template == TRIMMING else content
    assert found == f"<|user|>Tell</s><|assistant|>{shown}"


def test_only_the_assistant_s_message_is_continued_and_only_if_it_is_shown():
    with pytest.raises(BadRequest, match="not the assistant's") as refusal:
        text_of(prompter(), STORY, continue_final_message=True)
    assert refusal.value.field == "continue_final_message"
    begun = [*STORY, {"role": "assistant", "content": "Once"}]
    with pytest.raises(BadRequest, match="excludes add_generation_prompt"):
        text_of(prompter(), begun, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(BadRequest, match="does not show the last message"):
        text_of(prompter(FORGETFUL), begun, continue_final_message=True)


def test_two_turns_in_a_row_are_the_template_s_matter():
    twice = [*STORY, {"role": "assistant", "content": "One."}, {"role": "assistant", "content": "Two."}]
    assert text_of(prompter(), twice) == "<|user|>Tell</s><|assistant|>One.</s><|assistant|>Two.</s><|assistant|>"
    with pytest.raises(BadRequest, match="roles must alternate"):
        text_of(prompter(STRICT), twice)


def test_older_and_newer_forms_of_messages_are_one_to_the_template():
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}:{{ m.tool_call_id }}:"
        "{% for c in m.tool_calls or [] %}{{ c.id }}.{{ c.function.name }}({{ c.function.arguments }}){% endfor %};"
        "{% endfor %}"
    )
    older = [
        {"role": "assistant", "function_call": {"name": "f", "arguments": None}},
        {"role": "function", "name": "f", "content": "3"},
    ]
    newer = [
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None,
         "tool_calls": [{"id": "call_f", "type": None, "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "call_f", "content": [{"type": "text", "text": "3", "cache_control": {}}]},
    ]  # fmt: skip
    found = {text_of(prompter(template), [*STORY, *messages]) for messages in (older, newer)}
    assert len(found) == 1
    assert found.pop().endswith("tool:3:call_f:;")


def test_texts_stand_between_ids_without_another_bos():
    asks = prompter()
    encode = asks.tokenizer.encode
    assert asks.prompt_ids(["a", 7, "b"]) == [*encode("a"), 7, *encode("b", add_bos=False)]
    assert asks.prompt_ids([7, "b"]) == [7, *encode("b", add_bos=False)]
    assert asks.prompt_ids([7, 8]) == [7, 8]


def test_an_empty_prompt_is_the_beginning_of_a_text():
    assert prompter().prompt_ids("") == prompter().prompt_ids(None) == [models.BOS]
    assert prompter(bos=None).prompt_ids("") == [models.EOS]
    assert prompter(bos=None, ends=()).prompt_ids("") == []


def request(**fields: Any) -> Any:
    return prompter().request(parse_body(CompletionBody, {"prompt": "a", **fields}), None, seed=5)


def test_minus_one_is_what_it_is_elsewhere():
    assert request(max_tokens=-1).sampling.max_tokens is None
    assert request().sampling.max_tokens == 9
    assert request(top_k=-1).sampling == request(top_k=0).sampling
    assert request(seed=-1).sampling.seed == request(seed=None).sampling.seed == 5
    seeds = {request(seed=seed).sampling.seed for seed in (-2, -3, -(2**63), 0, 2**63 - 1)}
    assert len(seeds) == 5
    assert min(seeds) >= 0


def test_a_seed_of_the_command_does_not_count_where_none_in_particular_is_wanted():
    asks = prompter()
    fixed = Prompter(asks.tokenizer, asks.template, 320, SamplingParams(seed=3, max_tokens=9))
    body = parse_body(CompletionBody, {"prompt": "a", "seed": -1})
    assert fixed.request(body, None, seed=5).sampling.seed == 5


def test_rows_of_a_batch_share_their_blocks_unless_they_say_otherwise():
    assert request().cache_salt == request(cache_salt=None).cache_salt == ""
    assert request(cache_salt="mine").cache_salt == "mine"


def test_what_no_text_can_be_is_refused():
    with pytest.raises(UserError):
        prompter().prompt_ids([7, "\ud800"])
