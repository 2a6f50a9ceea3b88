"""Five families of chat models: a template in the manner of each, and a small vocabulary with its control tokens."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from mpillama.text.chat_template import ChatTemplate
from mpillama.text.tokenizer import Tokenizer

from .vocabularies import BEGIN, END, byte_level, sentencepiece

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden" / "chat_templates"
CONVERSATIONS = json.loads((GOLDEN / "conversations.json").read_text("utf-8"))
LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Family:
    """Where the template lies, the kind of vocabulary, its control tokens, and those that are added but not special."""

    template: Path
    of_bytes: bool
    bos: str
    eos: str
    special: tuple[str, ...]
    marks: tuple[str, ...] = ()
    space_before: bool = True


FAMILIES = {
    "chatml": Family(
        GOLDEN / "qwen3.jinja",
        True,
        "<|endoftext|>",
        "<|im_end|>",
        ("<|im_start|>",),
        ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    ),
    "llama3": Family(
        GOLDEN / "llama3.jinja",
        True,
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"),
    ),
    "mistral": Family(
        GOLDEN / "mistral.jinja",
        False,
        "<s>",
        "</s>",
        (
            *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
    ),
    "gemma": Family(
        HERE / "templates" / "gemma.jinja",
        False,
        "<bos>",
        "<end_of_turn>",
        ("<start_of_turn>", "<eos>", "<pad>"),
        ("\n\n", "<table>"),
        space_before=False,
    ),
    "deepseek": Family(
        HERE / "templates" / "deepseek.jinja",
        True,
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        (),
        (
            *("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
            *("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>"),
            *("<｜tool▁output▁end｜>", "<｜tool▁outputs▁end｜>"),
        ),
    ),
}


@cache
def template(name: str) -> ChatTemplate:
    """The family's compiled template."""
    family = FAMILIES[name]
    return ChatTemplate(family.template.read_text("utf-8"), bos_token=family.bos, eos_token=family.eos)


@cache
def tokenizer(name: str) -> Tokenizer:
    """A tokenizer with the family's control tokens."""
    family = FAMILIES[name]
    base = byte_level((LLAMA3,), False) if family.of_bytes else sentencepiece()
    made = tokenizers.Tokenizer.from_str(base.to_str())
    if not family.space_before:
        made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    made.add_special_tokens([AddedToken(t, normalized=False) for t in (family.bos, family.eos, *family.special)])
    made.add_tokens([AddedToken(t, normalized=False) for t in family.marks])
    return Tokenizer(
        made.to_str().encode(),
        bos_token_id=made.token_to_id(family.bos),
        eos_token_ids=(made.token_to_id(family.eos),),
        add_bos=name != "chatml",
        template=family.template.read_text("utf-8"),
    )


def control_names(name: str) -> list[str]:
    """Everything that a user of the family might write in order to speak as somebody else."""
    family = FAMILIES[name]
    marks = [mark for mark in family.marks if mark not in ("\n\n", "<table>")]
    base = [BEGIN, END] if family.of_bytes else ["<s>", "</s>"]
    return list(dict.fromkeys([family.bos, family.eos, *family.special, *marks, *base]))


def conversation(name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages of a golden conversation and how the template is used for it."""
    arguments = dict(CONVERSATIONS[name])
    return arguments.pop("conversation"), arguments
