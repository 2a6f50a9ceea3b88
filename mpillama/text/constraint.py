"""Which tokens may come next under a grammar, by llguidance; used by rank 0 only.

Grammars are texts in llguidance's dialect of Lark, with JSON schemas inside (`%json`).
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillama.errors import UserError
from mpillama.text.json_schema import MOST_OPTIONAL, rewritten
from mpillama.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# A space, or a new line and its indentation, once in each gap: a model that likes whitespace cannot go on for ever.
WHITESPACE = r" |\r?\n[ \t]{0,32}"

GUIDANCE = {"whitespace_pattern": WHITESPACE, "lenient": True, "coerce_one_of": True}
"""What llguidance cannot keep to, it leaves out; a oneOf whose schemas may overlap is an anyOf."""

MOST_BYTES = 1 << 20
"""Of a grammar: building it may take seconds."""
MOST_KEPT = 16
MOST_KEPT_BYTES = 4 << 20
"""Of built grammars that are kept, counted by their texts; they take some hundred times as much memory."""
STEPS_TRIED = 4
"""The first tokens after which a grammar that is too complex mostly shows it."""
ITEMS_OF_PROPERTY = 4
"""What an optional property adds to a row of llguidance's parser."""


class Grammars:
    """Makes constraints over the ids of one tokenizer; `vocab_size` is that of the logits."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._size = max(vocab_size, tokenizer.vocab_size)
        self._lock = threading.Lock()
        self._built: OrderedDict[str, Future[_Built]] = OrderedDict()

    def check(self, grammar: str) -> None:
        """UserError if `grammar` is wrong, cannot be satisfied or is too complex."""
        self._of(grammar)

    def constraint(self, grammar: str) -> "Constraint":
        """What the next answer must keep to; UserError as `check`."""
        return Constraint(self._of(grammar).copy(), self._ends)

    def _of(self, grammar: str) -> "_Built":
        """The grammar, built once for all who ask for it soon; it may take seconds, in which Python goes on."""
        with self._lock:
            known = self._built.get(grammar)
            future = self._built.setdefault(grammar, known or Future())
            self._built.move_to_end(grammar)
            self._forget_old()
        if known is None:
            try:
                future.set_result(_Built(self._build(grammar)))
            except BaseException as error:  # noqa: BLE001 - whoever waits gets it
                future.set_exception(error)
                with self._lock:
                    self._built.pop(grammar, None)
        return future.result()

    def _forget_old(self) -> None:
        size = sum(map(len, self._built))
        while len(self._built) > MOST_KEPT or (size > MOST_KEPT_BYTES and len(self._built) > 1):
            oldest, _ = self._built.popitem(last=False)
            size -= len(oldest)

    def _build(self, grammar: str) -> "LLMatcher":
        if len(grammar) > MOST_BYTES:
            raise UserError(
                f"The grammar or JSON schema is too large: {len(grammar)} characters, of which {MOST_BYTES} are built; "
                "shorten it."
            )
        _, matcher_type = _llguidance()
        matcher = matcher_type(self._vocabulary, grammar, log_level=0, limits=_limits())
        # The first steps also find what is refused late: no text that fits, regular expressions that explode.
        _check_first_steps(matcher)
        return matcher

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


class _Built:
    """A grammar at its beginning, of which each answer gets a copy."""

    def __init__(self, matcher: "LLMatcher"):
        self._matcher = matcher
        self._lock = threading.Lock()

    def copy(self) -> "LLMatcher":
        """A matcher of its own."""
        with self._lock:
            return self._matcher.deep_copy()


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
        self.refused = False
        """Whether it was given up: by its own fault, and again if tried again."""

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
        self.refused = True
        reason = _reason(self._matcher)
        event = f"{event} ({reason})" if reason else event
        return UserError(f"The answer cannot keep to its grammar: {event}; simplify the grammar or JSON schema.")


def json_object_grammar() -> str:
    return json_schema_grammar({"type": "object"})


def json_schema_grammar(schema: Mapping[str, Any]) -> str:
    """JSON that fits `schema`, properties in the schema's order, but for what cannot be held (json_schema)."""
    return f"start: {json_rule(schema)}\n"


def json_rule(schema: Mapping[str, Any]) -> str:
    """JSON that fits `schema`, as part of a rule; its references stay those of a document of its own."""
    return "%json " + json.dumps({**rewritten(schema).schema, "x-guidance": GUIDANCE})


def text_rule(text: str) -> str:
    """Exactly `text`, as part of a rule."""
    return json.dumps(text, ensure_ascii=False)


def token_rule(token: int) -> str:
    """Exactly one token, special or not, as part of a rule."""
    return f"<[{token}]>"


def _llguidance() -> "tuple[type[LLTokenizer], type[LLMatcher]]":
    """The two classes used of llguidance; UserError if it is not installed."""
    try:
        from llguidance import LLMatcher, LLTokenizer
    except ImportError as error:
        raise UserError("Constrained output needs llguidance: pip install 'mpillama[serve]'.") from error
    return LLTokenizer, LLMatcher


def _check_first_steps(matcher: "LLMatcher") -> None:
    """UserError if the grammar is wrong or is given up soon."""
    trial = matcher.deep_copy()
    for step in range(STEPS_TRIED):
        allowed = b"" if trial.is_error() else trial.compute_bitmask()
        if trial.is_error() or (step == 0 and not any(allowed)):
            reason = _reason(trial) or "no text fits it"
            raise UserError(f"The grammar or JSON schema is not accepted: {reason}; simplify or correct it.")
        tokens = np.flatnonzero(np.unpackbits(np.frombuffer(allowed, np.uint8), bitorder="little"))
        if not len(tokens) or trial.is_stopped() or not trial.validate_tokens([int(tokens[0])]):
            return
        trial.consume_token(int(tokens[0]))


def _limits() -> "LLParserLimits":
    from llguidance import LLParserLimits

    return LLParserLimits(max_items_in_row=ITEMS_OF_PROPERTY * (MOST_OPTIONAL + 100))


def _reason(matcher: "LLMatcher") -> str:
    """The first line of what llguidance says, without the parser's state."""
    return matcher.get_error().partition("\n")[0].partition("<state>")[0].strip()[:300]
