"""Generate text from a script, on any number of ranks.

    python examples/generate.py
    mpirun -n 4 python examples/generate.py model.gguf "Once upon a time"

Every rank loads its part of the model. Rank 0 asks; the others compute along until it leaves the `with` block.
"""

import sys

from mpillama import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else None  # None: the demo model
prompt = " ".join(sys.argv[2:]) or "Once upon a time"
params = SamplingParams(max_tokens=60, temperature=0.7, seed=1)

with LLM(model) as llm:
    if llm.is_root:
        print(prompt, end="")
        for piece in llm.stream(prompt, params):  # as it is generated
            print(piece, end="", flush=True)
        print()

        answer = llm.chat([{"role": "user", "content": "Who are you?"}], params)
        print(f"{answer.text!r} ends by {answer.finish_reason!r} after {len(answer.token_ids)} tokens")
