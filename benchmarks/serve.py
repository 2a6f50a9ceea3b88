"""Load a server with streaming clients and tell what they saw: errors, speed, fairness, latency, memory.

python benchmarks/serve.py --clients 64 --seconds 300                       the demo model
python benchmarks/serve.py --shape llama-3.2-1b --clients 32 --against-batch   the server's share of the engine's speed

With --shape the weights are all zero (as in benchmarks/batch.py). Clients are bare sockets in one thread, on loopback;
they take time from the same cores as the server. Prints one JSON object.
"""

import argparse
import asyncio
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import urlopen

import psutil
from batch import hollow_model

TOKEN = 300
"""The one token that answers of an empty model consist of."""


@dataclass
class Seen:
    """What one client saw."""

    tokens: int = 0
    requests: int = 0
    errors: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)

    def with_(self, other: "Seen") -> "Seen":
        """The two together."""
        return Seen(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("data/demo.h5"))
    parser.add_argument("--shape", help="measure an empty model of a known shape")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--sequences", type=int, help="of the server (default: as many as clients)")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--requests", type=int, help="of each client, instead of a time")
    parser.add_argument("--answer", type=int, default=200, help="tokens of an answer")
    parser.add_argument("--against-batch", action="store_true", help="run `batch` on the same rows before and after")
    parser.add_argument("--options", nargs="*", default=[], help="more options of serve")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.shape:
            given.model = hollow_model(Path(folder) / "model.h5", given.shape, "q4_0", str(given.model))
        sys.stdout.write(json.dumps(measure(given, Path(folder)), indent=2) + "\n")


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    batches = [batch_speed(given, folder, i) for i in range(given.against_batch)]
    with server(given, folder) as (url, ranks):
        asyncio.run(load(url, given, 3.0))  # the first answers warm everything up
        halves_of = 1e9 if given.requests else given.seconds / 2
        before, figures = [p.memory_info().rss for p in ranks], engine_figures(url)
        began = time.monotonic()
        halves = [asyncio.run(load(url, given, halves_of, given.requests))]
        half_way = [p.memory_info().rss for p in ranks]
        halves.append(asyncio.run(load(url, given, 0 if given.requests else halves_of)))
        seconds = time.monotonic() - began
        after, used = [p.memory_info().rss for p in ranks], engine_figures(url)
        files = [p.num_fds() for p in ranks]
    batches += [batch_speed(given, folder, 9) for _ in range(given.against_batch)]
    steps = {name: used[name] - figures[name] for name in figures}
    seen = [one.with_(other) for one, other in zip(*halves, strict=True)]
    memory = {"resident_before": before, "resident_half_way": half_way, "resident_after": after}
    result = {**summary(seen, seconds), **memory, "open_files": files}
    result["engine_tokens_per_second_of_step_time"] = steps["sampled_tokens"] / max(steps["step_seconds"], 1e-9)
    result["step_share_of_time"] = steps["step_seconds"] / seconds
    if batches:
        result["batch_tokens_per_second_of_step_time"] = batches
        result["server_to_batch"] = result["tokens_per_second"] / statistics.mean(batches)
    return result


def summary(seen: list[Seen], seconds: float) -> dict[str, Any]:
    """The clients' view."""
    gaps, firsts = sorted(g for s in seen for g in s.gaps), sorted(f for s in seen for f in s.firsts)
    tokens = [s.tokens for s in seen]
    return {
        "clients": len(seen),
        "seconds": seconds,
        "requests": sum(s.requests for s in seen),
        "errors": [e for s in seen for e in s.errors],
        "tokens": sum(tokens),
        "tokens_per_second": sum(tokens) / seconds,
        "fairness_max_to_min": max(tokens) / max(1, min(tokens)),
        "token_seconds": quantiles(gaps),
        "first_token_seconds": quantiles(firsts),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, 95th and 99th hundredth, of sorted values."""
    at = {"median": 0.5, "p95": 0.95, "p99": 0.99}
    return {name: values[min(len(values) - 1, int(q * len(values)))] for name, q in at.items()} if values else {}


@contextmanager
def server(given: argparse.Namespace, folder: Path) -> Iterator[tuple[str, list[psutil.Process]]]:
    """A running server: URL and processes of its ranks."""
    file, sequences = folder / "server.json", given.sequences or given.clients
    words = ["serve", "--model", given.model, "--port", "0", "--rendezvous", file, "--sequences", sequences, "--quiet"]
    command = [*launcher(given.ranks), sys.executable, "-m", "mpillama", *words, "--max-seq-len", "512", *given.options]
    process = subprocess.Popen([str(c) for c in command])
    try:
        while not file.exists():
            if process.poll() is not None:
                raise SystemExit(f"the server ended with status {process.returncode}")
            time.sleep(0.1)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        yield json.loads(file.read_text())["url"], [p for p in family if "-m" in p.cmdline() and "python" in p.name()]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGUSR1)
        process.wait(120)


def launcher(ranks: int) -> list[str]:
    """The words before Python."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun") or "mpirun"
    return [found, "-n", str(ranks)] if ranks > 1 else []


def body_of(given: argparse.Namespace, client: int) -> bytes:
    """A request for an answer of full length."""
    body = {"prompt": [5 + client % 100] * 16, "max_tokens": given.answer, "temperature": 0, "ignore_eos": True}
    more = {"logit_bias": {str(TOKEN): 100}} if given.shape else {}
    return json.dumps({**body, **more, "stream": True}).encode()


async def load(url: str, given: argparse.Namespace, seconds: float, requests: int | None = None) -> list[Seen]:
    """All clients at once, each with one request after the other."""
    where, end = urlparse(url), time.monotonic() + seconds
    seen = [Seen() for _ in range(given.clients)]
    most = math.inf if requests is None else requests
    clients = (
        ask_until(end, most, where.hostname or "", where.port or 0, body_of(given, i), s) for i, s in enumerate(seen)
    )
    await asyncio.gather(*clients)
    return seen


async def ask_until(end: float, most: float, host: str, port: int, body: bytes, seen: Seen) -> None:
    """One client; the answer under way at the end is left."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    request = f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    while time.monotonic() < end and seen.requests + len(seen.errors) < most:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(request)
            await asyncio.wait_for(read_answer(reader, end, seen), end - time.monotonic() + 30)
        except (OSError, ValueError, TimeoutError) as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
        finally:
            writer.close()


async def read_answer(reader: asyncio.StreamReader, end: float, seen: Seen) -> None:
    """Count the events of a stream and time them."""
    began = last = time.monotonic()
    status = (await reader.readline()).decode()
    if " 200 " not in status:
        raise ValueError(status.strip())
    first, done = True, False
    while time.monotonic() < end and (line := await reader.readline()):
        if b'"error"' in line:
            raise ValueError(line.decode().strip())
        done = done or line.startswith(b"data: [DONE]")
        if not line.startswith(b"data: {"):
            continue
        now = time.monotonic()
        (seen.firsts if first else seen.gaps).append(now - last if not first else now - began)
        first, last = False, now
        seen.tokens += 1
    seen.requests += done


def engine_figures(url: str) -> dict[str, float]:
    """The engines' counters, all groups together."""
    found = {"sampled_tokens": 0.0, "step_seconds": 0.0}
    for line in urlopen(f"{url}/metrics", timeout=60).read().decode().splitlines():
        for name in found:
            if line.startswith(f"mpillama_{name}_total{{"):
                found[name] += float(line.split()[-1])
    return found


def batch_speed(given: argparse.Namespace, folder: Path, number: int) -> float:
    """Tokens a second of step time that `batch` reaches with rows like the clients' requests."""
    source, target = folder / "in.jsonl", folder / f"out{number}.jsonl"
    count = given.clients * (given.requests or 1)
    rows = [{"id": str(i), **json.loads(body_of(given, i % given.clients))} for i in range(count)]
    source.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "stream"}) + "\n" for row in rows))
    words = ["batch", source, target, "--model", given.model, "--sequences", given.sequences or given.clients, "--json"]
    command = [*launcher(given.ranks), sys.executable, "-m", "mpillama", *words, "--max-seq-len", "512"]
    done = subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE, env=os.environ)
    found = json.loads(done.stdout)
    return float(found["answer_tokens"] / found["step_seconds"])


if __name__ == "__main__":
    main()
