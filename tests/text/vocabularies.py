"""Small vocabularies, trained here, in the forms in which GGUF and distributed-llama files hold them."""

import json
from functools import cache
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? I'll say it's we've they're DON'T.",
    "naïve café über Straße 你好世界 你好 こんにちは 안녕하세요 مرحبا بالعالم שלום नमस्ते สวัสดี",
    "1 12 123 1234 12345 3.14159 2024-11-22 0x1F ½ ²³ ١٢٣",
    "def f(x):\n    return x + 1\n\n\tif x:\r\n\t\tpass  # done\n\n\n",
    "👩‍👩‍👧‍👦 🦙🦙 🏳️‍🌈 e\u0301 a\u0308 -- ... !!! ((())) <|x|> s> <s </s",
    "spaces  two   three    four     five      six",
] * 4
NASTY = [
    "",
    " ",
    "   ",
    "hello",
    " hello  world   again    and     again",
    "\t\ttabs\t and spaces \t",
    "line\nline\r\n\r\n\n  indented\n\n\n",
    "don't DON'T I'll we'VE it's 'tis ''",
    "1 12 123 1234 12345 1234567890123 3.14 ½ ²³ ١٢٣",
    "你好世界 こんにちは 안녕하세요",
    "مرحبا بالعالم ١٢٣ שלום",
    "नमस्ते สวัสดี",
    "👩‍👩‍👧‍👦🏳️‍🌈🦙",
    "e\u0301a\u0308\u0301 é ä Å\u030a",
    "CamelCaseWORDS mixedUPlower ÀÉÎ ß ﬁ ǅ",
    "!!! ... -- (()) [x] a/b/c //\n{}\n",
    "\x00\x01\x7f\u0080\u00a0\u200b\u2028\ufeff\ufffd",
    "<|begin|>hi<|end|> <|user defined|> <|beg in|> <|end|><|end|>",
    "<s>hi</s> <unk> <0x41> ▁ ▁▁x",
    "x" * 300,
    "Ġ Ċ Ã©",
]
BEGIN, END, USER = "<|begin|>", "<|end|>", "<|user defined|>"


@cache
def byte_level(patterns: tuple[str, ...], ignore_merges: bool) -> tokenizers.Tokenizer:
    """Byte-level BPE as in the tokenizer.json of Llama 3 or Qwen 2: added tokens after the model's own."""
    bpe = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    visible = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, visible])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens([BEGIN, END])
    bpe.add_tokens([AddedToken(USER, normalized=False)])
    return bpe


@cache
def sentencepiece() -> tokenizers.Tokenizer:
    """BPE of characters as in Llama 2's tokenizer.json; ids are <unk> <s> </s>, bytes, merged pieces, characters."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    corpus = [line.replace("</s", "").replace("<s ", "") for line in CORPUS]
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    merged = list(dict.fromkeys(left + right for left, right in model["merges"]))
    characters = [token for token in model["vocab"] if token not in merged]
    return _with_pieces([*merged, *characters], [tuple(merge) for merge in model["merges"]])


def _with_pieces(pieces: list[str], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, USER]
    ids = {name: index for index, name in enumerate(names)}
    by_score = [
        (piece[:at], piece[at:])
        for piece in pieces
        for at in range(len(piece) - 1, 0, -1)
        if piece[:at] in pieces and piece[at:] in pieces
    ]
    assert set(merges) <= set(by_score)
    bpe = tokenizers.Tokenizer(models.BPE(ids, by_score, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names[:3]])
    bpe.add_tokens([AddedToken(USER, normalized=False)])
    return bpe


def names(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """Tokens by id."""
    return [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]


def sentencepiece_scores() -> list[float]:
    """0 for control tokens and bytes, then falling by 1 with every piece."""
    count = sentencepiece().get_vocab_size()
    return [0.0] * 259 + [-float(index) for index in range(count - 260)] + [0.0]


def gguf(tokenizer: tokenizers.Tokenizer, **more: Any) -> dict[str, Any]:
    """GGUF's metadata of a tokenizer, all but model, pre, scores and roles."""
    added = tokenizer.get_added_tokens_decoder()
    tokens = names(tokenizer)
    kinds = [(3 if added[i].special else 4) if i in added else 1 for i in range(len(tokens))]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return {"tokens": tokens, "token_type": kinds, "merges": merges} | more


def gguf_sentencepiece(**more: Any) -> dict[str, Any]:
    """GGUF's metadata of the vocabulary of characters."""
    metadata = gguf(sentencepiece(), model="llama", scores=sentencepiece_scores(), bos_token_id=1, eos_token_id=2)
    del metadata["merges"]
    metadata["token_type"][0] = 2
    metadata["token_type"][3:259] = [6] * 256
    return metadata | {"unknown_token_id": 0} | more


def visible_bytes() -> dict[str, int]:
    """Byte by GPT-2's visible character."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def dllama_byte_level(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """As distributed-llama's converter writes a byte-level vocabulary whose BOS is the first added token."""
    table, bos = visible_bytes(), tokenizer.token_to_id(BEGIN)
    raw = [bytes(table[char] for char in name) for name in names(tokenizer)[:bos]]
    raw += [name.encode() for name in names(tokenizer)[bos:]]
    return {
        "tokens": [token.decode("latin-1") for token in raw],
        "scores": [-float(index) for index in range(len(raw))],
        "bos": bos,
        "eos": [tokenizer.token_to_id(END)],
        "add_bos": True,
        "regular_vocab_size": bos,
    }


def dllama_sentencepiece() -> dict[str, Any]:
    """As distributed-llama's converter writes a vocabulary of characters, without the user's own token."""
    raw = [name.replace("▁", " ").encode() for name in names(sentencepiece())[:-1]]
    raw[3:259] = [bytes([byte]) for byte in range(256)]
    return {
        "tokens": [token.decode("latin-1") for token in raw],
        "scores": sentencepiece_scores()[:-1],
        "bos": 1,
        "eos": [2],
        "add_bos": True,
        "regular_vocab_size": 1,
    }
