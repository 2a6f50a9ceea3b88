"""How text is cut into words before byte-level BPE: the regular expressions, by the name that GGUF files give them.

They are those of the models' own tokenizer.json files, applied one after the other; a piece that matches, and what
stands between two such pieces, is a word.
"""

from collections.abc import Collection
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
LOWER_NO_HAN, UPPER_NO_HAN = (word.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]") for word in (LOWER_WORD, UPPER_WORD))
KIMI = (
    rf"[\p{{Han}}]+|{LOWER_NO_HAN}{CONTRACTION}?|{UPPER_NO_HAN}{CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + BLANKS
)
TEKKEN = LOWER_WORD + "|" + UPPER_WORD + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + BLANKS
GPT4O = f"{LOWER_WORD}{CONTRACTION}?|{UPPER_WORD}{CONTRACTION}?" + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + BLANKS
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
CASED = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{2D00}-\x{2D2D}\x{A790}-\x{A7FF}\x{AB30}-\x{AB6F}\x{10570}-\x{105BF}\x{16E40}-\x{16E7F}"
    r"\x{1D400}-\x{1DF2F}]]"
)
"""The letters with a case that DeepSeek LLM's tokenizer lists one by one: all but some blocks."""
DEEPSEEK_LLM = (r"[\r\n]", rf"\s?{CASED}+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+", r"\p{N}+")
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGIT)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + BLANKS,
)
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")
BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
EXAONE_MOE = (
    CONTRACTION
    + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
MINICPM5 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|" + BLANKS
TINY_AYA = (r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O)
YOUTU = (
    "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
    f"{LOWER_WORD}{CONTRACTION}?|{UPPER_WORD}{CONTRACTION}?" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + BLANKS,
)
SPARK = (
    r"\p{N}{1,3}",
    DEEPSEEK3[1],
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|"
    r"\s+(?!\S)|\s+",
    DIGIT,
)
JAIS2 = LLAMA3.removesuffix(r"\s+(?!\S)|\s+") + "|".join(
    [rf"\s{{{count}}}(?!\S)" for count in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")] + [r"\s"]
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
    | _table("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer((GPT4O,)))
    | _table(
        "gpt-2 phi-2 gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion exaone4 granite-docling jina-es "
        "jina-de jina-v2-es jina-v2-de",
        PreTokenizer((GPT2,)),
    )
    | _table("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", PreTokenizer((DIGIT, GPT2)))
    | _table("deepseek-llm", PreTokenizer(DEEPSEEK_LLM))
    | _table("deepseek-coder", PreTokenizer(DEEPSEEK_CODER))
    | _table("deepseek-v3 hunyuan-dense joyai-llm hy_v4", PreTokenizer(DEEPSEEK3))
    | _table("kimi-k2", PreTokenizer((KIMI,), ignore_merges=True))
    | _table("viking", PreTokenizer((BLOOM, DIGIT)))
    | _table("poro-chat bloom gpt3-finnish", PreTokenizer((BLOOM,)))
    | _table("falcon", PreTokenizer(FALCON))
    | _table("bailingmoe bailingmoe2 llada-moe", PreTokenizer((BAILING,)))
    | _table("exaone-moe", PreTokenizer((EXAONE_MOE,)))
    | _table("minicpm5", PreTokenizer((r"\p{N}{1,3}", MINICPM5), ignore_merges=True))
    | _table("tiny_aya cohere2moe", PreTokenizer(TINY_AYA))
    | _table("youtu", PreTokenizer(YOUTU, ignore_merges=True))
    | _table("spark2_5", PreTokenizer(SPARK))
    | _table("jais-2", PreTokenizer((JAIS2,)))
    | _table("ufakzeka", PreTokenizer((QWEN2.removeprefix(CONTRACTION + "|"),)))
    | _table("laguna", PreTokenizer((r"[^\n]+|[\n]+", QWEN2)))
    | _table("default", PreTokenizer(UNNAMED))
)


def guessed_pre_tokenizer(tokens: Collection[str], of_family: str) -> str:
    """The likely name of the rules of a vocabulary that does not tell them, by its tokens and the model's family."""
    known = set(tokens)
    if known & {"<|begin_of_text|>", "<|reserved_special_token_0|>"}:
        return "llama-bpe"
    if of_family:
        return of_family
    if "<｜begin▁of▁sentence｜>" in known:
        sizes = {40_000: "deepseek-coder", 110_000: "deepseek-llm"}
        return next((name for size, name in sizes.items() if len(tokens) < size), "deepseek-v3")
    marks = {"[INST]": "tekken", "<repo_name>": "smollm", "<reponame>": "smollm", "<jupyter_start>": "starcoder"}
    marks |= {"<|endofprompt|>": "gpt-4o", "<|im_start|>": "qwen2"}
    return next((name for token, name in marks.items() if token in known), "default")
