"""Run mpillama and llama.cpp one after the other, several times, and print medians and ratios.

python benchmarks/make_gguf.py /tmp/1b.gguf
python benchmarks/compare.py /tmp/1b.gguf --peer-python /path/to/venv/with/llama-cpp-python/bin/python
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def main() -> None:
    """Measure as the command line says and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    options = parser.parse_args()
    rounds = [one_round(options) for _ in range(options.rounds)]
    print_table(rounds, options)


def one_round(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Ours and theirs, each figure of one round."""
    batches = [str(b) for b in options.batch]
    ours = run("-m", "mpillama", "bench", "--shape", options.shape, "--json", "--decode", "48", "--batch", *batches)
    script = str(HERE / "llama_cpp_speed.py")
    theirs = run(script, options.gguf, "--batch", *batches, python=options.peer_python)
    found = {"prefill 512": (ours["prefill"][0]["tokens_per_second"], theirs["prefill_tokens_per_second"])}
    for row in ours["decode"]:
        found[f"decode, {row['batch']} streams"] = (row["tokens_per_second"], theirs["decode"][str(row["batch"])])
    found["share of read bandwidth (decode)"] = (ours["bandwidth_fraction"], float("nan"))
    return found


def run(*arguments: str, python: str = sys.executable) -> dict[str, Any]:
    """Run a Python program and read its JSON."""
    done = subprocess.run([python, *arguments], check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def print_table(rounds: list[dict[str, tuple[float, float]]], options: argparse.Namespace) -> None:
    """Medians over the rounds, ratio first."""
    print(f"{options.shape}, q4_0, 2 threads, {platform.machine()}, {options.rounds} rounds in turn\n")
    print("| | ratio | mpillama | llama.cpp |\n|---|---|---|---|")
    for name in rounds[0]:
        ours, theirs = (statistics.median(r[name][side] for r in rounds) for side in (0, 1))
        print(f"| {name} | {ours / theirs:.2f} | {ours:.4g} | {theirs:.4g} |")


if __name__ == "__main__":
    main()
