"""Print, from rank 0, what an LLM of so many stages answers, embeds and scores, twice: what is closed gives all back.

Arguments: a model, and the stages.
"""

import hashlib
import sys

from mpillama import LLM, SamplingParams

PROMPTS = ["the queue", "every rank held", "a llama"] * 12


def main(model: str, stages: int) -> None:
    for _ in range(2):
        with LLM(model, pipeline=stages, threads=1, max_seq_len=128) as llm:
            if llm.is_root:
                texts = [out.text for out in llm.generate(PROMPTS, SamplingParams(max_tokens=5, temperature=0))]
                arrays = llm.embed(PROMPTS[:3]), llm.score(PROMPTS[0])
                print(texts, [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
