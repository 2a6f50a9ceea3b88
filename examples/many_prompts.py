"""Many prompts at once: answers, embeddings and scores.

    mpirun -n 4 python examples/many_prompts.py [MODEL]

All prompts share the steps of the model, and what they have in common is computed once. No answer depends on what is
computed beside it.
"""

import sys

import numpy as np

from mpillama import LLM, SamplingParams

NAMES = ["Linus", "Wanda", "Ada", "Grace"]

with LLM(sys.argv[1] if len(sys.argv) > 1 else None, sequences=16) as llm:
    if llm.is_root:
        prompts = [f"Once upon a time there was a llama called {name}, who" for name in NAMES]
        for prompt, output in zip(prompts, llm.generate(prompts, SamplingParams(max_tokens=24, seed=1)), strict=True):
            print(prompt + output.text.rstrip())

        # Several answers to one prompt, the likeliest first.
        (output,) = llm.generate("The llama said:", SamplingParams(n=4, max_tokens=12, seed=7, logprobs=0))
        for one in sorted(output.outputs, key=lambda one: -(one.cumulative_logprob or 0.0)):
            print(f"{one.cumulative_logprob:8.3f} {one.text!r}")

        vectors = llm.embed(NAMES)  # float64 [texts, hidden_size], each of length 1
        print("similarity of names:\n", np.round(vectors @ vectors.T, 2))

        for text in ("Once upon a time", "Time a upon once"):
            print(f"perplexity of {text!r}: {np.exp(-llm.score(text).mean()):.1f}")
