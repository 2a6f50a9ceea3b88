"""JSON from strangers: what the standard forbids is refused, and so is what would cost more than it is worth."""

import json
import math
from typing import Any, NoReturn

from mpillama.api.body import BadRequest

MOST_DIGITS = 400
"""Of a whole number: no field holds more, and Python takes quadratic time for them."""

MOST_LEVELS = 100
MOST_FIELDS = 10_000


def load_json(body: bytes) -> Any:
    """The value of a body; BadRequest if it is not JSON in UTF-8."""
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_bounded)
    except RecursionError as error:
        raise BadRequest("body: is nested too deeply", "body") from error
    except ValueError as error:  # wrong JSON, or bytes that are no text
        raise BadRequest(f"body: is not valid JSON ({error})", "body") from error
    _check_shape(value)
    return value


def _check_shape(value: Any) -> None:
    """Refuse what is deeper than pydantic and llguidance go, and objects each of whose fields may be an error."""
    level = [value]
    for _ in range(MOST_LEVELS):
        if any(len(part) > MOST_FIELDS for part in level if isinstance(part, dict)):
            raise BadRequest(f"body: an object has more than {MOST_FIELDS} fields", "body")
        parts = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list))
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
        if not level:
            return
    raise BadRequest("body: is nested too deeply", "body")


def _refuse(constant: str) -> NoReturn:
    raise BadRequest(f"body: {constant} is not JSON", "body")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadRequest(f"body: the number {text[:40]} is too large", "body")
    return value


def _bounded(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise BadRequest("body: a number has too many digits", "body")
    return int(text)
