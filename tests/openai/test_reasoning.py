"""Thoughts are told apart by the family's own marks, wherever the answer is cut into pieces."""

import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
import tokenizers

from mpillama.engine.answer import Answer
from mpillama.openai.answer_formats import reasoning_format
from mpillama.openai.messages import Message
from mpillama.openai.object_calls import HERMES
from mpillama.openai.reasoning import PAIRS, ReasoningFormat
from mpillama.openai.tool_calls import ToolFormat
from mpillama.text.sampling_params import SamplingParams
from mpillama.text.tokenizer import Tokenizer
from tests import tiny_models as models

if TYPE_CHECKING:
    from mpillama.server.choices import ChatChoice

OPEN, CLOSE = PAIRS[0]
QWEN = "{{ messages }}{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
THINKING, SAYING, MENTION = "\nLlamas are kind.\n\n", "\n\nYes: always.", "`</think>` ends, `<think>` begins."


def tokenizer(special: bool | None) -> Tokenizer:
    """With the marks as special tokens, as ordinary added ones, or (None) without them."""
    toy = tokenizers.Tokenizer.from_buffer(models.toy_tokenizer())
    if special is not None:
        toy.add_tokens([tokenizers.AddedToken(mark, special=special, normalized=False) for mark in (OPEN, CLOSE)])
    return Tokenizer(toy.to_str().encode(), bos_token_id=0, eos_token_ids=(1,), add_bos=False)


def added(tokens: Tokenizer, text: str) -> int | None:
    known = json.loads(tokens.to_bytes())["added_tokens"]
    return next((token["id"] for token in known if token["content"] == text), None)


def form_of(tokens: Tokenizer) -> ReasoningFormat:
    form = reasoning_format(QWEN, lambda text: added(tokens, text))
    assert form is not None
    return form


def ids_of(tokens: Tokenizer, pieces: Sequence[str]) -> list[int]:
    """Marks as tokens where they are some; everything else, also a mark within a piece, as ordinary text."""
    plain = tokenizer(None)
    return [
        token
        for piece in pieces
        for token in ([added(tokens, piece)] if added(tokens, piece) is not None else plain.encode(piece))
        if token is not None
    ]


def answered(
    tokens: Tokenizer,
    pieces: Sequence[str],
    is_open: bool = False,
    stops: Sequence[str] = (),
    sizes: random.Random | None = None,
    keep_special: bool = False,
    tools: ToolFormat | None = None,
) -> "ChatChoice":
    """An answer of these tokens on its way through the engine's Answer to the message, a few tokens a step."""
    from mpillama.server.choices import ChatChoice
    from mpillama.server.engine_requests import Output, ServerRequest

    form = form_of(tokens)
    calls = tools.parser() if tools else None
    choice = ChatChoice(0, tokens, ServerRequest([], SamplingParams()), False, calls, thoughts=form.parser(is_open))
    answer = Answer(tokens, SamplingParams(max_tokens=1000, stop=stops), keep_special, form.marking)
    step, text, told = [], "", 0
    entries = []
    for token in [*ids_of(tokens, pieces), 1]:
        step.append(token)
        text += answer.push(token, 1000)
        if answer.finish_reason is None and sizes is not None and sizes.random() < 0.5:
            continue
        entries += choice.push(Output(0, step, text, (), answer.finish_reason, marks=answer.marks[told:]))
        step, text, told = [], "", len(answer.marks)
        if answer.finish_reason is not None:
            break
    message = choice.whole()["message"]
    deltas = [entry["delta"] for entry in entries]
    for name in ("content", "reasoning_content", "reasoning"):
        assert "".join(delta.get(name, "") for delta in deltas) == (message.get(name) or "")
    return choice


def parts(choice: "ChatChoice") -> tuple[str | None, str | None]:
    message = choice.whole()["message"]
    assert message.get("reasoning") == message.get("reasoning_content")
    return message.get("reasoning_content"), message["content"]


@pytest.mark.parametrize("special", [True, False, None])
@pytest.mark.parametrize("keep_special", [True, False])
@pytest.mark.parametrize("is_open", [True, False])
def test_a_thought_is_told_apart_however_the_answer_is_cut(special, keep_special, is_open):
    """Its mark may be special (and so no part of the text), and the prompt may have opened it."""
    tokens = tokenizer(special)
    pieces = [*([] if is_open else [OPEN]), THINKING, CLOSE, SAYING]
    for seed in range(20):
        choice = answered(tokens, pieces, is_open, sizes=random.Random(seed), keep_special=keep_special)
        assert parts(choice) == ("Llamas are kind.", "Yes: always.")
        if special is not None:
            assert choice.reasoning_tokens == len(ids_of(tokens, [THINKING]))


@pytest.mark.parametrize("special", [True, False, None])
def test_an_answer_that_mentions_the_marks_is_not_torn(special):
    tokens = tokenizer(special)
    assert parts(answered(tokens, [MENTION])) == (None, MENTION)
    thought = answered(tokens, [OPEN, "Marks?", CLOSE, MENTION])
    assert parts(thought) == ("Marks?", MENTION)


def test_marks_that_are_tokens_are_not_taken_for_those_that_are_spelled():
    tokens = tokenizer(special=True)
    assert parts(answered(tokens, [OPEN, MENTION, CLOSE, "Yes."])) == (MENTION, "Yes.")
    spelled = ["<thi", "nk>Hm.</thi", "nk>Yes."]
    assert parts(answered(tokens, spelled)) == (None, "<think>Hm.</think>Yes.")


@pytest.mark.parametrize("special", [True, None])
def test_a_thought_without_an_end_is_a_thought(special):
    choice = answered(tokenizer(special), [OPEN, "\nOn and on \n"])
    assert parts(choice) == ("On and on \n", "")
    assert choice.reasoning_tokens > 3


@pytest.mark.parametrize("special", [True, False, None])
def test_an_empty_thought_is_none(special):
    assert parts(answered(tokenizer(special), [OPEN, "\n\n", CLOSE, "\n\nYes."])) == (None, "Yes.")


@pytest.mark.parametrize("special", [True, False, None])
def test_text_that_a_stop_string_held_back_comes_to_its_part(special):
    tokens = tokenizer(special)
    stops = ["kind.\n\n\n\nNo"]
    assert parts(answered(tokens, [OPEN, THINKING, CLOSE, SAYING], stops=stops)) == ("Llamas are kind.", "Yes: always.")
    cut = answered(tokens, [OPEN, THINKING, CLOSE, SAYING], stops=["are"])
    assert parts(cut) == ("Llamas ", "")


@pytest.mark.parametrize("special", [True, False, None])
def test_a_call_is_found_behind_a_thought_and_not_within_it(special):
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    for seed in range(10):
        pieces = [OPEN, f"I could {call} it.", CLOSE, f"\n{call}"]
        choice = answered(tokenizer(special), pieces, sizes=random.Random(seed), keep_special=True, tools=HERMES)
        message = choice.whole()["message"]
        assert message["reasoning_content"] == f"I could {call} it."
        assert (message["content"], [c["function"]["name"] for c in message["tool_calls"]]) == (None, ["f"])
        assert choice.finish_reason == "tool_calls"


def test_white_space_of_an_answer_without_thought_stays():
    assert parts(answered(tokenizer(None), ["\n  a", "\n b \n"])) == (None, "\n  a\n b \n")


def test_formats_come_from_the_template_or_the_vocabulary():
    none = lambda text: None  # noqa: E731
    assert reasoning_format("{{ messages }}{# <think> #}", none) is None
    assert reasoning_format("{{ content.split('</think>')[-1] }}", none) == ReasoningFormat("<think>", "</think>")
    of_minimax = "{{ '<mm:think>' if thinking_mode == 'enabled' }}"
    assert reasoning_format(of_minimax, none) == ReasoningFormat("<mm:think>", "</mm:think>")
    by_id = reasoning_format("{{ messages }}", {"[THINK]": 7, "[/THINK]": 8}.get)
    assert by_id == ReasoningFormat("[THINK]", "[/THINK]", 7, 8)
    assert by_id.marking == {7, 8}


def test_only_the_end_of_a_prompt_opens_a_thought():
    form = ReasoningFormat(OPEN, CLOSE)
    assert form.opens("<|Assistant|><think>\n")
    assert not form.opens("<think>\n\n</think>\n\n")
    assert not form.opens("What is <think>?<|Assistant|>")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_thought_that_is_sent_back_reaches_the_template(name):
    message = Message.model_validate({"role": "assistant", "content": "Yes.", name: "Hm."}).for_template()
    assert (message["reasoning_content"], message["reasoning"]) == ("Hm.", "Hm.")
    both = Message.model_validate({"role": "assistant", "content": "Yes.", "reasoning_content": None}).for_template()
    assert "reasoning_content" not in both
