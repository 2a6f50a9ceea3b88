"""mpillama: Llama-family language models over MPI, split across any number of ranks."""

from importlib import import_module

from mpillama.errors import UserError
from mpillama.text.sampling_params import SamplingParams

__version__ = "0.2.0"
__all__ = ["LLM", "SamplingParams", "UserError", "__version__"]


def __getattr__(name: str) -> object:
    """LLM, imported when first asked for: it brings MPI, which `mpillama --help` does without."""
    if name == "LLM":
        return import_module("mpillama.llm").LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
