"""A small random model whose chat template knows tools."""

import json
from pathlib import Path

from tests import tiny_models as models

TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>{{ tools | tojson }} <tool_call>{% endif %}"
    "{% for message in messages %}{{ '<|' + message.role + '|>' }}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}<|assistant|>"
)


def write_tooled(path: Path) -> Path:
    """Write it; returns `path`."""
    texts = {
        "tokenizer.json": models.toy_tokenizer(),
        "chat_template.jinja": TEMPLATE.encode(),
        "generation_config.json": json.dumps({"bos_token_id": models.BOS, "eos_token_id": [models.EOS]}).encode(),
    }
    models.write_random(path, models.TOY, "q8_0", texts)
    return path
