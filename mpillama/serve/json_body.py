"""JSON from strangers: what the standard forbids is refused, and so is what would cost more than it is worth."""

import json
import math
from typing import Any, NoReturn

from mpillama.api.bodies import BadRequest

MOST_DIGITS = 400
"""Of a whole number: no field holds more, and Python takes quadratic time for them."""


def load_json(body: bytes) -> Any:
    """The value of a body; BadRequest if it is not JSON in UTF-8."""
    try:
        return json.loads(body, parse_constant=_refuse, parse_float=_finite, parse_int=_bounded)
    except RecursionError as error:
        raise BadRequest("body: is nested too deeply", "body") from error
    except ValueError as error:  # wrong JSON, or bytes that are no text
        raise BadRequest(f"body: is not valid JSON ({error})", "body") from error


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
