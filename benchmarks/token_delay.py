"""What answers under way wait for their tokens while a long prompt is computed, with and without --max-token-delay.

python benchmarks/token_delay.py MODEL --streams 4 --prompt 2000 --bound 0.1

Both ways take turns on one model, since a busy machine changes by the minute. Prints one JSON object: of each way the
median, 95th and 99th hundredth and the longest of the seconds between tokens, from the prompt's arrival to its first
token, the seconds until that token, and the digest of all answers.
"""

import argparse
import hashlib
import json
import sys
import time
from typing import Any

import numpy as np

from mpillama import LLM
from mpillama.engine.pace import Pace
from mpillama.engine.sequence import EngineSequence, Request
from mpillama.text.sampling_params import SamplingParams


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--bound", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    with LLM(given.model, sequences=given.streams + 1, cache_tokens=4 * given.prompt + 4096) as llm:
        if llm.is_root:
            run(llm, given, None, 0)  # warms everything up
            ways = {"without": None, "with": given.bound}
            rounds = [{name: run(llm, given, bound, i) for name, bound in ways.items()} for i in range(given.rounds)]
            sys.stdout.write(json.dumps({"bound": given.bound, "rounds": rounds}, indent=2) + "\n")


def run(llm: LLM, given: argparse.Namespace, bound: float | None, number: int) -> dict[str, Any]:
    """Let streams run, then a prompt arrive; what the streams saw."""
    engine, rng = llm.engine, np.random.default_rng(number)
    engine.pace = engine.scheduler.pace = None if bound is None else Pace(bound)
    ids = lambda count: rng.integers(10, engine.executor.model.config.vocab_size - 10, count).tolist()  # noqa: E731
    endless = SamplingParams(temperature=0.0, max_tokens=given.prompt, ignore_eos=True)
    submit = lambda prompt, params: engine.submit(Request(prompt, params, reuse_prefix=False))  # noqa: E731
    streams = [submit(ids(100), endless) for _ in range(given.streams)]
    for _ in range(30):
        engine.step()
    prompt = submit(ids(given.prompt), SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
    began, gaps = time.perf_counter(), []
    while not prompt.finished:
        before = time.perf_counter()
        engine.step()
        gaps.append(time.perf_counter() - before)
    seconds = time.perf_counter() - began
    while any(len(stream.answer.token_ids) < 60 for stream in streams):
        engine.step()
    digest = hashlib.sha256(json.dumps([first_tokens(s) for s in (*streams, prompt)]).encode()).hexdigest()[:16]
    for stream in streams:
        engine.cancel(stream)
    at = {"median": 0.5, "p95": 0.95, "p99": 0.99, "longest": 1.0}
    return {
        **{name: float(np.quantile(gaps, q)) for name, q in at.items()},
        "steps": len(gaps), "first_token_of_prompt": seconds, "answers": digest,
    }  # fmt: skip


def first_tokens(sequence: EngineSequence) -> list[int]:
    """As many as every run gets to."""
    return sequence.answer.token_ids[:60]


if __name__ == "__main__":
    main()
