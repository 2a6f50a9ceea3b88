"""Which tokens may come next under a grammar, by llguidance; used by rank 0 only.

Grammars are texts in llguidance's dialect of Lark, with JSON schemas inside (`%json`).
"""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillama.errors import UserError
from mpillama.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# A space, or a new line and its indentation, once in each gap: a model that likes whitespace cannot go on for ever.
WHITESPACE = r" |\r?\n[ \t]{0,32}"

ONE_SCHEMA = frozenset(["items", "additionalProperties"])
SCHEMA_LISTS = frozenset(["anyOf", "oneOf", "allOf", "prefixItems"])
SCHEMA_MAPS = frozenset(["properties", "patternProperties", "$defs", "definitions"])
LIMITS = frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"])
VALUES = frozenset(
    ["$ref", "type", "enum", "const", "required", "minLength", "maxLength", "pattern", "format", "minItems",
     "maxItems", "minProperties", "maxProperties"]
)  # fmt: skip
NOTES = frozenset(
    ["title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "$comment",
     "$schema", "$id", "id", "$anchor", "contentEncoding", "contentMediaType"]
)  # fmt: skip
KEYWORDS = ONE_SCHEMA | SCHEMA_LISTS | SCHEMA_MAPS | LIMITS | VALUES | NOTES
"""What llguidance keeps to, or what says nothing about a value; it ignores words that it does not know."""


class Grammars:
    """Makes constraints over the ids of one tokenizer; `vocab_size` is that of the logits."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._size = max(vocab_size, tokenizer.vocab_size)

    def check(self, grammar: str) -> None:
        """UserError if `grammar` is wrong, cannot be satisfied or is too complex."""
        self.constraint(grammar)

    def constraint(self, grammar: str) -> "Constraint":
        """What the next answer must keep to; UserError as `check`."""
        _, matcher_type = _llguidance()
        matcher = matcher_type(self._vocabulary, grammar, log_level=0)
        # The first mask also finds what is refused late: no text that fits, regular expressions that explode.
        possible = not matcher.is_error() and any(matcher.compute_bitmask())
        if matcher.is_error() or not possible:
            reason = _reason(matcher) or "no text fits it"
            raise UserError(f"The grammar or JSON schema is not accepted: {reason}; simplify or correct it.")
        return Constraint(matcher, self._ends)

    def token_id(self, text: str) -> int | None:
        """Id of the added token that is written `text`, such as a special token; None if there is none."""
        return self._added.get(text)

    @cached_property
    def _added(self) -> dict[str, int]:
        added = json.loads(self._tokenizer.to_bytes()).get("added_tokens") or []
        return {token["content"]: token["id"] for token in added}

    @cached_property
    def _vocabulary(self) -> "LLTokenizer":
        tokenizer_type, _ = _llguidance()
        ends = self._known_ends
        text = self._tokenizer.to_bytes().decode()
        try:
            return tokenizer_type(text, n_vocab=self._size, eos_token=ends[0] if ends else None)
        except ValueError as error:
            raise UserError(f"This tokenizer allows no grammars ({error}); leave out what needs one.") from error

    @cached_property
    def _ends(self) -> "_Ends":
        vocabulary, ends = self._vocabulary, self._known_ends
        plain = [token for token in ends if not vocabulary.is_special_token(token)]
        return _Ends(vocabulary.eos_token, np.array(ends, np.int64), np.array(plain, np.int64), frozenset(ends))

    @cached_property
    def _known_ends(self) -> list[int]:
        return [token for token in self._tokenizer.eos_token_ids if self._tokenizer.token(token) is not None]


class _Ends:
    """The tokens that end an answer: llguidance's own, and those of the model as they are set in a mask."""

    def __init__(self, own: int, all_ids: np.ndarray, plain: np.ndarray, ids: frozenset[int]) -> None:
        self._own, self._all, self._plain = own, all_ids, plain
        self.ids = ids

    def settle(self, allowed: np.ndarray) -> None:
        """Allow all end tokens where llguidance allows its own, and plain ones nowhere else.

        An end token that the tokenizer does not call special would be allowed inside strings as the text it is.
        """
        may_end = bool(allowed[self._own])
        allowed[self._own] = False
        allowed[self._plain] = False
        if may_end:
            allowed[self._all] = True


class Constraint:
    """One answer under a grammar: mask the logits, choose a token, accept it, until finished."""

    def __init__(self, matcher: "LLMatcher", ends: _Ends) -> None:
        self._matcher = matcher
        self._ends = ends
        self._ended = False

    @property
    def finished(self) -> bool:
        """Whether the end token was accepted or nothing but the end may follow."""
        return self._ended or self._matcher.is_stopped()

    def masked(self, logits: np.ndarray) -> np.ndarray:
        """A copy of `logits` [vocab] with -inf for what may not follow; UserError if nothing may."""
        allowed = self._allowed(len(logits))
        if not allowed.any():
            raise self._refusal("no token of the vocabulary can follow")
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Go on after `token`; UserError if the grammar does not allow it."""
        if not self._ended and token in self._ends.ids and self._matcher.is_accepting():
            self._ended = True
        elif self._ended or not self._matcher.consume_token(token):
            raise self._refusal(f"token {token} may not follow")

    def _allowed(self, size: int) -> np.ndarray:
        """Which of the first `size` ids may follow, as bool."""
        bits = b"" if self._matcher.is_error() else self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise self._refusal("it was given up")
        count = max(size, 8 * len(bits))
        allowed = np.unpackbits(np.frombuffer(bits, np.uint8), count=count, bitorder="little").view(np.bool_)
        self._ends.settle(allowed)
        return allowed[:size]

    def _refusal(self, event: str) -> UserError:
        reason = _reason(self._matcher)
        event = f"{event} ({reason})" if reason else event
        return UserError(f"The answer cannot keep to its grammar: {event}; simplify the grammar or JSON schema.")


def json_object_grammar() -> str:
    """Any JSON object."""
    return json_schema_grammar({"type": "object"})


def json_schema_grammar(schema: Mapping[str, Any]) -> str:
    """JSON that fits `schema`, properties in the schema's order; UserError names a keyword that cannot be kept to."""
    return f"start: {json_rule(schema)}\n"


def json_rule(schema: Mapping[str, Any]) -> str:
    """JSON that fits `schema`, as part of a rule; its references stay those of a document of its own."""
    _check_keywords(schema)
    try:
        return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}, allow_nan=False)
    except (RecursionError, TypeError, ValueError) as error:
        raise UserError(f"The JSON schema cannot be written as JSON ({error}); correct it.") from error


def text_rule(text: str) -> str:
    """Exactly `text`, as part of a rule."""
    return json.dumps(text, ensure_ascii=False)


def token_rule(token: int) -> str:
    """Exactly one token, special or not, as part of a rule."""
    return f"<[{token}]>"


def _check_keywords(schema: Any) -> None:
    """UserError for the first word of `schema` that llguidance would ignore although it may mean something."""
    # A list of what is to do, not recursion: a request may be nested as deep as it likes.
    waiting = [("", schema)]
    while waiting:
        place, part = waiting.pop()
        if isinstance(part, Mapping):
            waiting += _parts(part, place)
        elif not isinstance(part, bool):
            raise UserError(f"The JSON schema is wrong at {place or 'the top'}: not a schema; correct it.")


def _parts(schema: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside of `schema`, each with its place; UserError for a keyword that is not supported."""
    for word, value in schema.items():
        here = f"{place}/{word}"
        if _is_unsupported(word, value):
            raise UserError(f"The JSON schema has {word!r} at {here}, which is not supported; leave it out.")
        if word in ONE_SCHEMA:
            yield here, value
        elif word in SCHEMA_LISTS and isinstance(value, list):
            yield from ((f"{here}/{index}", part) for index, part in enumerate(value))
        elif word in SCHEMA_MAPS and isinstance(value, Mapping):
            yield from ((f"{here}/{name}", part) for name, part in value.items())


def _is_unsupported(word: str, value: Any) -> bool:
    """Whether a keyword is unknown or in the form of an older JSON Schema; x-… are notes, but for llguidance's own."""
    if word == "items" and isinstance(value, list):
        return True
    if word in LIMITS and isinstance(value, bool):
        return True
    return word not in KEYWORDS and (word == "x-guidance" or not word.startswith("x-"))


def _llguidance() -> "tuple[type[LLTokenizer], type[LLMatcher]]":
    """The two classes used of llguidance; UserError if it is not installed."""
    try:
        from llguidance import LLMatcher, LLTokenizer
    except ImportError as error:
        raise UserError("Constrained output needs llguidance: pip install 'mpillama[serve]'.") from error
    return LLTokenizer, LLMatcher


def _reason(matcher: "LLMatcher") -> str:
    """The first line of what llguidance says, without the parser's state."""
    return matcher.get_error().partition("\n")[0].partition("<state>")[0].strip()[:300]
