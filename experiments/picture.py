"""The README's picture and its table of six rows, from the committed results of `ssl_default.yaml`.

    python -m experiments.picture            # writes docs/images/policies.svg and prints the table

Left: accuracy of a linear probe over the samples that training has seen. These bars hold what a seed brings
to all policies alike, its first weights and its views. Right: the difference to `random` of the same seed and
the same number of samples, where that is gone. Bars are sample standard deviations over the seeds.
"""

import io
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.table import (
    FRACTION,
    POLICY,
    SEED,
    grouped,
    latest,
    markdown,
    over_seeds,
    pairs,
    read_rows,
    spread,
)
from ssl_emp.safe_files import write_atomically

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results" / "ssl_default.jsonl"
PICTURE = ROOT / "docs" / "images" / "policies.svg"
TABLE_FRACTION = 0.7  # the one at which every policy was run
# policy -> its name, its colour on white and on black (Okabe and Ito's, darker and brighter), its marker
LOOKS = {
    "none": ("unpruned", "#1f2327", "#f0f6fb", "*"),
    "random": ("random", "#6e7781", "#9198a1", "o"),
    "shorter": ("shorter", "#a35200", "#e69f00", "X"),
    "foresight": ("foresight (ours)", "#0072b2", "#56b4e9", "s"),
    "ucb": ("UCB", "#00805e", "#2fc79a", "D"),
    "emp": ("EMP as written, β = 5", "#b3397c", "#ee8fc4", "^"),
}
INK, FAINT, PAPER = ("#24292f", "#e6edf3"), ("#d0d7de", "#3d444d"), ("#ffffff", "#0d1117")


@dataclass(frozen=True)
class Point:
    """A policy at one fraction: accuracies in per cent, one a seed."""

    policy: str
    fraction: float  # left out of a pruned epoch
    samples: int  # seen in training
    values: list[float]
    ahead: list[float]  # of random with the same seed and fraction; empty for random and the unpruned run


def points(metric: str) -> list[Point]:
    """Every policy of `LOOKS` at every fraction that was run, in their order, the fewest samples first."""
    plain = {POLICY, FRACTION, SEED}  # rows with further keys are experiments of their own
    rows = [row for row in latest(read_rows(RESULTS)) if row["cell"].keys() <= plain]
    found = []
    for (policy, fraction), group in grouped(rows, [POLICY, FRACTION]).items():
        ahead = [ours - theirs for ours, theirs in pairs(group, "random", metric, rows)]
        values = list(over_seeds(group, metric).values())
        found.append(Point(policy, fraction or 0.0, group[0]["samples_seen"], values, ahead))
    order = list(LOOKS)
    shown = [point for point in found if point.policy in order]
    return sorted(shown, key=lambda point: (order.index(point.policy), point.samples))


def table() -> str:
    """Six rows: the unpruned run, and every policy at the fraction that all of them have."""
    both = zip(points("knn"), points("linear"), strict=True)
    rows = [(knn, linear) for knn, linear in both if knn.fraction in (0, TABLE_FRACTION)]
    return markdown(
        {
            "policy": [LOOKS[knn.policy][0] for knn, _ in rows],
            "samples seen": [f"{knn.samples:,}" for knn, _ in rows],
            "kNN %": [spread(knn.values, 2) for knn, _ in rows],
            "linear %": [spread(linear.values, 2) for _, linear in rows],
            "linear - random": [spread(linear.ahead, 2, "+") if linear.ahead else "" for _, linear in rows],
            "seeds": [str(len(knn.values)) for knn, _ in rows],
        }
    )


def facts() -> str:
    """The numbers of the picture as JSON; they stand in it too, and say whether it is of these results."""
    shown = [
        [point.policy, point.samples, len(point.values)]
        + [round(number, 3) for number in (*mean_and_std(point.values), *mean_and_std(point.ahead))]
        for point in points("linear")
    ]
    return json.dumps(shown, separators=(",", ":"))


def mean_and_std(values: list[float]) -> tuple[float, ...]:
    return (statistics.mean(values), statistics.stdev(values)) if len(values) > 1 else ()


def draw() -> str:
    """The picture as SVG, for light and dark pages."""
    import matplotlib  # takes a second to import, and is of the extra `experiments`
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "ssl_emp",  # the same numbers, the same file
        "font.family": "sans-serif",
        "font.size": 10.5,
        "text.color": INK[0],
        "axes.labelcolor": INK[0],
        "axes.edgecolor": INK[0],
        "xtick.color": INK[0],
        "ytick.color": INK[0],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": PAPER[0],
        "axes.facecolor": PAPER[0],
    }
    with matplotlib.rc_context(style):
        fig = Figure(figsize=(9.2, 4.1), layout="constrained")
        accuracy, ahead = fig.subplots(1, 2, width_ratios=(1.15, 1))
        accuracy.set_title("linear probe, CIFAR-10, %", fontsize=11, loc="left")
        ahead.set_title("points ahead of random, same seed and samples", fontsize=11, loc="left")
        for axes in (accuracy, ahead):
            axes.grid(axis="y", color=FAINT[0], linewidth=0.7)
            axes.set_axisbelow(True)
            axes.set_xlabel("samples seen in training, thousands")
        ahead.axhline(0, color=LOOKS["random"][1], linewidth=1.2)
        for place, (policy, (name, colour, _, marker)) in enumerate(LOOKS.items()):
            mine = [point for point in points("linear") if point.policy == policy]
            shift = 0 if policy == "none" else 5 * (place - 3)  # side by side: they saw as many samples
            look = {"color": colour, "marker": marker, "capsize": 2.5, "elinewidth": 1.1, "linewidth": 1.6}
            look |= {"markersize": 11 if policy == "none" else 5.5}
            x = [point.samples / 1000 + shift for point in mine]
            mean, std = zip(*(mean_and_std(point.values) for point in mine), strict=True)
            accuracy.errorbar(x, mean, std, label=name, **look)
            compared = [
                (at, *mean_and_std(point.ahead)) for at, point in zip(x, mine, strict=True) if point.ahead
            ]
            if compared:
                at, mean, std = zip(*compared, strict=True)
                ahead.errorbar(at, mean, std, **look)
        compared_at = [point.samples / 1000 for point in points("linear") if point.ahead]
        ahead.set_xlim(min(compared_at) - 30, max(compared_at) + 30)
        handles, labels = accuracy.get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, columnspacing=1.4)
        stream = io.StringIO()
        fig.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Description": facts()})
    return for_light_and_dark(stream.getvalue())


def for_light_and_dark(svg: str) -> str:
    """The colours of a dark page where the browser says so; who does not ask draws the light ones."""
    colours = [*((light, dark) for _, light, dark, _ in LOOKS.values()), INK, FAINT, PAPER]
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in colours
        for kind in ("stroke", "fill")
    )
    title = "<title>Accuracy of a linear probe over samples seen, by policy, and the lead over random</title>"
    dark = f"@media(prefers-color-scheme:dark){{{rules}}}"
    style = f"<style>text{{font-family:system-ui,sans-serif}}{dark}</style>"
    return re.sub(r"(<svg [^>]*>)", rf"\1\n {title}\n {style}", svg, count=1)


def main() -> int:
    write_atomically(PICTURE, draw().encode())
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
