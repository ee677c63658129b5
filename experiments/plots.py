"""Figures of a results file: accuracy against what it cost, the β sweep, how often samples were trained on.

Each function gives a matplotlib Figure, or None where the rows have nothing to draw; `draw_all` writes them
as PNG.
"""

import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.table import (
    BETA,
    FRACTION,
    MEMORY,
    POLICY,
    Row,
    cost_of,
    counterpart,
    figure,
    grouped,
    head,
    keys_of,
    over_seeds,
    short_names,
    varying,
)

# Okabe and Ito's palette without its yellow, which is pale on white; colours alone do not tell more than six
# lines apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", ":")
FIXED = {"none": "#000000", "random": "#777777", "shorter": "#777777"}  # baselines
MARKERS = "osD^vP"


def style_of(labels: list[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes for each label; the same for the same labels in every figure."""
    styles: dict[str, dict[str, Any]] = {}
    for label in labels:
        number = sum(other not in FIXED for other in styles)
        turn = number // len(COLOURS)
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[(number + turn) % len(MARKERS)],
            "ls": DASHES[turn % len(DASHES)],
        }
        if label in FIXED:
            style = {
                "color": FIXED[label],
                "marker": "*" if label == "none" else "X",
                "ls": "--" if label == "shorter" else "-",
            }
        styles[label] = style
    return styles


def labelled(rows: list[Row], without: list[str]) -> dict[str, list[Row]]:
    """Label of each line: values of the varying keys except `without`, with names where needed."""
    by = [key for key in varying(rows) if key not in without]
    lines = {}
    for key, group in grouped(rows, by).items():
        parts = [
            str(v) if k == POLICY or isinstance(v, str) else f"{name}={v:g}"
            for k, name, v in zip(by, short_names(by), key, strict=True)
            if v != ""
        ]
        lines[" ".join(parts) or head("all_cells")] = group
    return lines


def canvas(x_label: str, y_label: str, width: float = 7.0) -> tuple[Figure, Axes]:
    fig = Figure(figsize=(width, 4.2), layout="constrained")
    axes = fig.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return fig, axes


def legend(axes: Axes) -> None:
    """A legend beside the axes, in the order of the lines' last values."""
    lines = [container for container in axes.containers if isinstance(container, ErrorbarContainer)]
    lines.sort(key=lambda line: -np.asarray(line.lines[0].get_ydata())[-1])
    labels = [str(line.get_label()) for line in lines]
    long = max(map(len, labels), default=0) > 24  # long labels go below the axes
    place = (
        {"loc": "upper left", "bbox_to_anchor": (0, -0.16)}
        if long
        else {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
    )
    axes.legend(lines, labels, frameon=False, **place)
    if long:
        fig = axes.get_figure(root=True)
        assert fig is not None
        fig.set_figheight(4.2 + 0.22 * len(labels))


def thousands(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def against_cost(rows: list[Row], metric: str, cost: str) -> Figure | None:
    """Accuracy against `samples_seen`, `cpu_seconds` or `training_seconds`: a line a policy over its
    fractions, bars = std over seeds.
    """
    x_label = {
        "samples_seen": "samples seen in training (equal counts side by side)",
        "cpu_seconds": "CPU seconds of pretraining (median over seeds)",
    }
    fig, axes = canvas(x_label.get(cost, "wall seconds of training (median over seeds)"), head(metric))
    lines = labelled(rows, [FRACTION])
    every = [row[cost] for row in rows if row.get(cost) is not None]
    if not every:
        return None
    # policies have seen equal numbers of samples: shift their points, or the error bars overlap
    step = 0.006 * (max(every) - min(every)) if cost == "samples_seen" else 0.0
    shift = {label: step * (i - (len(lines) - 1) / 2) for i, label in enumerate(lines)} | {"none": 0.0}
    for (label, group), style in zip(lines.items(), style_of(list(lines)).values(), strict=True):
        points = []
        for at in grouped(group, [FRACTION]).values():
            values = list(over_seeds(at, metric).values())
            costs = [row[cost] for row in at if row.get(cost) is not None]
            if values and costs:
                deviation = statistics.stdev(values) if len(values) > 1 else math.nan
                points.append((statistics.median(costs) + shift[label], statistics.mean(values), deviation))
        if points:
            x, y, error = zip(*sorted(points), strict=True)
            size = 10 if style["marker"] == "*" else 5
            axes.errorbar(
                x, y, error, label=label, capsize=2, elinewidth=0.8, linewidth=1.4, markersize=size, **style
            )
    if not axes.containers:
        return None
    starts = [row["start"][metric] for row in rows if metric in row.get("start", {})]
    if starts:
        across(axes, statistics.mean(starts), "start")
    thousands(axes)
    legend(axes)
    return fig


def across(axes: Axes, level: float, name: str) -> None:
    """A dashed line at a level, with its name at the right end."""
    axes.axhline(level, color=FIXED["random"], linewidth=1, linestyle="--")
    place: Any = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
    axes.annotate(name, (0.995, level), color=FIXED["random"], **place)


def beta_sweep(rows: list[Row], metric: str) -> Figure | None:
    """The metric against β, a line for each scale of the memory term (and whatever else varies), `random`
    across where it is one figure.
    """
    swept = [row for row in rows if BETA in keys_of(row) and figure(row, metric) is not None]
    if len({keys_of(row)[BETA] for row in swept}) < 3:  # a curve needs three values
        return None
    fig, axes = canvas("β, weight of the memory term", head(metric))
    lines = labelled(swept, [BETA])
    betas = sorted({float(keys_of(row)[BETA]) for row in swept})
    for (label, group), style in zip(lines.items(), style_of(list(lines)).values(), strict=True):
        at = {
            float(key[0]): list(over_seeds(same, metric).values())
            for key, same in grouped(group, [BETA]).items()
        }
        x = sorted(at)
        error = [statistics.stdev(at[beta]) if len(at[beta]) > 1 else math.nan for beta in x]
        y = [statistics.mean(at[beta]) for beta in x]
        name = label if any(key in (MEMORY, POLICY) for key in varying(swept)) else head(label)
        axes.errorbar(
            x, y, error, label=name, capsize=2, elinewidth=0.8, linewidth=1.4, markersize=5, **style
        )
    if len(lines) > 1:
        legend(axes)
    randoms = {id(other): other for row in swept if (other := counterpart(row, "random", rows))}.values()
    if randoms and len({keys_of(row).get(FRACTION) for row in randoms}) == 1:
        level = statistics.mean(over_seeds(list(randoms), metric).values())
        across(axes, level, "random")
    if betas[0] > 0:
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=betas[1])
        axes.set_xlim(left=-betas[1] / 3)
    axes.set_xticks(betas, [f"{beta:g}" for beta in betas])
    axes.minorticks_off()
    return fig


def times_trained(rows: list[Row]) -> Figure | None:
    """How often each sample was trained on: a small histogram for each cell without its seed, share of the
    samples over all seeds.

    Where every sample came up about as often (two counts at most, as without pruning) there is nothing to
    see: left out.
    """
    lines: dict[str, Counter[int]] = {}
    for label, group in labelled(rows, []).items():
        lines[label] = Counter()
        for row in group:
            lines[label].update({int(times): count for times, count in row.get("times_trained", {}).items()})
    lines = {label: counts for label, counts in lines.items() if len(counts) > 2}
    if not lines:
        return None
    columns = min(4, math.ceil(math.sqrt(len(lines))))
    height = math.ceil(len(lines) / columns)
    fig = Figure(figsize=(2.3 * columns + 0.5, 1.7 * height + 0.6), layout="constrained")
    panels = fig.subplots(height, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (label, counts) in zip(panels.flat, lines.items(), strict=False):
        axes.bar(
            list(counts),
            [100 * count / counts.total() for count in counts.values()],
            width=0.9,
            color=COLOURS[0],
        )
        axes.set_title(textwrap.fill(label, 30), fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in panels.flat[len(lines) :]:
        axes.set_visible(False)
    fig.supxlabel("times trained on (epochs)", fontsize=10)
    fig.supylabel("% of the samples", fontsize=10)
    return fig


def draw_all(rows: list[Row], folder: Path, metrics: list[str], prefix: str) -> list[Path]:
    """Write every figure that the rows can fill as `folder/PREFIX_*.png`; returns the paths."""
    cost = cost_of(rows)[0]
    wanted: dict[str, Callable[[], Figure | None]] = {"times_trained": partial(times_trained, rows)}
    for metric in metrics:
        wanted[f"{metric}_samples"] = partial(against_cost, rows, metric, "samples_seen")
        wanted[f"{metric}_seconds"] = partial(against_cost, rows, metric, cost)
        wanted[f"{metric}_beta"] = partial(beta_sweep, rows, metric)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in wanted.items():
        if fig := draw():
            paths.append(folder / f"{prefix}_{name}.png")
            fig.savefig(paths[-1], dpi=150)
    return paths
