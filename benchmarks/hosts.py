"""Measure decoding over simulated hosts: tokens/s, waiting, bytes and messages on the wire, and what `plan` says of it.

    python -m benchmarks.hosts --hosts 2 4 --delays 0 50 200 1000 --rates 10000 1000

Needs root, and Linux with namespaces and /dev/net/tun (tests/system/hosts/network.py). All hosts share this machine's
cores and memory, so tokens/s are not those of real hosts; bytes and messages are. Prints a table as it comes, and JSON
with --json. What starts and loads is not counted: each figure on the wire is the difference of two runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.batch import hollow_model
from tests.system.hosts.network import Hosts, running_hosts, why_not
from tests.system.mpi.launch import PROGRAM, environment

Row = dict[str, Any]
COLUMNS = ("hosts", "ranks", "delay µs", "Mbit/s", "there and back µs", "tok/s", "waiting ms", "kB", "messages", "plan")
WIDTHS = (5, 5, 8, 7, 17, 8, 10, 8, 8, 8)


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--weights", default="q4_0")
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 50, 200, 1000], help="one way, in microseconds")
    parser.add_argument("--rates", type=float, nargs="+", default=[10000, 1000], help="of a host's port, in Mbit/s")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--runs", type=int, default=5, help="of which the median counts")
    parser.add_argument("--options", nargs="*", default=[], help="more options of generate, as words without --")
    parser.add_argument("--tokenizer", default="data/demo.h5", help="native file whose tokenizer is used")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = hollow_model(Path(folder) / "model.h5", given.shape, given.weights, given.tokenizer)
        _print(given, COLUMNS)
        for count in given.hosts:
            with tempfile.TemporaryDirectory() as state, running_hosts(Path(state), count) as hosts:
                bench = measure_nodes(given, hosts, Path(state) / "bench.json")
                for delay in given.delays:
                    for rate in given.rates:
                        hosts.shape(delay, rate)
                        rows.append(measure(given, hosts, model, bench, {"delay_us": delay, "mbit": rate}))
                        _print(given, tuple(_cells(rows[-1])))
    if given.json:
        print(json.dumps(rows, indent=2))


def measure(given: argparse.Namespace, hosts: Hosts, model: Path, bench: Path, network: Row) -> Row:
    """One row: the median of some runs, and what plan predicts from the ping."""
    ping = hosts.ping(200)
    speeds, waits = [], []
    few, many = given.tokens // 4, given.tokens
    _, before = generate(given, hosts, model, few)
    for _ in range(given.runs):
        found, after = generate(given, hosts, model, many)
        speeds.append(found["decode_tokens_per_second"])
        waits.append(found["communication_share"] * 1e3 / found["decode_tokens_per_second"])
    ranks = given.ranks_per_host * len(hosts.names)
    speed, steps = statistics.median(speeds), many - few
    planned = plan(given, hosts, bench, ping / 2, network["mbit"])
    return {
        "shape": given.shape, "weights": given.weights, "hosts": len(hosts.names), "ranks": ranks, **network,
        "ping_us": 1e6 * ping, "tokens_per_second": speed, "slowest": min(speeds), "fastest": max(speeds),
        "waiting_ms": statistics.median(waits), "bytes_per_token": (after[0] - before[0]) / steps,
        "messages_per_token": (after[1] - before[1]) / steps, "planned_tokens_per_second": planned,
    }  # fmt: skip


def generate(given: argparse.Namespace, hosts: Hosts, model: Path, tokens: int) -> tuple[Row, tuple[int, int]]:
    """A run, and the bytes and messages that all hosts sent meanwhile."""
    hosts.counts()
    words = ("--prompt-token-ids", "5,6,7,8", "--temperature", "0", "--max-tokens", str(tokens), "--max-seq-len", "256")
    options = [f"--{word}" if word[0].isalpha() else word for word in given.options]
    result = hosts.run(given.ranks_per_host, *PROGRAM, "generate", "--model", model, "--json", *words, *options)
    if result.status:
        sys.exit(result.stderr)
    counts = hosts.counts().values()
    return json.loads(result.stdout), (sum(c.bytes for c in counts), sum(c.messages for c in counts))


def measure_nodes(given: argparse.Namespace, hosts: Hosts, path: Path) -> Path:
    """What a host reads and computes while all do: a saved bench of some layers on the same ranks."""
    words = ("bench", "--shape", given.shape, "--weights", given.weights, "--layers", "2", "--json", "--decode", "8")
    hosts.shape()
    result = hosts.run(given.ranks_per_host, *PROGRAM, *words, "--prefill", "64", "--context", "64")
    if result.status:
        sys.exit(result.stderr)
    found = json.loads(result.stdout)
    found["read_bandwidth_bytes_per_second"] /= len(hosts.names)
    path.write_text(json.dumps(found))
    return path


def plan(given: argparse.Namespace, hosts: Hosts, bench: Path, latency: float, mbit: float) -> float:
    """Tokens/s that plan predicts."""
    sizes = ("--nodes", str(len(hosts.names)), "--ranks-per-node", str(given.ranks_per_host), "--max-seq-len", "64")
    network = f"{1e6 * latency:.1f}us,{mbit / 8:.1f}MB/s" if mbit else f"{1e6 * latency:.1f}us,10GB/s"
    words = ("plan", "--shape", given.shape, "--weights", given.weights, *sizes, "--bench", str(bench), "--json")
    command = (sys.executable, *PROGRAM, *words, "--network", network)
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    return float(json.loads(done.stdout)["speed"]["decode_tokens_per_second"])


def _cells(row: Row) -> list[str]:
    return [
        str(row["hosts"]), str(row["ranks"]), f"{row['delay_us']:g}", f"{row['mbit']:g}", f"{row['ping_us']:.0f}",
        f"{row['tokens_per_second']:.2f}", f"{row['waiting_ms']:.1f}", f"{row['bytes_per_token'] / 1e3:.1f}",
        f"{row['messages_per_token']:.0f}", f"{row['planned_tokens_per_second']:.2f}",
    ]  # fmt: skip


def _print(given: argparse.Namespace, cells: tuple[str, ...]) -> None:
    stream = sys.stderr if given.json else sys.stdout
    widths = [max(width, len(name)) for width, name in zip(WIDTHS, COLUMNS, strict=True)]
    print(*(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), sep="  ", file=stream, flush=True)


if __name__ == "__main__":
    main()
