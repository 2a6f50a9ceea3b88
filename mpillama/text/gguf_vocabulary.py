"""The vocabulary in a GGUF file's metadata as a Hugging Face `tokenizer.json`."""

import math
from collections.abc import Mapping
from typing import Any

from mpillama.text.bpe import (
    BYTE_NAMES,
    Merges,
    added_tokens,
    byte_level_json,
    merges_by_score,
    sentencepiece_json,
    unique_ids,
)
from mpillama.text.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, guessed_pre_tokenizer
from mpillama.text.vocabulary import PieceKind, TokenizerFiles, VocabularyValues

# Names that end an answer whatever the metadata say: many files know only the base model's end of text.
END_NAMES = frozenset(
    [
        *("<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"),
        "<|end_of_text|>",
    ]
)
HARMONY_END = "<|return|>"
HARMONY_ENDS = frozenset([HARMONY_END, "<|call|>", "<|endoftext|>"])
"""Those of gpt-oss, whose answers have several messages that end with <|end|>."""


KEEPING = ("<unk>", "<s>", "<|endoftext|>")
"""Control tokens that never take white space along."""


def tokenizer_json_of_gguf(vocabulary: Mapping[str, Any]) -> TokenizerFiles:
    """`vocabulary` holds the metadata `tokenizer.ggml.*` without this prefix; UserError if it cannot be used.

    Known models are `gpt2` (BPE of bytes; `pre` names its pre-tokenizer) and `llama` (SentencePiece's BPE). A wish to
    append EOS (`add_eos_token`) is ignored: nobody wants it for generating text.
    """
    values = VocabularyValues(vocabulary, "the GGUF file")
    model = values.text("model", "missing")
    if model == "gpt2":
        return _byte_level(values)
    if model == "llama":
        return _sentencepiece(values)
    raise values.refuse(f'is of the kind "{model:.40}", while mpillama reads "gpt2" and "llama"')


def _byte_level(values: VocabularyValues) -> TokenizerFiles:
    pre_tokenizer = _pre_tokenizer(values)
    ids = unique_ids(values.tokens, values)
    kinds = _kinds(values, (values.role("bos_token_id"), values.role("eos_token_id")))
    added = added_tokens(_added(values, kinds), values)
    content = byte_level_json(
        ids, _merges(values, ids), added, pre_tokenizer.build(), ignore_merges=pre_tokenizer.ignore_merges
    )
    return _files(values, content, kinds, (None, None), pre_tokenizer.add_bos)


def _sentencepiece(values: VocabularyValues) -> TokenizerFiles:
    ids = unique_ids(values.tokens, values)
    # Files without these entries mean Llama's own ids, as far as there are such.
    unknown, bos, eos = (index if index < len(ids) else None for index in range(3))
    unknown = values.role("unknown_token_id", unknown)
    kinds = _kinds(values, (unknown, values.role("bos_token_id", bos), values.role("eos_token_id", eos)))
    mergeable = {index for index, kind in enumerate(kinds) if kind in (PieceKind.NORMAL, PieceKind.UNUSED)}
    scores = [-math.inf if math.isnan(score) else score for score in _scores(values)]
    content = sentencepiece_json(
        ids,
        merges_by_score(ids, scores, mergeable),
        added_tokens(_added(values, kinds), values, _stripping(values, kinds)),
        unknown=None if unknown is None else values.tokens[unknown],
        space_prefix=values.flag("add_space_prefix", True),
    )
    return _files(values, content, kinds, (bos, eos), True)


def _scores(values: VocabularyValues) -> list[float]:
    """The scores; a file without them has its pieces in the order in which SentencePiece made them."""
    if "scores" in values:
        return values.numbers("scores")
    values.warn("has no scores: its pieces are taken to stand in their order, as in SentencePiece's own files")
    return [-float(index) for index in range(len(values.tokens))]


def _pre_tokenizer(values: VocabularyValues) -> PreTokenizer:
    name = values.text("pre") or _guessed_pre_tokenizer(values)
    if name not in PRE_TOKENIZERS:
        raise values.refuse(f'cuts words by the rules "{name:.40}" (tokenizer.ggml.pre), which mpillama does not know')
    return PRE_TOKENIZERS[name]


def _guessed_pre_tokenizer(values: VocabularyValues) -> str:
    name = guessed_pre_tokenizer(values.tokens, values.text("pre_of_family"))
    values.warn(
        f'does not say how it cuts words (tokenizer.ggml.pre): "{name}" is taken, as its tokens suggest. If answers '
        "are poor, convert the model again with a newer llama.cpp"
    )
    return name


def _kinds(values: VocabularyValues, control: tuple[int | None, ...]) -> list[float]:
    """Kind of every token; without `token_type`, tokens with a role are control tokens and <0xNN> are bytes."""
    if "token_type" in values:
        return values.numbers("token_type")
    names = set(BYTE_NAMES)
    return [
        PieceKind.CONTROL if index in control else PieceKind.BYTE if token in names else PieceKind.NORMAL
        for index, token in enumerate(values.tokens)
    ]


def _added(values: VocabularyValues, kinds: list[float]) -> dict[str, bool]:
    """Tokens that are looked for in the text; True for those that only a prompt may hold, not a user's words."""
    wanted = (PieceKind.CONTROL, PieceKind.UNKNOWN, PieceKind.USER_DEFINED)
    pairs = zip(values.tokens, kinds, strict=True)
    return {token: kind != PieceKind.USER_DEFINED for token, kind in pairs if kind in wanted}


def _stripping(values: VocabularyValues, kinds: list[float]) -> list[str]:
    """Control tokens that take the white space behind them along, of a family whose tokens do; no file says it."""
    if not values.flag("strips_of_family", False):
        return []
    pairs = zip(values.tokens, kinds, strict=True)
    return [token for token, kind in pairs if kind == PieceKind.CONTROL and token not in KEEPING]


def _merges(values: VocabularyValues, ids: Mapping[str, int]) -> Merges:
    merges = []
    for line in values.texts("merges"):
        left, _, right = line[1:].partition(" ")
        left = line[:1] + left
        if left not in ids or right not in ids or left + right not in ids:
            raise values.refuse(f"merges {line!r:.60}, which are no tokens of it")
        merges.append((left, right))
    return merges


def _files(
    values: VocabularyValues,
    content: bytes,
    kinds: list[float],
    bos_and_eos: tuple[int | None, int | None],
    add_bos: bool,
) -> TokenizerFiles:
    bos = values.role("bos_token_id", bos_and_eos[0])
    named = [values.role("eos_token_id", bos_and_eos[1]), values.role("eot_token_id"), values.role("eom_token_id")]
    names = END_NAMES if HARMONY_END not in values.tokens else HARMONY_ENDS
    known = [i for i, token in enumerate(values.tokens) if token in names and kinds[i] == PieceKind.CONTROL]
    ends = tuple(dict.fromkeys(index for index in [*named, *known] if index is not None))
    return TokenizerFiles(content, bos, ends, values.flag("add_bos_token", add_bos) and bos is not None)
