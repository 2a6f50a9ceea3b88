"""Checked values out of a configuration: each mistake is a sentence that names the key."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mpillama import __version__
from mpillama.errors import UserError

Json = Mapping[str, Any]


class ConfigValues:
    """A configuration in Hugging Face's spelling; null means left out, and what is left out has its default."""

    def __init__(self, source: Json, defaults: Json | None = None):
        self.source = source
        self.defaults = defaults or {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value, unchecked."""
        value = self.source.get(key)
        value = self.defaults.get(key) if value is None else value
        return default if value is None else value

    def given(self, key: str) -> Any:
        """As get, where null is a value."""
        return self.source.get(key, self.defaults.get(key))

    def refuse(self, key: str, remedy: str) -> UserError:
        """The error for a value, to be raised."""
        return UserError(f"The model's configuration has {key}={self.source.get(key)!r}: {remedy}.")

    def expect(
        self, key: str, known: Iterable[str], default: str | None = None, shown: Iterable[str] | None = None
    ) -> str:
        """One of the known values; a refusal offers those `shown`, or all of them."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in known:
            raise self.refuse(key, f"mpillama {__version__} runs {', '.join(shown or known)} only")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.get(key, default))

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"The model's configuration has {key}={value!r}: it must be a positive number.")
        return float(value)

    def size(self, key: str, default: int | None = None, limit: int = 2**40) -> int:
        """A positive whole number below `limit`."""
        value = self.number(key, default)
        if value != int(value) or value >= limit:
            raise UserError(f"The model's configuration has {key}={value!r}: it must be a whole number below {limit}.")
        return int(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of positive finite numbers."""
        value = self.get(key)
        if not isinstance(value, list):
            raise self.refuse(key, "it must be a list of numbers")
        return tuple(ConfigValues({key: item}).number(key) for item in value)
