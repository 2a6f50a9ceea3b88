"""How text is cut into words before byte-level BPE: the regular expressions, by the name that GGUF files give them.

They are those of the models' own tokenizer.json files, applied one after the other; a piece that matches, and what
stands between two such pieces, is a word.
"""

from dataclasses import dataclass

import tokenizers
from tokenizers import pre_tokenizers

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + BLANKS
QWEN2 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + BLANKS
QWEN35 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + BLANKS
SEED_CODER = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|" + BLANKS
LOWER_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
UPPER_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
TEKKEN = LOWER_WORD + "|" + UPPER_WORD + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + BLANKS
GPT4O = f"{LOWER_WORD}{CONTRACTION}?|{UPPER_WORD}{CONTRACTION}?" + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + BLANKS
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGIT)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + BLANKS,
)
UNNAMED = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class PreTokenizer:
    """The regular expressions; whether a word that is a token needs no merges; whether the model wants BOS."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The library's object, which also writes bytes as GPT-2's visible characters."""
        splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, byte_level()])


def byte_level() -> pre_tokenizers.PreTokenizer:
    """Bytes as GPT-2's visible characters, without cutting."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _table(names: str, pre_tokenizer: PreTokenizer) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), pre_tokenizer)


PRE_TOKENIZERS = (
    _table(
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True),
    )
    | _table("dbrx smaug-bpe glm4 chatglm-bpe", PreTokenizer((LLAMA3,)))
    | _table("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", PreTokenizer((QWEN2,)))
    | _table("qwen35", PreTokenizer((QWEN35,)))
    | _table("seed-coder", PreTokenizer((SEED_CODER,)))
    | _table("tekken", PreTokenizer((TEKKEN,), ignore_merges=True, add_bos=True))
    | _table("gpt-4o llama4 kanana2 talkie", PreTokenizer((GPT4O,)))
    | _table("gpt-2 phi-2 gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion exaone4", PreTokenizer((GPT2,)))
    | _table("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", PreTokenizer((DIGIT, GPT2)))
    | _table("deepseek-coder", PreTokenizer(DEEPSEEK_CODER))
    | _table("deepseek-v3 hunyuan-dense joyai-llm", PreTokenizer(DEEPSEEK3))
    | _table("default", PreTokenizer(UNNAMED))
)
