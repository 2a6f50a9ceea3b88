"""mpillama: Llama-family language models over MPI, split across any number of ranks."""

__version__ = "0.2.0"
