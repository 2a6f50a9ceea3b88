"""Text that is encoded without its control tokens."""

import json

import pytest
import tokenizers

from mpillama.text.tokenizer import Tokenizer

from .test_tokenizer import BOS, EOS, byte_complete, every, load, unigram_json


@every
@pytest.mark.parametrize("text", ["<s>ab", "a</s>", "<s>", "a <s></s> <s><s>b", "</s></s>"])
def test_prompt_cannot_inject_control_tokens(source, text):
    tokenizer = load(source, add_bos=False)
    assert {BOS, EOS} & set(tokenizer.encode(text))
    ids = tokenizer.encode(text, parse_special=False)
    assert not {BOS, EOS} & set(ids)
    assert tokenizer.decode(ids, skip_special=False).replace(" ", "") == text.replace(" ", "")
    assert tokenizer.encode(text, parse_special=False, add_bos=True) == [BOS, *ids]


@byte_complete
def test_control_tokens_as_text_are_encoded_like_any_text(source):
    """Not cut apart, which would show as a space or as other tokens."""
    config = json.loads(source())
    config["added_tokens"] = []
    plain = tokenizers.Tokenizer.from_str(json.dumps(config))
    plain.no_truncation()
    text = "the </s> dog<s>"
    ids = load(source, add_bos=False).encode(text, parse_special=False)
    assert ids == plain.encode(text, add_special_tokens=False).ids


def test_unknown_character_is_not_taken_for_an_injection():
    ids = load(unigram_json, add_bos=False).encode("☃", parse_special=False)
    assert 0 in ids


def test_control_token_of_one_character_is_an_ordinary_character():
    config = json.loads(unigram_json())
    config["model"]["vocab"].append(["☃", 0.0])
    config["added_tokens"].append(
        {**config["added_tokens"][0], "id": len(config["model"]["vocab"]) - 1, "content": "☃"}
    )
    tokenizer = Tokenizer(json.dumps(config).encode(), bos_token_id=BOS, eos_token_ids=(EOS,), add_bos=False)
    assert tokenizer.encode("a☃")[-1] == len(config["model"]["vocab"]) - 1
    assert tokenizer.encode("a☃", parse_special=False) == load(unigram_json, add_bos=False).encode("a☃")
