"""Measure decoding over simulated hosts: tokens/s, waiting, bytes and messages on the wire, and what `plan` says of it.

    python -m benchmarks.hosts --hosts 2 4 --delays 0 50 200 1000 --rates 10000 1000
    python -m benchmarks.hosts --hosts 4 --before ../older-tree
    python -m benchmarks.hosts --hosts 2 --batch 8 32 --prefill 256 --tokens 0

Needs root, Linux with namespaces and /dev/net/tun, and a C++ compiler or the wire compiled (tests/system/hosts). Hosts
have cores of their own where there are enough, but share the machine's memory; on fewer cores tokens/s are not those of
real hosts, bytes and messages are. Prints a table as it comes, and JSON with --json. What starts and loads is not
counted: each figure on the wire is the difference of two runs. With --before an older tree, whose kernels are compiled,
runs in turns with this one; with --before-settings this tree does so with other settings. --batch and --prefill measure
steps of several sequences and prompts, too, with `bench`: in the way that it chooses, and in each that it tries, step
by step in turns (in one part, or in several whose sums travel meanwhile). With --tokens 0 nothing else is measured.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from benchmarks.batch import filled_model
from mpillama.cli.display import in_number
from mpillama.models.shapes import shape_config
from tests.system.hosts.network import Hosts, running_hosts, why_not
from tests.system.mpi.launch import PROGRAM, ROOT, environment

Row = dict[str, Any]
COLUMNS = (
    "tree", "hosts", "ranks", "delay µs", "Mbit/s", "there and back µs", "tok/s", "waiting ms", "kB", "messages", "plan"
)  # fmt: skip
PLANNED = ("pipeline", "sync")
"""The --options that `plan` knows, too."""
WIDTHS = (6, 5, 5, 8, 7, 17, 8, 10, 8, 8, 8)
SPEEDS = re.compile(r"decode (\d+) tokens, ([0-9.]+) tok/s \| communication (\d+) %")
"""In what generate says at its end. Its JSON has a digest, for which each rank sends all its logits: 300 kB a token."""
PING = """from mpi4py import MPI
from mpillama.comm.hosts import one_way_seconds
from mpillama.comm.shared_memory import Backoff
seconds = one_way_seconds(MPI.COMM_WORLD, lambda: Backoff(True).pause)
if MPI.COMM_WORLD.rank == 0:
    print(seconds)
"""


@dataclass
class Tree:
    """A state of the program, and what its runs on some hosts have shown so far at one setting."""

    name: str
    path: Path
    model: Path
    bench: Path
    settings: dict[str, str] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    sent: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Bytes and messages of each run, by its tokens."""
    steps: dict[str, list[float]] = field(default_factory=dict)
    """Tokens/s of each `bench`, by what was measured."""

    def sent_per_token(self, few: int, many: int) -> tuple[float, float]:
        """Bytes and messages, without those of starting up."""
        before, after = (
            [statistics.median(numbers) for numbers in zip(*self.sent[count], strict=True)] for count in (few, many)
        )
        return (after[0] - before[0]) / (many - few), (after[1] - before[1]) / (many - few)

    def forget(self) -> None:
        """Begin a new setting."""
        self.speeds, self.waits, self.sent, self.steps = [], [], {}, {}


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--weights", default="q4_0")
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 50, 200, 1000], help="one way, in microseconds")
    parser.add_argument("--rates", type=float, nargs="+", default=[10000, 1000], help="of a host's port, in Mbit/s")
    parser.add_argument("--tokens", type=int, default=48, help="of one stream; 0: measure --batch and --prefill only")
    parser.add_argument("--runs", type=int, default=5, help="of which the median counts")
    parser.add_argument("--options", nargs="*", default=[], help="more of generate and bench, as words without --")
    parser.add_argument("--tokenizer", default="data/demo.h5", help="native file whose tokenizer is used")
    parser.add_argument("--before", type=Path, help="an older tree of this repository, to compare with")
    parser.add_argument("--before-settings", nargs="+", default=[], metavar="NAME=VALUE", help="of its environment")
    parser.add_argument("--batch", type=int, nargs="+", default=[], help="sequences of a step")
    parser.add_argument("--prefill", type=int, nargs="+", default=[], help="tokens of a prompt")
    parser.add_argument("--layers", type=int, help="of the shape that --batch and --prefill measure (default: all)")
    parser.add_argument(
        "--cores-per-host", type=int,
        help="0: hosts share all cores; default: what each can have if one is left for the wire",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    if not (given.tokens or given.batch or given.prefill):
        sys.exit("--tokens 0 leaves nothing to measure: give --batch or --prefill.")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if given.tokens:
            _print(given, COLUMNS)
        for count in given.hosts:
            trees = make_trees(given, Path(folder), count)
            with (
                tempfile.TemporaryDirectory() as state,
                running_hosts(Path(state), count, cores(given, count)) as hosts,
            ):
                for tree in trees if given.tokens else ():
                    measure_nodes(given, hosts, tree)
                for delay in given.delays:
                    for rate in given.rates:
                        hosts.shape(delay, rate)
                        rows += measure(given, hosts, trees, {"delay_us": delay, "mbit": rate})
    if given.json:
        print(json.dumps(rows, indent=2))


def cores(given: argparse.Namespace, hosts: int) -> int:
    """Of each host, 0 if there are too few to give each its own."""
    if given.cores_per_host is not None:
        return int(given.cores_per_host)
    return (len(os.sched_getaffinity(0)) - 1) // hosts


def make_trees(given: argparse.Namespace, folder: Path, hosts: int) -> list[Tree]:
    """This tree, and the older one before it, with one model."""
    model, found = folder / "model.h5", []
    if given.tokens and not model.exists():
        filled_model(model, given.shape, given.weights, given.tokenizer)
    others = dict(setting.split("=", 1) for setting in given.before_settings)
    before = given.before or (ROOT if others else None)
    for name, path, settings in (("before", before, others), ("now", ROOT, {})):
        if path is None:
            continue
        found.append(Tree(name, path.resolve(), model, folder / f"{name}-{hosts}.json", settings))
    return found


def run_here(tree: Tree, *words: str) -> str:
    """Python on no host in particular; returns its standard output."""
    settings = {**environment(), "PYTHONPATH": str(tree.path)}
    done = subprocess.run((sys.executable, *words), capture_output=True, text=True, env=settings, cwd=tree.path)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def printed(output: str) -> Row:
    """The JSON at the start of what was printed: in older trees MPI's own words came behind it."""
    found: Row = json.JSONDecoder().raw_decode(output)[0]
    return found


def measure(given: argparse.Namespace, hosts: Hosts, trees: list[Tree], network: Row) -> list[Row]:
    """A row of each tree: the median of some runs, in turns, and what plan predicts from the ping."""
    ping, by_mpi = hosts.ping(200), latency(hosts)
    for tree in trees:
        tree.forget()
    for number in range(given.runs):
        for tree in trees:
            if given.tokens:
                measure_stream(given, hosts, tree, number)
            for what, speed in measure_steps(given, hosts, tree).items():
                tree.steps.setdefault(what, []).append(speed)
    rows = []
    for tree in trees:
        rows.append({
            "tree": tree.name, "shape": given.shape, "weights": given.weights, "hosts": len(hosts.names),
            "ranks": given.ranks_per_host * len(hosts.names), "cores_per_host": hosts.cores_per_host, **network,
            "ping_us": 1e6 * ping, "mpi_latency_us": 1e6 * by_mpi,
            "steps": {what: statistics.median(all_) for what, all_ in tree.steps.items()},
        })  # fmt: skip
        if given.tokens:
            rows[-1] |= of_stream(given, tree)
            rows[-1]["planned_tokens_per_second"] = plan(given, hosts, tree, by_mpi, network["mbit"])
            _print(given, tuple(_cells(rows[-1])))
    for row in rows if given.batch or given.prefill else ():
        where = f"{row['tree']:>6}  {row['hosts']} hosts, {row['delay_us']:g} µs, {row['mbit']:g} Mbit/s, tok/s:"
        print(where, ", ".join(f"{what} {speed:.1f}" for what, speed in row["steps"].items()), file=_stream(given))
    _stream(given).flush()
    return rows


def measure_stream(given: argparse.Namespace, hosts: Hosts, tree: Tree, number: int) -> None:
    """A run of one stream, and in the first half of the runs a shorter one, which sends as much to start up."""
    if number <= given.runs // 2:
        generate(given, hosts, tree, few_tokens(given))
    speed, share = generate(given, hosts, tree, given.tokens)
    tree.speeds.append(speed)
    tree.waits.append(1e3 * share / speed)


def few_tokens(given: argparse.Namespace) -> int:
    """Of the shorter runs."""
    return max(1, int(given.tokens) // 6)


def of_stream(given: argparse.Namespace, tree: Tree) -> Row:
    """What a tree's runs of one stream have shown."""
    sent, messages = tree.sent_per_token(few_tokens(given), given.tokens)
    return {
        "tokens_per_second": statistics.median(tree.speeds), "slowest": min(tree.speeds), "fastest": max(tree.speeds),
        "waiting_ms": statistics.median(tree.waits), "bytes_per_token": sent, "messages_per_token": messages,
    }  # fmt: skip


def generate(given: argparse.Namespace, hosts: Hosts, tree: Tree, tokens: int) -> tuple[float, float]:
    """Tokens/s of a run, and the share of communication; what all hosts sent meanwhile is noted."""
    hosts.counts()
    words = ("--prompt-token-ids", "5,6,7,8", "--temperature", "0", "--max-tokens", str(tokens), "--max-seq-len", "256")
    command = (*PROGRAM, "generate", "--model", tree.model, *words, *more_options(given))
    result = hosts.run(given.ranks_per_host, *command, tree=tree.path, settings=tree.settings)
    if result.status:
        sys.exit(result.stderr)
    counts = hosts.counts().values()
    tree.sent.setdefault(tokens, []).append((sum(c.bytes for c in counts), sum(c.messages for c in counts)))
    said = SPEEDS.search(result.stderr)
    if said is None or int(said[1]) != tokens - 1:
        sys.exit(f"not all {tokens} tokens were made: {result.stderr}")
    return float(said[2]), int(said[3]) / 100


def more_options(given: argparse.Namespace) -> list[str]:
    return [f"--{word}" if word[0].isalpha() else word for word in given.options]


def measure_steps(given: argparse.Namespace, hosts: Hosts, tree: Tree) -> dict[str, float]:
    """Tokens/s of prompts and of several sequences, if they are asked for."""
    if not given.batch and not given.prefill:
        return {}
    words = ["bench", "--shape", given.shape, "--weights", given.weights, "--json", "--decode", "12", "--context", "64"]
    words += ["--layers", str(given.layers)] if given.layers else []
    words += ["--repetitions", "2", "--prefill", *map(str, given.prefill), "--batch", *map(str, given.batch or [1])]
    command = (*PROGRAM, *words, *more_options(given))
    result = hosts.run(given.ranks_per_host, *command, tree=tree.path, settings=tree.settings)
    if result.status:
        sys.exit(result.stderr)
    found = printed(result.stdout)
    rows = {f"prompt of {row['tokens']}": row for row in found["prefill"]}
    rows |= {f"{row['batch']} sequences": row for row in found["decode"] if row["batch"] in given.batch}
    speeds = {}
    for what, row in rows.items():
        speeds[what] = row["tokens_per_second"]
        tried = row.get("tried_tokens_per_second", {})  # older trees do not tell
        speeds |= {f"{what} in {in_number(int(parts), 'part')}": speed for parts, speed in tried.items()}
    return speeds


def measure_nodes(given: argparse.Namespace, hosts: Hosts, tree: Tree) -> None:
    """What a host reads and computes while all do: a saved bench of some layers on the same ranks."""
    layers = max(1, shape_config(given.shape)["num_hidden_layers"] // 2)
    words = ("bench", "--shape", given.shape, "--weights", given.weights, "--layers", str(layers), "--json")
    hosts.shape()
    command = (*PROGRAM, *words, "--decode", "24", "--prefill", "64", "--context", "64")
    result = hosts.run(given.ranks_per_host, *command, tree=tree.path)
    if result.status:
        sys.exit(result.stderr)
    found = printed(result.stdout)
    if "hosts" not in found:  # an older tree, whose plan takes all for one host's
        found["read_bandwidth_bytes_per_second"] /= len(hosts.names)
        for entry in found["prefill"]:
            entry["multiply_adds_per_second"] /= len(hosts.names)
    tree.bench.write_text(json.dumps(found))


def latency(hosts: Hosts) -> float:
    """Seconds of a small message of MPI's between the first two hosts."""
    result = hosts.run(1, "-c", PING)
    if result.status:
        sys.exit(result.stderr)
    return float(result.stdout)


def plan(given: argparse.Namespace, hosts: Hosts, tree: Tree, latency: float, mbit: float) -> float:
    """Tokens/s that plan predicts."""
    sizes = ("--nodes", str(len(hosts.names)), "--ranks-per-node", str(given.ranks_per_host), "--max-seq-len", "64")
    network = f"{1e6 * latency:.1f}us,{mbit / 8:.1f}MB/s" if mbit else f"{1e6 * latency:.1f}us,10GB/s"
    words = ("plan", "--shape", given.shape, "--weights", given.weights, *sizes, "--bench", str(tree.bench), "--json")
    same = [word for name, value in pairwise(given.options) if name in PLANNED for word in (f"--{name}", value)]
    found = printed(run_here(tree, *PROGRAM, *words, *same, "--network", network))
    return float(found["speed"]["decode_tokens_per_second"])


def _cells(row: Row) -> list[str]:
    return [
        row["tree"], str(row["hosts"]), str(row["ranks"]), f"{row['delay_us']:g}", f"{row['mbit']:g}",
        f"{row['ping_us']:.0f}", f"{row['tokens_per_second']:.2f}", f"{row['waiting_ms']:.1f}",
        f"{row['bytes_per_token'] / 1e3:.1f}", f"{row['messages_per_token']:.0f}",
        f"{row['planned_tokens_per_second']:.2f}",
    ]  # fmt: skip


def _print(given: argparse.Namespace, cells: tuple[str, ...]) -> None:
    widths = [max(width, len(name)) for width, name in zip(WIDTHS, COLUMNS, strict=True)]
    print(
        *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)),
        sep="  ",
        file=_stream(given),
        flush=True,
    )


def _stream(given: argparse.Namespace) -> TextIO:
    return sys.stderr if given.json else sys.stdout


if __name__ == "__main__":
    main()
