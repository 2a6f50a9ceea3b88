"""tokenizer_json_of_sentencepiece against the sentencepiece library, on models trained here."""

import io
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillama.errors import UserError
from mpillama.loading.model_file import open_model
from mpillama.loading.texts import make_tokenizer
from mpillama.text.sentencepiece_model import added_by_id, tokenizer_json_of_sentencepiece
from mpillama.text.tokenizer import Tokenizer

from .vocabularies import CORPUS, NASTY

sentencepiece = pytest.importorskip("sentencepiece")

GOLDEN = Path(__file__).parent.parent / "golden" / "llama"
KINDS = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
              "remove_extra_whitespaces": False, "vocab_size": 460},
    "bpe without bytes": {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                          "vocab_size": 300},
    "bpe of one space": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 460},
    "bpe without a space before": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                                   "add_dummy_prefix": False, "remove_extra_whitespaces": False, "vocab_size": 460},
    "bpe with own tokens": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                            "remove_extra_whitespaces": False, "vocab_size": 460, "control_symbols": ["<|im_end|>"],
                            "user_defined_symbols": ["<sep>"]},
    "unigram": {"model_type": "unigram", "vocab_size": 260},
    "unigram with bytes": {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "nfkc",
                           "vocab_size": 500},
    "unigram of any spaces": {"model_type": "unigram", "normalization_rule_name": "identity",
                              "remove_extra_whitespaces": False, "vocab_size": 260},
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def model(kind: str) -> bytes:
    """A model's file, trained on a few lines."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=written, hard_vocab_limit=False, character_coverage=1.0,
        num_threads=1, minloglevel=2, **KINDS[kind],
    )  # fmt: skip
    return written.getvalue()


@cache
def original(kind: str):
    return sentencepiece.SentencePieceProcessor(model_proto=model(kind))


@cache
def made(kind: str) -> Tokenizer:
    files = tokenizer_json_of_sentencepiece(model(kind), "tokenizer.model", {})
    return Tokenizer(
        files.tokenizer_json, bos_token_id=files.bos_token_id, eos_token_ids=files.eos_token_ids, add_bos=files.add_bos
    )


def assert_same(kind: str, text: str) -> None:
    expected, found = original(kind).encode(text), made(kind).encode(text, add_bos=False, parse_special=False)
    if "unigram" in kind and found != expected:  # of two ways with the same score the libraries take different ones
        assert score(kind, found) == pytest.approx(score(kind, expected), abs=1e-4)
        return
    assert found == expected
    if not any(name in text for name in ("<s>", "</s>", "<unk>", "<|im_end|>", "▁")):
        assert made(kind).encode(text, add_bos=False) == expected
        assert made(kind).decode(expected) == original(kind).decode(expected) or "⁇" in original(kind).decode(expected)


def score(kind: str, ids: list[int]) -> float:
    return sum(map(original(kind).get_score, ids))


@every_kind
@pytest.mark.parametrize("text", NASTY)
def test_same_ids(kind, text):
    assert_same(kind, text)


@every_kind
@given(text=st.text(max_size=30) | st.text("thequick brown 1é你🦙\n<sep>", max_size=40))
@settings(max_examples=80, deadline=None)
def test_same_ids_of_any_text(kind, text):
    assert_same(kind, text)


@every_kind
def test_names_and_roles(kind):
    processor, tokens = original(kind), made(kind)
    assert [tokens.token(i) for i in range(processor.vocab_size())] == [
        processor.id_to_piece(i) for i in range(processor.vocab_size())
    ]
    assert tokens.vocab_size == processor.vocab_size()
    assert (tokens.bos_token_id, tokens.eos_token_ids) == (processor.bos_id(), (processor.eos_id(),))
    assert tokens.encode("a")[0] == processor.bos_id()


def test_a_folder_with_tokenizer_model_only(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model("llama"))
    config = json.loads((folder / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id"):
        config.pop(key)
    (folder / "config.json").write_text(json.dumps(config))
    size = original("llama").vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size, "<far>": size + 9}))
    decoder = {str(size + 1): {"content": "<|im_end|>", "special": True}, "x": 3, str(size + 2): {"content": 3}}
    named = {"eos_token": "<|im_end|>", "added_tokens_decoder": decoder, "add_bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    tokens = make_tokenizer(open_model(str(folder)))
    assert tokens.encode("the dog<|im_end|>") == [1, *original("llama").encode("the dog"), size + 1]
    assert tokens.encode("<|im_start|>", add_bos=False) == [size]
    assert tokens.eos_token_ids == (size + 1, 2)
    assert tokens.token_id("<far>") is None


def test_added_tokens_that_the_configuration_describes():
    found = added_by_id({"a": 5, "": 6, "b": "x"}, {"5": {"content": "c", "special": False}, "7": {"content": "d"}})
    assert {i: (t.content, t.special) for i, t in found.items()} == {5: ("c", False), 7: ("d", True)}
    assert added_by_id({}, None) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no pieces"),
        (b"IQ== 0\nIg== 1\n", "tiktoken"),
        (b"\x0a\x05a", "too early"),
        (b"\x0a\x02\x08\x01", "no SentencePiece model"),
        (b"\x20\x01", "no pieces"),
        (b"\x0b", "unknown kind of field 3"),
        (b"\x80" * 20, "too long"),
        (b"\x0a\x03\x0a\x01\xff", "no SentencePiece model"),
        (b"\x0a\x03\x0a\x01a" * 2, "twice"),
        (b"\x0a\x03\x0a\x01a\x12\x02\x18\x03", "words or characters"),
        (b"\x0a\x03\x0a\x01a", "unknown"),
        (b"\x0a\x05\x0a\x01a\x18\x02\x1a\x03\x12\x01x", "table of characters"),
    ],
)
def test_refused(content, message):
    with pytest.raises(UserError) as caught:
        tokenizer_json_of_sentencepiece(content, "x/tokenizer.model", {})
    assert message in str(caught.value)
    assert "x/tokenizer.model" in str(caught.value)


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), length=st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_damaged_files(at, byte, length):
    content = bytearray(model("llama"))
    content[at % len(content)] = byte
    for damaged in (bytes(content), bytes(content[: length % len(content)])):
        try:
            files = tokenizer_json_of_sentencepiece(damaged, "tokenizer.model", {})
        except UserError:
            continue
        tokenizers.Tokenizer.from_buffer(files.tokenizer_json).encode("ab <s> ▁b")
