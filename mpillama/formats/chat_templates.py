"""Which of several chat templates counts, for models that come with a list of them."""

from collections.abc import Mapping
from typing import Any

DEFAULT = "default"


def named_templates(found: Any) -> dict[str, str]:
    """Templates by name, of a tokenizer_config.json's `chat_template`: one text, or a list with names."""
    if isinstance(found, str):
        return {DEFAULT: found} if found else {}
    entries = [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
    pairs = [(entry.get("name"), entry.get("template")) for entry in entries]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str) and text}


def only_template(templates: Mapping[str, str]) -> str:
    """The default one, or the only one; "" if somebody would have to choose."""
    return templates.get(DEFAULT) or (next(iter(templates.values())) if len(templates) == 1 else "")
