"""Every type by name, found in the modules that define them."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules

from mpillama.quant import ggml, types
from mpillama.quant.grouped import GroupedType
from mpillama.quant.k_types import SuperBlockType
from mpillama.quant.types.q4_0 import Q4_0
from mpillama.quant.types.q6_k import Q6_K
from mpillama.quant.weight_type import StoredType, WeightType


def _kept() -> Iterator[WeightType]:
    for module in iter_modules(types.__path__):
        found = vars(import_module(f"{types.__name__}.{module.name}")).values()
        yield from (value for value in found if isinstance(value, WeightType))


WEIGHT_TYPES: Mapping[str, WeightType] = {t.name: t for t in sorted(_kept(), key=lambda t: t.number)}
"""Those that kernels take."""
STORED_TYPES: Mapping[str, StoredType] = {
    t.name: t
    for t in sorted((*WEIGHT_TYPES.values(), *ggml.TYPES), key=lambda t: (t.block, t.ggml is None, t.ggml))
    if t.ggml is not None or t.safetensors
}
"""Those whose rows files have: of these, and such as become one of these."""


def weight_type_named(name: str) -> WeightType | None:
    """The type of that name, which may say for how many columns it has a scale: int4/32."""
    base, _, group = name.partition("/")
    found = WEIGHT_TYPES.get(base)
    if isinstance(found, GroupedType) and group.isdecimal():
        found = found.for_groups(int(group))
    return found if found is not None and found.name == name else None


def head_type(kind: WeightType) -> WeightType:
    """The output head's type where all else is quantised to `kind`: q6_k for the smaller K-types, as llama.cpp has it.

    An error there shows in every logit; without this q4_k loses four times as much.
    """
    smaller = isinstance(kind, SuperBlockType) and kind.block_bytes < Q6_K.block_bytes
    return Q6_K if smaller else kind


SMALLEST = Q4_0
"""What is advised where memory is short; others are no smaller, or lose more."""
