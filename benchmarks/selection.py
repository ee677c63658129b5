"""Selecting the kept set of 100 million scores. (Its share of a step, for 50,000: `benchmarks.pruning`.)

    python -m benchmarks.selection

`select_kept` with s = 0.3 on random scores; beside it torch.topk, and the keyed shuffle into batches that
follows. Memory is what the peak (`ru_maxrss`) of a fresh process grows by, the result included, in units of
the scores' own bytes.
"""

import argparse
import json
from functools import partial
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Ratio
from ssl_emp.prune.plan import shuffled_batches
from ssl_emp.prune.policies import select_kept

FRACTION = 0.3
FIGURES = ("seconds", "memory / scores")


def child(name: str, figure: str, count: int, device: torch.device) -> float:
    """Seconds of one call in this process, or what it adds to the peak of memory."""
    scores = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(device)
    kept_count = round((1 - FRACTION) * count)
    kept = torch.arange(kept_count, device=device) if name == "shuffle" else torch.empty(0)
    work: dict[str, Any] = {
        "select_kept": lambda: select_kept(scores, kept_count),
        "topk": lambda: scores.topk(kept_count, sorted=False),
        "shuffle": lambda: shuffled_batches(kept, 256, 0, 1),
    }
    select_kept(scores[:1000], 700)
    return (
        common.seconds(work[name]) if figure == "seconds" else common.peak_growth(work[name]) / scores.nbytes
    )


def measure(name: str, figure: str, count: int, arguments: Any) -> float:
    options = ["--child", name, "--figure", figure, "--count", str(count), "--device", str(arguments.device)]
    return float(json.loads(common.run_python(["-m", "benchmarks.selection", *options]).splitlines()[-1]))


def main(argv: list[str] | None = None) -> None:
    options = common.parser("Selection of the kept set.")
    options.add_argument("--count", type=int)
    options.add_argument("--child", choices=["select_kept", "topk", "shuffle"], help=argparse.SUPPRESS)
    options.add_argument("--figure", choices=FIGURES, help=argparse.SUPPRESS)
    arguments = common.parse(options, argv)
    count = arguments.count or (100_000 if arguments.quick else 100_000_000)
    if arguments.child:
        return print(json.dumps(child(arguments.child, arguments.figure, count, arguments.device)))
    names = ("select_kept", "topk", "shuffle")
    cases = {}
    for figure, goal in zip(FIGURES, (10.0, 3.0), strict=True):
        figures = common.interleave(
            {name: partial(measure, name, figure, count, arguments) for name in names}, arguments.repeats
        )
        goals = [
            Ratio("select_kept", goal=goal, at_most=True, name=f"select_kept, {figure}"),
            Ratio("topk", "select_kept"),
        ]
        cases[f"{count:,} scores, {figure}"] = common.summary(figures, goals, figure)
    common.write("selection", {"cases": cases}, arguments)


if __name__ == "__main__":
    common.run(main)
