"""What `bench --plot` draws: the roofline, where the time of a step goes, and which rank the others wait for."""

from importlib.util import find_spec
from typing import Any

import numpy as np

from mpillama.errors import UserError

Report = dict[str, Any]

MOST_LABELS = 24
"""Of more ranks or layers than these not each is named."""


def refuse_undrawable() -> None:
    """UserError if what draws is not installed: to be known before hours of measuring."""
    if find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'mpillama[plot]'.")


def draw(report: Report, title: str, path: str) -> None:
    """Write a PNG: decode speed under its memory roofline, where the time of a step goes, and who waits for whom."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    step = next((step for step in report.get("where", ()) if "ranks" in step), None)
    rows = 2 if step else 1
    figure, axes = plt.subplots(rows, 2, figsize=(13, 4.5 * rows), layout="constrained", squeeze=False)
    _draw_roofline(axes[0][0], report)
    _draw_split(axes[0][1], report)
    if step:
        _draw_parts(figure, axes[1][0], step)
        _draw_waiting(figure, axes[1][1], step)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _names(step: Report) -> list[str]:
    """Of the ranks, the late ones marked."""
    late = {each["rank"] for each in step["late"]}
    several = len({r["host"] for r in step["ranks"]}) > 1
    named = [f"rank {r['rank']}{' on ' + r['host'] if several else ''}" for r in step["ranks"]]
    return [name + " (LATE)" * (r["rank"] in late) for name, r in zip(named, step["ranks"], strict=True)]


def _draw_parts(figure: Any, axes: Any, step: Report) -> None:
    """Ranks x parts: seconds against the middle rank's, so that the late one is red where it is slow."""
    ranks = step["ranks"]
    parts = [name for name in ranks[0]["parts"] if max(r["parts"][name] for r in ranks) > 0]
    seconds = np.array([[r["parts"][name] for name in parts] for r in ranks])
    total = float(np.median(seconds.sum(axis=1)))
    against = 100 * (seconds - np.median(seconds, axis=0)) / total
    most = max(1.0, float(np.abs(against).max()))
    image = axes.imshow(against, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    figure.colorbar(image, ax=axes, label="% of a step more than the middle rank")
    axes.set_xticks(range(len(parts)), parts, rotation=40, ha="right")
    _name_ranks(axes, _names(step))
    unit, factor = ("µs", 1e6) if total < 0.01 else ("ms", 1e3)
    if seconds.size <= 16 * len(parts):
        for row, col in np.ndindex(*seconds.shape):
            dark = abs(against[row, col]) > 0.6 * most
            text = f"{factor * seconds[row, col]:{'.0f' if unit == 'µs' else '.1f'}}"
            axes.text(col, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set(title=f"{step['step']}: {unit} of each part, by rank")


def _draw_waiting(figure: Any, axes: Any, step: Report) -> None:
    """Ranks x layers: waiting for others in the sums of each layer."""
    ranks = step["ranks"]
    layers = max(r["first_layer"] + len(r["waiting_seconds_per_layer"]) for r in ranks)
    waiting = np.full((len(ranks), layers), np.nan)
    for row, r in zip(waiting, ranks, strict=True):
        row[r["first_layer"] : r["first_layer"] + len(r["waiting_seconds_per_layer"])] = r["waiting_seconds_per_layer"]
    image = axes.imshow(1e6 * waiting, cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="µs")
    _name_ranks(axes, _names(step))
    axes.set(title=f"{step['step']}: waiting for other ranks", xlabel="layer")


def _name_ranks(axes: Any, names: list[str]) -> None:
    shown = range(0, len(names), -(-len(names) // MOST_LABELS))
    axes.set_yticks(list(shown), [names[i] for i in shown])


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
