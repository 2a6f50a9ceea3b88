"""A model's tokenizer and chat template, made of the texts in its file."""

from collections.abc import Mapping
from typing import Any

from mpillama.errors import UserError
from mpillama.loading.model_file import TOKENIZER_CONFIG, ModelFile, chat_template_source, settings_in
from mpillama.text.chat_template import ChatTemplate
from mpillama.text.tokenizer import Tokenizer

ANSWER = "mpillama-answers"
CALL_ENDS = ("<|call|>",)
"""Tokens of their own with which models end an answer that calls a tool."""


def make_tokenizer(file: ModelFile) -> Tokenizer:
    """The tokenizer of a model, with the ids that its configuration names."""
    if "tokenizer.json" not in file.texts:
        raise UserError(f"{file.path}: the model has no tokenizer.json; write the file again with one.")
    config, generation = file.config_json, settings_in(file.texts, "generation_config.json", file.path)
    bos = generation.get("bos_token_id", config.get("bos_token_id"))
    configured = (*_ids(generation.get("eos_token_id")), *_ids(config.get("eos_token_id")))
    of_tokenizer = settings_in(file.texts, TOKENIZER_CONFIG, file.path)
    template = file.texts.get("chat_template.jinja", b"").decode(errors="replace")
    tokenizer = Tokenizer(
        file.texts["tokenizer.json"], bos_token_id=bos, eos_token_ids=configured,
        add_bos=of_tokenizer.get("add_bos_token"), template=template,
    )  # fmt: skip
    tokenizer.end_at(end_tokens(tokenizer, of_tokenizer, configured, template))
    return tokenizer


def _ids(found: Any) -> tuple[int, ...]:
    """A configuration's token ids: none, one or a list."""
    return () if found is None else tuple(found) if isinstance(found, list) else (found,)


def make_chat_template(file: ModelFile, tokenizer: Tokenizer) -> ChatTemplate:
    """The model's own chat template; UserError if it has none, or several of which none is the default."""
    return ChatTemplate(chat_template_source(file), bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)


def end_tokens(
    tokenizer: Tokenizer, tokenizer_config: Mapping[str, Any], configured: tuple[int, ...], template: str
) -> tuple[int, ...]:
    """Which tokens end an answer: everything that comes with a model names some, and seldom all of them the same.

    The ids, first the one that texts call eos_token: of tokenizer_config.json, of the others, of the template.
    """
    named = tokenizer_config.get("eos_token")
    name = named.get("content") if isinstance(named, dict) else named
    eos = tokenizer.token_id(name) if isinstance(name, str) else None
    found = [eos, *configured, end_of_turn(tokenizer, template), *end_of_calls(tokenizer, template)]
    return tuple(dict.fromkeys(i for i in found if i is not None))


def end_of_turn(tokenizer: Tokenizer, template: str) -> int | None:
    """The control token that a chat template writes behind an answer, None if it writes another text there."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}]
    try:
        made = ChatTemplate(template, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
        _, _, rest = made.render(turns, add_generation_prompt=False).rpartition(ANSWER)
    except UserError:
        return None  # a template that cannot show this tells nothing; who chats with it is told what is wrong
    ids = tokenizer.encode(rest.lstrip(), add_bos=False)[:1]
    return ids[0] if ids and tokenizer.is_control(ids[0]) and ids[0] != tokenizer.bos_token_id else None


def end_of_calls(tokenizer: Tokenizer, template: str) -> tuple[int, ...]:
    """The control tokens that a chat template writes behind calls, where these are not those behind answers."""
    ids = (tokenizer.token_id(name) for name in CALL_ENDS if name in template)
    return tuple(i for i in ids if i is not None and tokenizer.is_control(i))
