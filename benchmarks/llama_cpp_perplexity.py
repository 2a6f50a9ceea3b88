"""Perplexity of a text with llama-cpp-python, by the definition of llama.cpp's perplexity tool; prints JSON.

python benchmarks/llama_cpp_perplexity.py MODEL.gguf TEXT --context 512
Compare with `mpillama perplexity --model MODEL.gguf --file TEXT --context 512 --json`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from llama_cpp import Llama


def main() -> None:
    """Score the second half of each window, the first token of which is replaced by BOS if the model wants one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--context", type=int, default=512)
    options = parser.parse_args()
    model = Llama(options.model, n_ctx=options.context, n_batch=options.context, logits_all=True, verbose=False)
    ids = model.tokenize(Path(options.text).read_bytes(), add_bos=False, special=False)
    bos = model.token_bos() if model.metadata.get("tokenizer.ggml.add_bos_token", "true") == "true" else None
    losses = [window_losses(model, window, bos) for window in windows(ids, options.context)]
    nll = float(np.concatenate(losses).mean())
    print(json.dumps({"perplexity": float(np.exp(nll)), "nll": nll, "tokens": int(sum(map(len, losses))), "ids": ids}))


def windows(ids: list[int], context: int) -> list[list[int]]:
    """Whole windows, side by side."""
    return [ids[start : start + context] for start in range(0, len(ids) - context + 1, context)]


def window_losses(model: Llama, window: list[int], bos: int | None) -> np.ndarray:
    """-log p of the tokens after the middle of a window, float64."""
    first = len(window) // 2
    model.reset()
    model.eval([window[0] if bos is None else bos, *window[1:]])
    logits = np.array(model.scores[first : len(window) - 1], np.float64)
    top = logits.max(axis=1)
    total = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
    return total - logits[np.arange(len(logits)), window[first + 1 :]]


if __name__ == "__main__":
    main()
