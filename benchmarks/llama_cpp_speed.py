"""Time llama.cpp or ik_llama.cpp: prefill, decode and batched decode of a GGUF; prints one JSON object.

llama.cpp is driven through llama-cpp-python; build it for the processor first, e.g.
CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python. ik_llama.cpp is a wheel: pip install ik-llama-cpp-python.
"""

import argparse
import ctypes
import json
import statistics
import time
from importlib import import_module
from typing import Any

LIBRARIES = {"llama.cpp": "llama_cpp", "ik_llama.cpp": "ik_llama_cpp._ctypes_api"}


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--peer", choices=LIBRARIES, default="llama.cpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=48)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    library = import_module(LIBRARIES[options.peer])
    positions = options.prefill + options.decode
    context = Context(library, options.path, options.threads, positions, max(options.batch, default=1))
    report = {
        "peer": options.peer,
        "threads": options.threads,
        "prefill_tokens_per_second": context.prefill(options.prefill, options.repetitions),
        "decode": {n: context.decode(n, options.prefill, options.decode) for n in options.batch},
    }
    print(json.dumps(report, indent=2))


class Context:
    """A loaded model and a cache for several sequences."""

    def __init__(self, library: Any, path: str, threads: int, positions: int, sequences: int):
        self.library = llama_cpp = library
        if hasattr(llama_cpp, "llama_log_callback"):
            llama_cpp.llama_log_set(ctypes.cast(None, llama_cpp.llama_log_callback), ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = (positions + 8) * sequences
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = sequences
        if hasattr(params, "fused_up_gate"):
            params.flash_attn = False  # ik_llama.cpp's stops at the random weights of make_gguf.py
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.batch = llama_cpp.llama_batch_init(512, 0, sequences)

    def forget(self) -> None:
        """Empty the cache."""
        if hasattr(self.library, "llama_kv_cache_clear"):
            self.library.llama_kv_cache_clear(self.context)
        else:
            self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def run(self, tokens: list[tuple[int, int, int, bool]]) -> float:
        """Run (token, position, sequence, wants logits) and return the seconds it took."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, logits) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, int(logits)
        start = time.perf_counter()
        status = self.library.llama_decode(self.context, batch)
        if hasattr(self.library, "llama_synchronize"):  # where it is not there, decoding on processors is synchronous
            self.library.llama_synchronize(self.context)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return time.perf_counter() - start

    def prefill(self, tokens: int, repetitions: int) -> float:
        """Median tokens per second of a prompt, after one run to warm up."""
        seconds = []
        for _ in range(repetitions + 1):
            self.forget()
            seconds.append(self.run([(i % 1000, i, 0, i == tokens - 1) for i in range(tokens)]))
        return tokens / statistics.median(seconds[1:])

    def decode(self, sequences: int, context: int, steps: int) -> float:
        """Median tokens per second of steps of one token of each sequence, from position `context` on."""
        self.forget()
        for sequence in range(sequences):
            self.run([(i % 1000, i, sequence, i == context - 1) for i in range(context)])
        seconds = [self.run([(5, context + i, s, True) for s in range(sequences)]) for i in range(steps)]
        return sequences / statistics.median(seconds[3:])


if __name__ == "__main__":
    main()
