"""How weights are stored and held: a module of `types` for each type that kernels take, `ggml` for those to convert."""

from pathlib import Path
from pkgutil import iter_modules

WEIGHT_TYPE_NAMES = tuple(module.name for module in iter_modules([str(Path(__file__).parent / "types")]))
"""The types that kernels take; here nothing is imported, so that `--help` is there at once."""
