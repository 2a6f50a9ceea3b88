"""The weight types, a module each: every StoredType that a module here defines is read; kernels take WeightTypes."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules

from mpillama.quant.weight_type import BLOCK, StoredType, WeightType


def _defined() -> Iterator[StoredType]:
    for module in iter_modules(__path__):
        found = vars(import_module(f"{__name__}.{module.name}")).values()
        yield from (value for value in found if isinstance(value, StoredType))


STORED_TYPES: Mapping[str, StoredType] = {
    t.name: t for t in sorted(_defined(), key=lambda t: (t.block, t.ggml is None, t.ggml, t.name))
}
"""Every type that is read, by name."""
WEIGHT_TYPES: Mapping[str, WeightType] = {
    t.name: t for t in sorted((t for t in STORED_TYPES.values() if isinstance(t, WeightType)), key=lambda t: t.number)
}
"""Those that kernels take, by name."""
SMALLEST = min(WEIGHT_TYPES.values(), key=lambda t: t.group_bytes(BLOCK))
"""What is advised where memory is short."""
