"""What a checkpoint in a foreign format tells of its tokenizer, and the checked reading of it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from mpillama.errors import UserError

MOST_ADDED_TOKENS = 20_000
"""A damaged file may mark every token as special, for which older libraries take hours; real files have 7,000."""
MOST_SPLITS = 10**9


class PieceKind(IntEnum):
    """SentencePiece's kinds of pieces, which GGUF's `token_type` took over."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class TokenizerFiles:
    """A Hugging Face `tokenizer.json`, and what the configuration files beside it usually tell."""

    tokenizer_json: bytes
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    add_bos: bool


class VocabularyValues:
    """The entries of a vocabulary, each checked when it is read; UserError names the entry at fault."""

    def __init__(self, source: Mapping[str, Any], origin: str) -> None:
        self._source = source
        self.origin = origin
        self._told = set[str]()
        self.tokens = self._tokens()

    def refuse(self, problem: str) -> UserError:
        """The error for a vocabulary that cannot be used."""
        return UserError(f"The tokenizer in {self.origin} {problem}; download or convert the model again.")

    def warn(self, fact: str) -> None:
        """Warn of what is odd in a vocabulary that can be used."""
        logging.getLogger(__name__).warning("the tokenizer in %s %s.", self.origin, fact, extra={"of_run": True})

    def text(self, key: str, default: str = "") -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.refuse(f"has a {key} that is no text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool | np.bool_):
            raise self.refuse(f"has a {key} that is neither true nor false")
        return bool(value)

    def token_id(self, key: str, default: int | None = None) -> int | None:
        """The id of a token of this vocabulary, None if there is none."""
        value = self._get(key, default)
        return None if value is None else self.checked_id(value, key)

    def role(self, key: str, default: int | None = None) -> int | None:
        """The id of the token with a role; one outside the vocabulary is ignored with a warning, as llama.cpp does."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or 0 <= value < len(self.tokens):
            return self.token_id(key, default)
        if key not in self._told:
            self._told.add(key)
            self.warn(f"has {len(self.tokens)} tokens, but {key} is {value}, which is ignored")
        return default

    def checked_id(self, value: Any, key: str) -> int:
        """`value` as an id of this vocabulary."""
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < len(self.tokens):
            raise self.refuse(f"has {len(self.tokens)} tokens, but {key} is {value!r:.40}")
        return int(value)

    def count(self, key: str) -> int:
        """How many of the tokens are of some kind, all if that is not told."""
        value = self._get(key, len(self.tokens))
        everything = isinstance(value, int) and value == len(self.tokens)
        return len(self.tokens) if everything else self.checked_id(value, key)

    def texts(self, key: str) -> list[str]:
        """A list of strings that are valid Unicode."""
        values = self.items(key)
        try:
            "".join(values).encode()
        except (TypeError, UnicodeEncodeError) as error:
            raise self.refuse(f"has {key} that are no text") from error
        return values

    def numbers(self, key: str) -> list[float]:
        """A list with one number for each token."""
        values = self.items(key)
        if len(values) != len(self.tokens):
            raise self.refuse(f"has {len(self.tokens)} tokens, but {len(values)} {key}")
        try:
            return [float(value) for value in values]
        except (TypeError, ValueError, OverflowError) as error:
            raise self.refuse(f"has {key} that are no numbers") from error

    def items(self, key: str) -> list[Any]:
        value = self._get(key, None)
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if not isinstance(value, list | tuple):
            raise self.refuse(f"has no list of {key}")
        return list(value)

    def __contains__(self, key: str) -> bool:
        return self._get(key, None) is not None

    def _get(self, key: str, default: Any) -> Any:
        value = self._source.get(key)
        return default if value is None else value

    def _tokens(self) -> list[str]:
        tokens = self.texts("tokens")
        if not tokens:
            raise self.refuse("has no tokens")
        return [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]  # as llama.cpp calls them
