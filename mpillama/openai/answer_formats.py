"""What a chat template tells of a model's answers: how it marks thoughts, and how it writes calls of tools."""

import re
from collections.abc import Callable
from dataclasses import replace

from mpillama.openai.harmony import HARMONY, harmony_format, is_harmony
from mpillama.openai.invoked_calls import DSML_MARK, M3_MARK, MINIMAX, MINIMAX_M3, dsml_format
from mpillama.openai.marked_calls import DEEPSEEK, DEEPSEEK_FENCED, KIMI
from mpillama.openai.object_calls import ARGS, HERMES, LISTED, LLAMA3, MISTRAL, MISTRAL_ARGS
from mpillama.openai.pythonic_calls import LLAMA4, LLAMA4_PYTHONIC, SHOWN
from mpillama.openai.reasoning import PAIRS, AnswerFormat, ReasoningFormat
from mpillama.openai.tagged_calls import GLM, GLM_TAGS, QWEN, QWEN_TAGS, hy_format, hy_tags
from mpillama.openai.tool_calls import ToolFormat

COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
AS_JSON = re.compile(r"arguments['\"]?\]?\s*\|\s*tojson")
WITH_ENDING = re.compile(r"<think(:\w+)>")
"""Of Hy3, whose checkpoints give every tag the same ending."""


def tool_format(template_source: str) -> ToolFormat | None:
    """The format that a chat template writes calls in; None if it takes no tools, or in a way not known here."""
    source = COMMENT.sub("", template_source)
    if not re.search(r"\btools\b", source):
        return None
    if M3_MARK in source:
        return MINIMAX_M3
    if DSML_MARK in source:
        return dsml_format(source)
    if is_harmony(source):
        return HARMONY
    if MINIMAX.marker.strip("<>") in source:
        return MINIMAX
    if tags := hy_tags(source):
        return hy_format(tags)
    if QWEN_TAGS.call[0] in source:  # another way to write calls than Hermes', between the same markers or others
        return QWEN if QWEN.marker in source and QWEN_TAGS.key[0] in source else None
    if GLM.marker in source and GLM_TAGS.key[0] in source:
        return GLM
    if MISTRAL.marker in source:
        return MISTRAL_ARGS if ARGS in source else MISTRAL
    if HERMES.marker in source:
        return HERMES
    if DEEPSEEK.marker in source:
        form = DEEPSEEK_FENCED if "```json" in source else DEEPSEEK
        return replace(form, text_arguments=not AS_JSON.search(source))
    if KIMI.marker in source:
        return KIMI
    if LISTED.marker in source:
        return LISTED
    if LLAMA4.marker in source or SHOWN.search(source):
        return LLAMA4_PYTHONIC if SHOWN.search(source) else LLAMA4
    # Not every template of Llama 3 mentions <|python_tag|>; all give results to the role ipython.
    return LLAMA3 if "ipython" in source and "parameters" in source else None


def reasoning_format(template_source: str, token_id: Callable[[str], int | None]) -> AnswerFormat | None:
    """The format of a model whose chat template or vocabulary knows marks of thoughts; None if neither does.

    `token_id` gives the id of a mark that is one added token.
    """
    source = COMMENT.sub("", template_source)
    if is_harmony(source) and (channels := harmony_format(token_id)):
        return channels
    endings = dict.fromkeys(WITH_ENDING.findall(source))
    for opening, closing in (*((f"<think{ending}>", f"</think{ending}>") for ending in endings), *PAIRS):
        ids = token_id(opening), token_id(closing)
        if None not in ids:
            return ReasoningFormat(opening, closing, *ids)
        if opening in source or closing in source:
            return ReasoningFormat(opening, closing)
    return None
