"""How `bench` shows its figures: tables and a picture."""

from typing import Any

from mpillama.cli.display import in_number, in_units
from mpillama.cli.terminal import print_sentence, print_table
from mpillama.errors import UserError

Report = dict[str, Any]


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
        f"{in_number(report['ranks'], 'rank')} x {in_number(report['threads'], 'thread')}, {report['isa']}, "
        f"read bandwidth {report['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s"
    )


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


def _range(row: Report) -> str:
    return f"{row['slowest_tokens_per_second']:.1f} – {row['fastest_tokens_per_second']:.1f}"


def _whole_column(report: Report) -> list[str]:
    return ["whole model tok/s"] if report["layers"]["measured"] < report["layers"]["model"] else []


def _whole_cell(row: Report) -> list[str]:
    return [f"{row['whole_model_tokens_per_second']:.3g}"] if "whole_model_tokens_per_second" in row else []


def draw(report: Report, path: str) -> None:
    """Write a PNG: decode speed under its memory roofline, and where the time of a step goes."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'mpillama[plot]'.") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (roofline, split) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    _draw_roofline(roofline, report)
    _draw_split(split, report)
    figure.suptitle(_headline(report))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_roofline(axes: Any, report: Report) -> None:
    batches = [row["batch"] for row in report["decode"]]
    limit = [report["read_bandwidth_bytes_per_second"] / row["bytes_per_token"] for row in report["decode"]]
    axes.plot(batches, limit, "--", color="gray", marker="_", label="memory limit")
    axes.plot(batches, [row["tokens_per_second"] for row in report["decode"]], "o-", label="decode, measured")
    best = max((row["tokens_per_second"] for row in report["prefill"]), default=None)
    if best is not None:
        axes.axhline(best, color="tab:orange", linestyle=":", label="prefill, measured (arithmetic limit)")
    axes.set(xscale="log", yscale="log", xlabel="sequences in a step", ylabel="tokens/s", title="Roofline")
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.legend()


def _draw_split(axes: Any, report: Report) -> None:
    rows = report["decode"]
    labels = [f"decode, batch {row['batch']}" for row in rows]
    streaming = [min(1.0, row["bandwidth_fraction"]) for row in rows]
    talking = [min(row["communication_share"], 1 - s) for row, s in zip(rows, streaming, strict=True)]
    rest = [max(0.0, 1 - s - t) for s, t in zip(streaming, talking, strict=True)]
    left = [0.0] * len(rows)
    for values, name in ((streaming, "memory at full bandwidth"), (talking, "communication"), (rest, "all else")):
        axes.barh(labels, [100 * v for v in values], left=[100 * v for v in left], label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set(xlabel="% of the time of a step", title="Where the time goes", xlim=(0, 100))
    axes.legend(loc="lower left")
