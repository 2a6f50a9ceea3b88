"""Text that shows which of its characters somebody outside wrote, whatever a chat template does to it.

Such text has a lone surrogate in place of each printable ASCII character, one for one. Nothing that a template can do
makes the character itself of it again, so a control token found in the rendered text is the template's own, or the
assistant's. Quotation mark and backslash stay as they are, since JSON escapes them, and so does white space.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, SupportsIndex

import tokenizers

from mpillama.errors import UserError

_FIRST = 0xDC00  # no valid text has code points from here to 0xDFFF
_SHADES = {code: _FIRST + code for code in range(0x21, 0x7F) if chr(code) not in '"\\'}
_LIGHTS = {shade: code for code, shade in _SHADES.items()}
SHADED = re.compile(r"[\udc21-\udc7e]")
"""A character that somebody outside wrote."""


def mark(value: Any) -> Any:
    """`value`, with all texts in it, keys of mappings as well, marked; UserError for a text that is not Unicode."""
    if isinstance(value, str):
        check_unicode(value)
        return Marked(_shade(value))
    if isinstance(value, Mapping):
        return {mark(key): mark(item) for key, item in value.items()}
    return [mark(item) for item in value] if isinstance(value, list | tuple) else value


def mark_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with all but its role marked; the assistant's own messages are not."""
    if message.get("role") == "assistant":
        _check_texts(message)
        return dict(message)
    return {key: item if key == "role" else mark(item) for key, item in message.items()}


def remark(value: Any) -> Any:
    """`value`, a `Marked` again if it is text that only lost this type."""
    return Marked(value) if type(value) is str and not value.isascii() and SHADED.search(value) else value


def plain(text: str) -> str:
    """The text itself, without marks."""
    if isinstance(text, Marked):
        return text._plain
    return text if text.isascii() else text.translate(_LIGHTS)


def check_unicode(text: str) -> None:
    """UserError if `text` holds half a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The text is not valid Unicode ({error}); correct that character.") from error


def _shade(text: str) -> str:
    return text.translate(_SHADES)


def _check_texts(value: Any) -> None:
    """UserError if a text within `value` is not Unicode."""
    if isinstance(value, str):
        check_unicode(value)
    elif isinstance(value, Mapping):
        _check_texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            _check_texts(item)


def _seen(value: Any) -> Any:
    """An argument of a method as that of the plain text's method."""
    if isinstance(value, tuple):
        return tuple(map(_seen, value))
    return plain(value) if isinstance(value, str) else value


class Marked(str):
    """Marked text, which compares, searches and divides like the plain one."""

    @cached_property
    def _plain(self) -> str:
        return str.__str__(self).translate(_LIGHTS)

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        text = repr(self._plain)
        return text[0] + _shade(text[1:-1]) + text[-1]

    def __hash__(self) -> int:
        return hash(self._plain)

    def __eq__(self, other: object) -> bool:
        return self._plain == plain(other) if isinstance(other, str) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return self._plain != plain(other) if isinstance(other, str) else NotImplemented

    def __lt__(self, other: str) -> bool:
        return self._plain < plain(other)

    def __le__(self, other: str) -> bool:
        return self._plain <= plain(other)

    def __gt__(self, other: str) -> bool:
        return self._plain > plain(other)

    def __ge__(self, other: str) -> bool:
        return self._plain >= plain(other)

    def __contains__(self, item: object) -> bool:
        return isinstance(item, str) and plain(item) in self._plain

    def __int__(self) -> int:
        return int(self._plain)

    def __float__(self) -> float:
        return float(self._plain)

    def __add__(self, other: str) -> "Marked":
        return Marked(str.__add__(self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> "Marked":
        return Marked(str.__add__(other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> "Marked":
        return Marked(str.__mul__(self, count))

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> "Marked":
        return Marked(str.__getitem__(self, key))

    def __iter__(self) -> Iterator["Marked"]:
        return map(Marked, str.__iter__(self))

    def lstrip(self, chars: str | None = None) -> "Marked":
        return self[len(self) - len(self._plain.lstrip(_seen(chars))) :]

    def rstrip(self, chars: str | None = None) -> "Marked":
        return self[: len(self._plain.rstrip(_seen(chars)))]

    def strip(self, chars: str | None = None) -> "Marked":
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> "Marked":
        return self[len(self) - len(self._plain.removeprefix(plain(prefix))) :]

    def removesuffix(self, suffix: str) -> "Marked":
        return self[: len(self._plain.removesuffix(plain(suffix)))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return list(self._parts(self._plain.split(_seen(sep), maxsplit), sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return list(self._parts(self._plain.rsplit(_seen(sep), maxsplit), sep))

    def partition(self, sep: str) -> tuple[str, str, str]:
        first, middle, last = self._parts(self._plain.partition(plain(sep)), "")
        return first, middle, last

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        first, middle, last = self._parts(self._plain.rpartition(plain(sep)), "")
        return first, middle, last

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._parts(self._plain.splitlines(True), "")
        return [line if keepends else line[: len(line._plain.splitlines()[0])] for line in lines]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> "Marked":
        if not old:
            return Marked(_shade(self._plain.replace("", plain(new), count)))
        return Marked(str.join(new, self.split(old, count)))

    def join(self, iterable: Iterable[str], /) -> "Marked":
        return Marked(str.join(self, iterable))

    def _parts(self, texts: Sequence[str], between: str | None) -> Iterator["Marked"]:
        """Parts of the plain text, in their order, as parts of this one; `between` them is white space if None."""
        at = 0
        for text in texts:
            at = self._plain.index(text, at) if between is None else at
            yield self[at : at + len(text)]
            at += len(text) + len(between or "")


def _asking(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args: method(self._plain, *map(_seen, args))


def _altering(method: Callable[..., str]) -> Callable[..., Marked]:
    """Whose text it is cannot be told character by character any more: all of it counts as written outside."""
    return lambda self, *args: Marked(_shade(method(self._plain, *map(_seen, args))))


for _question in (
    *(str.startswith, str.endswith, str.find, str.rfind, str.index, str.rindex, str.count),
    *(str.isalnum, str.isalpha, str.isascii, str.isdecimal, str.isdigit, str.isidentifier, str.islower),
    *(str.isnumeric, str.isprintable, str.isspace, str.istitle, str.isupper),
):
    setattr(Marked, _question.__name__, _asking(_question))
for _change in (
    *(str.capitalize, str.casefold, str.center, str.expandtabs, str.ljust, str.lower),
    *(str.rjust, str.swapcase, str.title, str.upper, str.zfill),
):
    setattr(Marked, _change.__name__, _altering(_change))


# -- A tokenizer whose control tokens have other names, which nobody can know and hence nobody can write --------------


class Unwritable:
    """A copy of a `tokenizer.json` in which the tokens `names` are spelled as `secret` says, with the ids they had.

    Their own spelling is ordinary text in it, which the vocabulary's other tokens make up.
    """

    def __init__(self, tokenizer_json: bytes, names: Collection[str], load: Callable[[bytes], tokenizers.Tokenizer]):
        nonce = secrets.token_hex(16)
        self.secret = {name: f"{nonce}{number:06x}" for number, name in enumerate(sorted(names))}
        self.tokenizer = load(json.dumps(self._renamed(json.loads(tokenizer_json))).encode())

    def _renamed(self, config: dict[str, Any]) -> dict[str, Any]:
        model = config["model"]
        added = [{**token, "content": self._name(token["content"])} for token in config.get("added_tokens") or []]
        renamed: dict[str, Any] = {"vocab": self._vocabulary(model["vocab"])}
        if isinstance(model.get("unk_token"), str):
            renamed["unk_token"] = self._name(model["unk_token"])
        if "merges" in model:
            renamed["merges"] = [merge for merge in model["merges"] if not self._touches(merge)]
        # The post-processor adds tokens by name; what is encoded here goes without them.
        return {**config, "added_tokens": added, "model": {**model, **renamed}, "post_processor": None}

    def _name(self, name: str) -> str:
        return self.secret.get(name, name)

    def _vocabulary(self, vocabulary: Any) -> Any:
        """By token, or a list of tokens with scores."""
        if isinstance(vocabulary, dict):
            return {self._name(token): index for token, index in vocabulary.items()}
        return [[self._name(token), score] for token, score in vocabulary]

    def _touches(self, merge: Any) -> bool:
        """Whether a merge makes a renamed token or something of it."""
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return not self.secret.keys().isdisjoint((left, right, left + right))
