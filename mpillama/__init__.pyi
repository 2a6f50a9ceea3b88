from mpillama.errors import UserError
from mpillama.llm import LLM
from mpillama.text.sampling_params import SamplingParams

__version__: str
__all__ = ["LLM", "SamplingParams", "UserError", "__version__"]
