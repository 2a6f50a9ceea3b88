"""ChatTemplate against what transformers rendered (tests/golden/chat_templates)."""

import json
from pathlib import Path

import pytest

from mpillama.errors import UserError
from mpillama.text.chat_template import ChatTemplate

FOLDER = Path(__file__).parent.parent / "golden" / "chat_templates"
CONVERSATIONS = json.loads((FOLDER / "conversations.json").read_text("utf-8"))
EXPECTED = json.loads((FOLDER / "expected.json").read_text("utf-8"))


def render(template: str, conversation: str) -> str:
    arguments = dict(CONVERSATIONS[conversation])
    source = (FOLDER / f"{template}.jinja").read_text("utf-8")
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(arguments.pop("conversation"), **arguments)


def test_every_template_and_conversation_has_an_expectation():
    assert set(EXPECTED) == {path.stem for path in FOLDER.glob("*.jinja")}
    assert all(set(texts) == set(CONVERSATIONS) for texts in EXPECTED.values())


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", EXPECTED)
def test_renders_as_transformers_does(template, conversation):
    expected = EXPECTED[template][conversation]
    if expected is None:
        with pytest.raises(UserError, match="chat template fails"):
            render(template, conversation)
    else:
        assert render(template, conversation) == expected
