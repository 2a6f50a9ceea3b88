"""The model families: one module each, found by itself."""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules

from mpillama.models.family import Family

_FOUND = [import_module(f"{__name__}.{module.name}").FAMILY for module in iter_modules(__path__)]
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _FOUND}
"""By Hugging Face's model_type."""


def gguf_architectures() -> dict[str, list[Family]]:
    """The families that GGUF files of each architecture hold."""
    found: dict[str, list[Family]] = {}
    for family in FAMILIES.values():
        if family.gguf:
            found.setdefault(family.gguf.architecture, []).append(family)
    return found
