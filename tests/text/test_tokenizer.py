"""Tokenizer and TokenStream, on small byte-level, byte-fallback and Unigram vocabularies made here."""

import json
from functools import cache

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mpillama.errors import UserError
from mpillama.text.tokenizer import Tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "naïve café über 你好 🙂 world, <s> </s>", "s> <s </s"] * 5
SPECIAL = ["<unk>", "<s>", "</s>"]
BOS, EOS = 1, 2


@cache
def byte_level_json() -> bytes:
    """Byte-level BPE as Llama 3, whose post-processor adds BOS."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    bpe.enable_truncation(4)
    return bpe.to_str().encode()


@cache
def byte_fallback_json() -> bytes:
    """SentencePiece-like BPE as Llama 2, with a byte token for every byte and a dummy leading space."""
    bpe = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ascii_corpus = [line.encode("ascii", "ignore").decode() for line in CORPUS]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.train_from_iterator(
        ascii_corpus, trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False)
    )
    config = json.loads(bpe.to_str())
    config["added_tokens"] = config["added_tokens"][: len(SPECIAL)]  # byte tokens are not special
    return json.dumps(config).encode()


@cache
def unigram_json() -> bytes:
    """Unigram model that has its control tokens among its own pieces, with the best score, as SentencePiece does."""
    pieces = [*((name, 0.0) for name in SPECIAL), *((char, -5.0) for char in "▁</s>ab")]
    unigram = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.add_special_tokens(SPECIAL)
    return unigram.to_str().encode()


SOURCES = [byte_level_json, byte_fallback_json, unigram_json]


@cache
def load(source, add_bos=True) -> Tokenizer:
    return Tokenizer(source(), bos_token_id=BOS, eos_token_ids=(EOS,), add_bos=add_bos)


every = pytest.mark.parametrize("source", SOURCES)
byte_complete = pytest.mark.parametrize("source", SOURCES[:2])


@every
def test_names_and_sizes(source):
    tokenizer = load(source)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (BOS, (EOS,))
    assert tokenizer.vocab_size == len(tokenizers.Tokenizer.from_buffer(source()).get_vocab())
    assert tokenizer.to_bytes() == source()


def test_without_bos_and_eos():
    tokenizer = Tokenizer(byte_level_json(), bos_token_id=None, eos_token_ids=(), add_bos=True)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("", "")
    assert BOS not in tokenizer.encode("the dog")


@every
@pytest.mark.parametrize("parse_special", [True, False])
@pytest.mark.parametrize("text", ["", "ab", " ab", "a ab b"])
def test_bos_exactly_once(source, text, parse_special):
    assert load(source).encode(text, parse_special=parse_special).count(BOS) == 1
    assert load(source).encode(text, parse_special=parse_special)[0] == BOS
    assert BOS not in load(source, add_bos=False).encode(text, parse_special=parse_special)
    assert load(source, add_bos=False).encode(text, add_bos=True)[0] == BOS
    assert BOS not in load(source).encode(text, add_bos=False)


@every
def test_rendered_bos_is_not_doubled(source):
    assert load(source).encode("<s>ab") == load(source).encode("<s>ab", add_bos=False)
    assert load(source).encode("<s>ab").count(BOS) == 1


@byte_complete
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30))
@settings(max_examples=60, deadline=None)
def test_text_survives(source, text):
    tokenizer = load(source)
    for parse_special in (False, True):
        if not parse_special or not any(name in text for name in SPECIAL):
            assert tokenizer.decode(tokenizer.encode(text, parse_special=parse_special)) == text


def test_truncation_of_the_file_is_ignored():
    assert len(load(byte_level_json).encode("the quick brown fox jumps over")) > 4


@given(ids=st.lists(st.integers(0, 339), max_size=40))
@settings(max_examples=60, deadline=None)
def test_byte_level_decode_is_the_librarys(ids):
    library = tokenizers.Tokenizer.from_buffer(byte_level_json())
    for skip in (True, False):
        assert load(byte_level_json).decode(ids, skip) == library.decode(ids, skip)


@given(text=st.text(st.sampled_from("ab 🙂你é\n"), max_size=30))
@settings(max_examples=60, deadline=None)
def test_byte_fallback_decode_is_the_librarys_for_valid_text(text):
    library = tokenizers.Tokenizer.from_buffer(byte_fallback_json())
    ids = load(byte_fallback_json).encode(text)
    assert load(byte_fallback_json).decode(ids) == library.decode(ids)


def test_a_wrong_byte_does_not_spoil_its_neighbours():
    tokenizer = load(byte_fallback_json)
    ids = [3 + byte for byte in "€".encode() + b"\xff" + "é".encode() + b"\xe2"]
    assert tokenizer.decode(ids) == "€\ufffdé\ufffd"


@byte_complete
def test_token_text_is_for_display(source):
    tokenizer = load(source)
    ids = tokenizer.encode("fox the the", add_bos=False)
    assert "".join(map(tokenizer.token_text, ids)).strip() == "fox the the"
    assert tokenizer.token_text(BOS) == "<s>"
    assert tokenizer.token_text(10**6) == "<id 1000000>"
    byte = tokenizer.encode("🦙", add_bos=False)[-1]
    assert "\ufffd" not in tokenizer.token_text(byte)


@pytest.mark.parametrize("broken", [b"", b"{", b"{}", b"\xff", b"[1]", byte_level_json()[:-40]])
def test_broken_file_is_the_users_to_mend(broken):
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer(broken, bos_token_id=None, eos_token_ids=(), add_bos=False)


def test_merge_of_unknown_tokens_is_a_broken_file():
    config = json.loads(byte_level_json())
    config["model"]["merges"].append(["no", "such"])
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer(json.dumps(config).encode(), bos_token_id=None, eos_token_ids=(), add_bos=False)


def test_bos_of_another_model():
    with pytest.raises(UserError, match="128000"):
        Tokenizer(byte_level_json(), bos_token_id=128000, eos_token_ids=(), add_bos=True)


def test_half_a_surrogate_pair():
    with pytest.raises(UserError, match="Unicode"):
        load(byte_level_json).encode("\ud83d")
