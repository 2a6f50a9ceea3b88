"""An answer ends at the tokens that any of a model's files name, and where its chat template ends a turn."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers

from mpillama.errors import UserError
from mpillama.formats.checkpoint import Checkpoint
from mpillama.formats.gguf.file import TEMPLATE
from mpillama.formats.gguf.file import _texts as texts_of
from mpillama.loading.model_file import open_model, with_tokenizer
from mpillama.loading.texts import end_of_turn, end_tokens, make_chat_template, make_tokenizer
from mpillama.text.tokenizer import Tokenizer

from .chat_families import FAMILIES, tokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "llama"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|> {% endfor %}<|im_start|>assistant"


@pytest.mark.parametrize("family", FAMILIES)
def test_end_of_turn_of_five_families(family):
    source = FAMILIES[family].template.read_text("utf-8")
    found = end_of_turn(tokenizer(family), source)
    assert found is not None
    assert tokenizer(family).token(found) == FAMILIES[family].eos


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{% broken",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content }} and <|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}",
    ],
)
def test_templates_that_name_no_end(template):
    assert end_of_turn(tokenizer("chatml"), template) is None


def test_end_of_turn_need_not_be_a_special_token():
    source = "{% for m in messages %}<｜User｜>{{ m.content }}<｜tool▁sep｜>{% endfor %}"
    found = end_of_turn(tokenizer("deepseek"), source)
    assert found is not None
    assert tokenizer("deepseek").token(found) == "<｜tool▁sep｜>"


def test_all_of_them_each_once_and_the_tokenizers_first():
    tokens = tokenizer("chatml")
    end, start = tokens.token_id("<|im_end|>"), tokens.token_id("<|im_start|>")
    for named in ("<|im_start|>", {"content": "<|im_start|>"}):
        assert end_tokens(tokens, {"eos_token": named}, (7, 9, 7), CHATML) == (start, 7, 9, end)
    for named in (None, "unknown", 3, {"content": None}):
        assert end_tokens(tokens, {"eos_token": named}, (7,), "") == (7,)


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(GOLDEN, copy)
    return copy


def ends(folder: Path, config=None, generation=None, of_tokenizer=None, template="") -> list[str | None]:
    """Ends of a model whose files name these."""
    whole = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**whole, "eos_token_id": config}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    names = {"eos_token": of_tokenizer, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    made = make_tokenizer(open_model(str(folder)))
    return [made.token(i) for i in made.eos_token_ids]


def test_each_file_may_name_an_end(folder):
    tokens = make_tokenizer(open_model(str(folder)))
    eot, end = (tokens.token_id(name) for name in ("<|eot_id|>", "<|end_of_text|>"))
    assert ends(folder, config=end) == ["<|end_of_text|>"]
    assert ends(folder, generation=[end]) == ["<|end_of_text|>"]
    assert ends(folder, config=end, of_tokenizer="<|eot_id|>") == ["<|eot_id|>", "<|end_of_text|>"]
    assert ends(folder, config=eot, generation=[end]) == ["<|end_of_text|>", "<|eot_id|>"]
    template = "{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"
    assert ends(folder, config=end, template=template) == ["<|end_of_text|>", "<|eot_id|>"]
    assert ends(folder) == []


def test_what_stands_behind_calls_ends_an_answer_too():
    source = tokenizers.Tokenizer(tokenizers.models.BPE())
    source.add_special_tokens(["<|call|>", "<|return|>"])
    tokens = Tokenizer(source.to_str().encode(), bos_token_id=None, eos_token_ids=(), add_bos=False)
    template = "{% for m in messages %}{{ m.content }}{{ '<|return|>' if loop.last }}{% endfor %}"
    assert end_tokens(tokens, {}, (), template) == (1,)
    assert end_tokens(tokens, {}, (), template + "{% if tools %}<|call|>{% endif %}") == (1, 0)


def test_ids_outside_a_gguf_vocabulary_reach_no_configuration():
    vocabulary = {"model": "gpt2", "pre": "qwen2", "tokens": ["a", "b", "<e>"], "merges": [], "eot_token_id": 2}
    texts = {"gguf_vocabulary.json": json.dumps(vocabulary | {"bos_token_id": 9, "eos_token_id": 2**32 - 1}).encode()}
    config = {"model_type": "llama", "bos_token_id": 9, "eos_token_id": [2**32 - 1]}
    made = with_tokenizer(Checkpoint("x.gguf", "gguf", config, texts, (), (), {}))
    tokens = make_tokenizer(made)
    assert (tokens.bos_token_id, tokens.eos_token_ids) == (None, (2,))


@pytest.mark.parametrize(
    ("templates", "source"),
    [
        ([{"name": "rag", "template": "one"}], b"one"),
        ([{"name": "rag", "template": "one"}, {"name": "default", "template": "two"}], b"two"),
        ([{"name": "rag", "template": "one"}, {"name": "tool_use", "template": "two"}], None),
        ([{"name": "rag", "template": ""}, {"name": "tool_use"}, 3, {"name": "x", "template": "three"}], b"three"),
        ("one", b"one"),
        ([], None),
    ],
)
def test_which_of_several_chat_templates_counts(folder, templates, source):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    file = open_model(str(folder))
    assert file.texts.get("chat_template.jinja") == source
    if source is None:
        sentence = "rag, tool_use, and none named default" if templates else "no chat template"
        with pytest.raises(UserError, match=sentence):
            make_chat_template(file, make_tokenizer(file))


def test_which_of_several_chat_templates_of_a_gguf_file_counts():
    assert texts_of({"tokenizer.chat_template": "one", "tokenizer.chat_template.rag": "two"}) == {TEMPLATE: b"one"}
    assert texts_of({"tokenizer.chat_template.rag": "two"}) == {TEMPLATE: b"two"}
    found = texts_of({"tokenizer.chat_template.rag": "two", "tokenizer.chat_template.x": "one"})
    assert [entry["name"] for entry in json.loads(found["tokenizer_config.json"])["chat_template"]] == ["rag", "x"]
