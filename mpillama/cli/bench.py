"""`bench`: how fast this job's ranks and threads run a model or a shape, and how close that is to the limit."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import psutil

from mpillama.cli.bench_drafts import bench_drafts
from mpillama.cli.bench_overhead import measure_overhead, only_layers
from mpillama.cli.display import in_number, in_units, load_progress, print_sentence, print_table
from mpillama.cli.options import BenchOptions
from mpillama.cli.plots import draw, refuse_undrawable
from mpillama.cli.running import running
from mpillama.cli.values import refuse_unwritable
from mpillama.comm.communicator import Communicator
from mpillama.comm.hosts import is_first_of_host
from mpillama.comm.pipeline import join_stages
from mpillama.engine.measure import Part, Stopwatch, Timing, read_bandwidth, where_time_goes
from mpillama.engine.skew import RankTimes, skew_of
from mpillama.errors import UserError
from mpillama.job.start import World
from mpillama.kernels.target import Target
from mpillama.loading.load import choose_division, choose_reduction, load_model
from mpillama.loading.placement import warn_of_shared_cores
from mpillama.loading.plan import multiply_adds
from mpillama.loading.progress import LoadWatch
from mpillama.loading.synthetic import SyntheticWeights
from mpillama.loading.traffic import refuse_coarse_sums
from mpillama.loading.truncated import TruncatedModel
from mpillama.models.config import ModelConfig
from mpillama.models.decoder import Decoder, DecoderLayer
from mpillama.models.partition import Division
from mpillama.models.shapes import shape_config, types_of_shape
from mpillama.models.tensors import TensorSpec
from mpillama.models.weights import Weights, load_weights, slice_bytes

Report = dict[str, Any]


MOST_ROWS = 32
"""Of more ranks than these the slowest are shown."""


def print_report(report: Report) -> None:
    print_sentence(_headline(report))
    _print_prefill(report)
    _print_decode(report)
    for step in report.get("where", ()):
        _print_where(step)
    slowest = report["slowest_rank"]
    print_sentence(
        f"slowest rank {slowest['rank']} on {slowest['host']} | "
        f"weights per rank {in_units(max(report['weight_bytes_per_rank']))}, "
        f"whole process {in_units(max(report['rss_bytes_per_rank']))}"
    )
    if report["layers"]["measured"] < report["layers"]["model"]:
        print_sentence(
            f"Only {report['layers']['measured']} of {report['layers']['model']} layers were run; "
            "the column «whole model» is extrapolated from them."
        )


def _headline(report: Report) -> str:
    return (
        f"{report['shape']}, weights {report['weights']}, KV {report['kv_type']}, "
        f"{in_number(report['ranks'], 'rank')}{_on_hosts(report)} x {in_number(report['threads'], 'thread')}, "
        f"{report['isa']}, "
        f"read bandwidth {report['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s"
    )


def _on_hosts(report: Report) -> str:
    return f" on {report['hosts']} hosts" if report["hosts"] > 1 else ""


def _print_prefill(report: Report) -> None:
    header = ("prefill tokens", "tok/s", "slowest – fastest", "communication", *_whole_column(report))
    rows = [
        (
            str(row["tokens"]),
            f"{row['tokens_per_second']:.1f}",
            _range(row),
            f"{100 * row['communication_share']:.1f} %",
            *_whole_cell(row),
        )
        for row in report["prefill"]
    ]
    print_table(header, rows)


def _print_decode(report: Report) -> None:
    columns = ("batch", "context", "tok/s", "slowest – fastest", "bytes per token", "of read bandwidth")
    rows = [
        (
            str(row["batch"]),
            str(row["context"]),
            f"{row['tokens_per_second']:.2f}",
            _range(row),
            in_units(row["bytes_per_token"]),
            f"{100 * row['bandwidth_fraction']:.1f} %",
            f"{100 * row['communication_share']:.1f} %",
            f"{row['allreduce_microseconds']:.1f} µs",
            *_whole_cell(row),
        )
        for row in report["decode"]
    ]
    print_table((*columns, "communication", "per all-reduce", *_whole_column(report)), rows)


def _print_where(step: Report) -> None:
    total = sum(part["seconds"] for part in step["parts"])
    rows = [
        (
            part["part"],
            f"{1e6 * part['seconds']:.1f} µs",
            f"{100 * part['seconds'] / total:.1f} %",
            in_units(part["bytes"]) if "bytes" in part else "",
            f"{part['bytes_per_second'] / 1e9:.1f} GB/s" if "bytes" in part else "",
        )
        for part in step["parts"]
    ]
    print_table((step["step"], f"of {1e6 * total:.0f} µs", "share", "weights", "speed"), rows)
    if "ranks" in step:
        print_waiting(step)


def print_waiting(step: Report) -> None:
    """How long ranks wait, for which, and in which layers most."""
    ranks = step["ranks"]
    staged = any(r["stage_wait_seconds"] for r in ranks)
    rows = [
        (
            str(r["rank"]),
            r["host"],
            f"{1e6 * r['own_seconds']:.0f} µs",
            f"{1e6 * sum(r['waiting_seconds_per_layer']):.0f} µs",
            f"{1e6 * r['wire_seconds']:.0f} µs",
            *([f"{1e6 * r['stage_wait_seconds']:.0f} µs"] if staged else []),
            _worst_layer(r),
        )
        for r in (ranks if len(ranks) <= MOST_ROWS else sorted(ranks, key=lambda r: -r["own_seconds"])[:MOST_ROWS])
    ]
    stages = ("waits for other stages",) if staged else ()
    print_table(("rank", "host", "works", "waits for others", "the wire", *stages, "waits most in"), rows)
    print_sentence(_late_ranks(step))


def _late_ranks(step: Report) -> str:
    """For which rank of each stage the others wait, and how long a rank waits."""
    first_layers = {r["rank"]: r["first_layer"] for r in step["ranks"]}
    several, parts = len(set(first_layers.values())) > 1, []
    for late in step["late"]:
        stage = f"in the stage from layer {first_layers[late['rank']]} on " if several else ""
        parts.append(
            f"{stage}the others wait most for rank {late['rank']} on {late['host']}, which works "
            f"{max(0.0, 1e6 * late['seconds_later']):.0f} µs longer than the middle one"
        )
    parts.append(f"a rank waits {1e6 * step['waiting_seconds']:.0f} µs a step in the mean.")
    sentence = "; ".join(parts)
    return sentence[0].upper() + sentence[1:]


def _worst_layer(rank: Report) -> str:
    waiting = rank["waiting_seconds_per_layer"]
    if not waiting or not max(waiting):
        return ""
    worst = max(range(len(waiting)), key=lambda i: waiting[i])
    return f"layer {rank['first_layer'] + worst} ({1e6 * waiting[worst]:.0f} µs)"


def _range(row: Report) -> str:
    return f"{row['slowest_tokens_per_second']:.1f} – {row['fastest_tokens_per_second']:.1f}"


def _whole_column(report: Report) -> list[str]:
    return ["whole model tok/s"] if report["layers"]["measured"] < report["layers"]["model"] else []


def _whole_cell(row: Report) -> list[str]:
    return [f"{row['whole_model_tokens_per_second']:.3g}"] if "whole_model_tokens_per_second" in row else []


def bench(options: BenchOptions, world: World) -> int:
    world.comm.on_root_only(lambda: _refuse_plot(options))
    if options.draft_tokens or options.draft_model or options.mtp:
        return bench_drafts(options, world)
    with running(options, world) as job:
        model, whole = _load(options, world, job.target)
        job.monitor.watch(model)
        report = _measure(options, world, job.target, model, whole)
        if world.comm.is_root:
            _publish(options, report)
    return job.status


def _refuse_plot(options: BenchOptions) -> None:
    """UserError if --plot is given and could not be drawn or written at the end."""
    if options.plot is not None:
        refuse_unwritable("--plot", options.plot)
        refuse_undrawable()


def _load(options: BenchOptions, world: World, target: Target) -> tuple[Decoder, ModelConfig]:
    """The model with some layers only if asked, and the whole model's configuration.

    They are the first ones of a file, and of a shape some of every kind.
    """
    if options.model is not None:
        loaded = load_model(options, world, target, load_progress(world.comm.is_root, options.json))
        whole_file = loaded.file.whole if isinstance(loaded.file, TruncatedModel) else loaded.file
        return loaded.model, whole_file.config
    warn_of_shared_cores(world, target.threads)
    whole = ModelConfig.from_hf(shape_config(options.shape or ""))
    refuse_coarse_sums(options.sync, whole, options.shape or "")
    config = whole.some_layers(options.layers or whole.num_hidden_layers)
    specs = config.tensors(types_of_shape(options.shape or "", options.weights, config))
    chunk = min(options.prefill_chunk, config.max_position_embeddings)
    division, _ = choose_division(options, config, specs, world, chunk)
    pipeline = join_stages(world.comm, division.stages) if division.stages > 1 else None
    comm = pipeline.group if pipeline else world.comm
    choose_reduction(comm, target.team, config.padded_hidden_size, chunk)
    weights = _made_weights(options, config, specs, division, world, target)
    return Decoder(config, weights, comm, target.team, options.sync == "q80", division, pipeline), whole


def _made_weights(
    options: BenchOptions,
    config: ModelConfig,
    specs: list[TensorSpec],
    division: Division,
    world: World,
    target: Target,
) -> Weights:
    """Fill this rank's memory, and tell how far all ranks are."""
    part, made = config.partition(division)[world.comm.rank], SyntheticWeights()
    total = slice_bytes(specs, part)
    ranks = world.comm.gather((total, world.host))
    progress = load_progress(world.comm.is_root, options.json, "making weights")
    with progress(sum(size for size, _ in ranks)) as show:
        watch = LoadWatch(world.comm, [host for _, host in ranks], made, total, show)
        return load_weights(config, specs, part, made.read, team=target.team, attend=watch.attend)


def weights_of_shape(weights: str) -> str:
    """The weight type of a shape made in memory."""
    return "q4_0" if weights == "as-stored" else weights


def _measure(options: BenchOptions, world: World, target: Target, model: Decoder, whole: ModelConfig) -> dict[str, Any]:
    positions = max([*options.prefill, options.context + options.decode])
    if positions > model.config.max_position_embeddings:
        raise UserError(f"{positions} positions are asked for, the model has {model.config.max_position_embeddings}.")
    watch = Stopwatch(model, positions, max(options.batch), options.kv_type, options.prefill_chunk)
    bandwidths = [read_bandwidth(world.comm, target.team)]
    prefill = [_prefill(options, watch, tokens, whole) for tokens in options.prefill]
    where = _where(options, watch, world.host) if options.where else []
    wire_share = _wire_share(where, world.comm.rank)
    decode = [_decode(options, world, watch, batch, bandwidths, whole, wire_share) for batch in options.batch]
    return {
        "shape": options.shape or options.model,
        "weights": weights_of_shape(options.weights) if options.shape else "as stored",
        "kv_type": options.kv_type,
        "layers": {"measured": model.config.num_hidden_layers, "model": whole.num_hidden_layers},
        "ranks": world.comm.size,
        "hosts": _hosts(world.comm),
        "threads": target.threads,
        "isa": target.isa.name,
        "weight_bytes_per_rank": world.comm.gather(model.weights.bytes),
        "read_bandwidth_bytes_per_second": float(np.median(bandwidths)),
        "prefill": prefill,
        "decode": decode,
        "bandwidth_fraction": decode[0]["bandwidth_fraction"],
        "communication_share": decode[0]["communication_share"],
        "allreduce_microseconds": decode[0]["allreduce_microseconds"],
        "slowest_rank": decode[0]["slowest_rank"],
        "rss_bytes_per_rank": world.comm.gather(_resident_bytes()),
        **({"where": where} if where else {}),
    }


def _hosts(comm: Communicator) -> int:
    """How many hosts all ranks are on."""
    with comm.watch.blocking("the counting of hosts"):
        first = is_first_of_host(comm.mpi)
    return sum(comm.gather(first))


def _where(options: BenchOptions, watch: Stopwatch, host: str) -> list[dict[str, Any]]:
    """The parts of a decode step of each batch and of a prefill chunk, on rank 0, and how ranks wait for each other."""
    chunk = min(options.prefill_chunk, max(options.prefill, default=options.prefill_chunk))
    runs = [
        (
            f"decode, {in_number(batch, 'sequence')}",
            batch,
            partial(watch.decode, batch, options.context, options.decode),
        )
        for batch in options.batch
    ]
    runs.append(
        (f"prefill, chunk of {in_number(chunk, 'token')}", chunk, partial(watch.prefill, chunk, options.repetitions))
    )
    found = []
    for name, tokens, run in runs:
        with watch.comm.doing(f"measuring the parts of {name}"):
            parts, ranks = where_time_goes(watch, run, tokens, host)
        several = _of_several(ranks) if len(ranks) > 1 else {}
        found.append({"step": name, "parts": [_part(part) for part in parts if part.seconds > 0], **several})
    return found


def _wire_share(where: list[dict[str, Any]], rank: int) -> float | None:
    """What of this rank's time in the sums of the first step is not waiting for others; None if nobody measured it."""
    if not where or "ranks" not in where[0]:
        return None
    mine = where[0]["ranks"][rank]
    wire, waiting = mine["wire_seconds"], sum(mine["waiting_seconds_per_layer"])
    return float(wire / (wire + waiting)) if wire else 0.0


def _of_several(ranks: list[RankTimes]) -> dict[str, Any]:
    """What ranks wait for each other."""
    skew = skew_of(ranks)
    return {
        "ranks": [
            {
                "rank": r.rank,
                "host": r.host,
                "own_seconds": r.own,
                "parts": r.parts,
                "first_layer": r.first_layer,
                "waiting_seconds_per_layer": waiting,
                "wire_seconds": wire,
                "stage_wait_seconds": r.stage_wait,
            }
            for r, waiting, wire in zip(ranks, skew.waiting, skew.wire, strict=True)
        ],
        "waiting_seconds": skew.mean,
        "waiting_share_of_work": skew.mean / float(np.mean([r.own for r in ranks])),
        "wire_seconds": max(skew.wire),
        "late": [
            {"rank": rank, "host": ranks[rank].host, "seconds_later": seconds}
            for rank, seconds in zip(skew.late, skew.late_by, strict=True)
        ],
    }


def _part(part: Part) -> dict[str, Any]:
    speed = {"bytes": part.bytes, "bytes_per_second": part.bytes / part.seconds} if part.bytes else {}
    return {"part": part.name, "seconds": part.seconds, **speed}


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _prefill(options: BenchOptions, watch: Stopwatch, tokens: int, whole: ModelConfig) -> dict[str, Any]:
    with watch.model.comm.doing(f"measuring the prefill of {tokens} tokens"):
        timing = watch.prefill(tokens, options.repetitions)
    result = {
        "tokens": tokens,
        **_spread(timing, tokens),
        "multiply_adds_per_second": tokens * multiply_adds(watch.model.config) / timing.median,
        "communication_share": timing.communication_share,
        **_parts(timing),
    }
    if watch.model.config.num_hidden_layers < whole.num_hidden_layers:
        seconds = _extrapolate(watch, timing.median, whole, lambda: watch.prefill(tokens, options.repetitions))
        result["whole_model_tokens_per_second"] = tokens / seconds
    return result


def _decode(
    options: BenchOptions, world: World, watch: Stopwatch, batch: int, bandwidths: list[float], whole: ModelConfig,
    wire_share: float | None,
) -> dict[str, Any]:  # fmt: skip
    # Other machines on the same host change what memory gives from second to second: measured before and after.
    before = read_bandwidth(world.comm, watch.model.team)
    with world.comm.doing(f"measuring {options.decode} steps of {in_number(batch, 'sequence')}"):
        timing = watch.decode(batch, options.context, options.decode)
    bandwidths += [before, read_bandwidth(world.comm, watch.model.team)]
    bandwidth = (bandwidths[-2] + bandwidths[-1]) / 2
    kv_bytes = sum(world.comm.gather(watch.kv_bytes(batch, options.context)))
    at_once = watch.at_once(batch)
    weight_bytes = sum(world.comm.gather(at_once * watch.model.weights.bytes_per_step(-(-batch // at_once))))
    ranks = world.comm.gather((timing.own_seconds, world.host, timing.all_reduce_microseconds))
    sent = max(world.comm.gather((timing.sent.bytes, timing.sent.messages)))
    slowest = max(range(len(ranks)), key=lambda r: ranks[r][0])
    result = {
        "batch": batch,
        "context": options.context,
        "steps_under_way": at_once,
        **_spread(timing, batch),
        "bytes_per_step": weight_bytes + kv_bytes,
        "bytes_per_token": (weight_bytes + kv_bytes) / batch,
        "bandwidth_fraction": (weight_bytes + kv_bytes) / timing.median / bandwidth,
        "communication_share": timing.communication_share,
        "allreduce_microseconds": min(r[2] for r in ranks),
        **_parts(timing),
        "slowest_rank": {"rank": slowest, "host": ranks[slowest][1]},
        "sent_bytes_per_step": sent[0] / len(timing.seconds),
        "sent_messages_per_step": sent[1] / len(timing.seconds),
    }
    if batch == options.batch[0]:
        with world.comm.doing("measuring what a step takes beside its weights"):
            overhead = measure_overhead(watch, timing, batch, options.context, bandwidth, wire_share)
            result["overhead_seconds"] = asdict(overhead)
    if watch.model.config.num_hidden_layers < whole.num_hidden_layers:
        again = lambda: watch.decode(batch, options.context, options.decode)  # noqa: E731
        result["whole_model_tokens_per_second"] = batch / _extrapolate(watch, timing.median, whole, again)
    return result


def _parts(timing: Timing) -> Report:
    """In how many parts steps went, and what was measured to choose that."""
    return {"parts": timing.parts, "tried_tokens_per_second": timing.tried}


def _spread(timing: Timing, tokens: int) -> dict[str, float]:
    """Tokens per second of the median repetition, and its extremes."""
    return {
        "tokens_per_second": tokens / timing.median,
        "slowest_tokens_per_second": tokens / float(np.max(timing.seconds)),
        "fastest_tokens_per_second": tokens / float(np.min(timing.seconds)),
    }


def _extrapolate(watch: Stopwatch, median: float, whole: ModelConfig, again: Callable[[], Timing]) -> float:
    """Seconds of the whole model: what a model without layers takes, plus what layers of each kind take.

    Kinds that were not measured are counted as the others' mean.
    """
    layers, counts = watch.model.layers, Counter(whole.blocks)
    measured = Counter(watch.model.config.blocks)  # on all ranks the same, whichever layers they hold

    def seconds(kept: list[DecoderLayer]) -> float:
        with only_layers(watch, kept):
            return float(again().median)

    rest = seconds([])
    if len(measured) == 1:
        return rest + (median - rest) * whole.num_hidden_layers / measured.total()
    total = 0.0
    for kind, count in measured.items():
        alike = [layer for layer in layers if layer.block == kind]
        total += max(0.0, seconds(alike) - rest) / count * counts[kind]
    return rest + total * whole.num_hidden_layers / sum(counts[kind] for kind in measured)


def _publish(options: BenchOptions, report: dict[str, Any]) -> None:
    if options.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        print_report(report)
    if options.plot:
        draw(report, _headline(report), options.plot)
