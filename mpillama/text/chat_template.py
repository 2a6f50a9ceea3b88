"""A conversation to prompt text, by the Jinja template that came with the model."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from traceback import walk_tb
from typing import Any

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mpillama.errors import UserError
from mpillama.text.marked import Marked, mark, mark_message, plain, remark

# A template comes with the model from a stranger: it may not keep rank 0 (and with it every rank) busy for ever.
# Real templates loop over messages and tools, far below these.
MAX_LOOP_ITEMS = 100_000
MAX_REPEATED_ITEMS = 1_000_000

# What a wrong template, or a message it did not expect, raises while rendering.
RENDER_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)

ON_PLAIN_TEXT = (
    *("capitalize", "center", "e", "escape", "filesizeformat", "float", "forceescape", "int", "lower", "striptags"),
    *("title", "truncate", "upper", "urlencode", "urlize", "wordcount", "wordwrap"),
)
"""Filters that look at every character, which they have to know for that."""
BEYOND_ASCII = re.compile(r"[^\x00-\x7f\udc21-\udc7e]")


class ChatTemplate:
    """A compiled chat template, in the dialect of the transformers library; UserError if its syntax is wrong."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        self.source = source
        self._special = {"bos_token": bos_token, "eos_token": eos_token}
        with _as_user_error():
            self._template: Template = _environment().from_string(source)

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Prompt text of `messages`, special tokens included; UserError if the template refuses or fails."""
        return self._render(messages, add_generation_prompt, tools, variables)

    def render_marked(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """As `render`, marked where the text is neither the template's nor the assistant's (`Tokenizer.encode_marked`).

        What others wrote are all messages but the assistant's, the tools and the variables.
        """
        given = [mark_message(message) for message in messages]
        return self._render(given, add_generation_prompt, mark(tools), mark(variables))

    def _render(self, messages: Any, add_generation_prompt: bool, tools: Any, variables: Mapping[str, Any]) -> str:
        given = {"documents": None, **self._special, **variables}
        with _as_user_error():
            return self._template.render(
                given,
                messages=[_with_thought(message) for message in messages],
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                range=_CountedRange(),
            )


THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def _with_thought(message: Any) -> Any:
    """The message with what was thought under the names that templates know, as transformers gives it."""
    if not isinstance(message, Mapping):
        return message
    thought = next((message[name] for name in THOUGHTS if message.get(name) is not None), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also refuses to build enormous values from small ones, and keeps marked text marked."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiply numbers as usual, and text or lists up to a limit; no powers."""
        if operator == "**":
            raise SecurityError("powers are not allowed in a chat template")
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, str | bytes | list | tuple) and len(sequence) * times > MAX_REPEATED_ITEMS:
                raise SecurityError(f"more than {MAX_REPEATED_ITEMS} items made by one multiplication")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        return remark(super().call(context, called, *args, **kwargs))

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        joined: str = remark("".join(pieces))
        return joined


class _CountedRange:
    """`range` with one allowance for a whole rendering, so that nested loops end as well."""

    def __init__(self) -> None:
        self._left = MAX_LOOP_ITEMS

    def __call__(self, *bounds: int) -> range:
        """As `range`; SecurityError when the allowance is used up."""
        items = range(*bounds)
        # Not len(), which fails for more items than fit a machine word.
        if items[self._left :]:
            raise SecurityError(f"range() asked for more than {MAX_LOOP_ITEMS} items in all")
        self._left -= len(items)
        return items


class _GenerationBlock(Extension):
    """`{% generation %}`, with which some templates mark the assistant's words for training: rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares this as an instance variable

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> Environment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    for name, apply in environment.filters.items():
        environment.filters[name] = _on_plain_text(apply) if name in ON_PLAIN_TEXT else _remarked(apply)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    del environment.globals["lipsum"]
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter writes < as \u003c for web pages, which no model was trained on.
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return str(remark(BEYOND_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text))


def _remarked(apply: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(apply)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        return remark(apply(*args, **kwargs))

    return filtered


def _on_plain_text(apply: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, which sees plain text and whose result counts as written by whoever wrote a part of it."""

    @wraps(apply)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        found = apply(*(plain(arg) if isinstance(arg, str) else arg for arg in args), **kwargs)
        is_marked = isinstance(found, str) and any(isinstance(arg, Marked) for arg in args)
        return mark(str(found)) if is_marked else found

    return filtered


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


@contextmanager
def _as_user_error() -> Iterator[None]:
    """Turn the failures of a template into a UserError that names its line."""
    try:
        yield
    except RENDER_ERRORS as error:
        raise UserError(
            f"The chat template fails at line {_line(error)}: {plain(str(error))}; "
            "change the messages or use another template."
        ) from error


def _line(error: Exception) -> int | str:
    """The template's line on which `error` arose, "?" if it was not inside the template."""
    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    return lines[-1] if lines else "?"
