"""Minutes to a kNN accuracy: lightly's own loop against pretrain.py, unpruned and pruned, on the same images.

    python -m benchmarks.time_to_quality --data CIFAR10 [--until 18:30]

`lightly` is `benchmarks.lightly_loop` with the recipe of lightly's CIFAR-10 benchmark (T = 0.5, rate 0.06 for
128 images, views of 32 px, crops from 8 % of the image, a cosine), `lightly, our recipe` the same loop with
the recipe of `ours`. Each is given runs of growing length, and takes the time of the shortest one whose
encoder, at the end of its cosine, reaches the accuracy in the mean over the seeds: no accuracy is read in the
middle of a run. The time is that of training and scoring, without start, reading and evaluation; all of the
machine's cores, one run at a time, contenders in turn. kNN: k = 20, T = 0.1, the train images as bank, the
whole test split.

One line a run is appended to `--out` and is not run again, so the same command goes on where it stopped.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks import common

CONFIG = "configs/cifar10_emp.yaml"
TARGETS = (45.0, 50.0)  # percent
GOAL = 5.0  # times as fast as lightly's loop
SHARED = {
    "compile": "false",
    "monitor.knn_every": 0,
    "monitor.reliability_every": 0,
    "monitor.tensorboard": "false",
    "checkpoint.every_minutes": 1000,
    "augment.size": 24,
    "augment.crop_scale": "[0.2, 1.0]",
    "optimizer.warmup_epochs": 1,
    "optimizer.lr": 0.48,
    "batch_size": 64,
    "temperature": 0.2,
}
SIZES = "[[16, 0.6], [24, 1.0]]"  # small views first
THEIRS = {"batch-size": 256, "lr": 0.12, "temperature": 0.5, "image-size": 32, "min-scale": 0.08}
OURS = {"batch-size": 64, "lr": 0.48, "temperature": 0.2, "image-size": 24, "min-scale": 0.2}
# contender -> settings, lengths in epochs, shortest first
CONTENDERS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "lightly": (THEIRS, [40, 80, 160, 320]),
    "lightly, our recipe": (OURS, [10, 20, 40, 80]),
    "ours": ({"prune.policy": "none"}, [10, 20, 40, 80]),
    "ours, small views first": ({"prune.policy": "none", "augment.size": SIZES}, [10, 20, 40, 80]),
    "ours, pruned": (
        {"prune.policy": "ucb", "prune.fraction": 0.5, "augment.size": SIZES},
        [20, 40, 80, 160],
    ),
}


def run_of(contender: str, epochs: int, seed: int, arguments: argparse.Namespace, folder: Path) -> float:
    """Train one encoder into `folder`/encoder; the seconds of training and scoring."""
    settings, images = CONTENDERS[contender][0], arguments.images
    if contender.startswith("lightly"):
        options = settings | {"width": arguments.width, "seed": seed, "epochs": epochs, "images": images}
        options |= {"data": arguments.data, "stored": 32, "device": arguments.device}
        words = [f"--{name}={value}" for name, value in options.items()]
        command = ["-m", "benchmarks.lightly_loop", *words, f"--encoder={folder / 'encoder'}"]
        return float(json.loads(common.run_python(command, arguments.quick).splitlines()[-1])["seconds"])
    overrides = SHARED | settings | {"epochs": epochs, "seed": seed, "data.max_images": images}
    overrides |= {"data.source": arguments.data, "model.width": arguments.width, "out": folder}
    overrides |= {"device": arguments.device}
    words = [f"{key}={value}" for key, value in overrides.items()]
    common.run_python(["pretrain.py", "--config", CONFIG, *words], arguments.quick)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return float(last["training_seconds"] + last["scoring_seconds"])


def knn_of(folder: Path, arguments: argparse.Namespace) -> float:
    """kNN accuracy in percent of `folder`/encoder on the test split."""
    words = [f"data.source={arguments.data}", f"data.max_images={arguments.images}", "data.image_size=32"]
    words += ["knn.num_neighbors=20", "knn.temperature=0.1", f"cache_dir={folder / 'cache'}"]
    command = ["evaluate.py", str(folder / "encoder"), "knn", *words, "--out", str(folder / "eval")]
    common.run_python(command, arguments.quick)
    rows = json.loads((folder / "eval" / "knn.json").read_text())
    return float(next(row["value"] for row in rows if row["metric"] == "top1 %"))


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def of_length(rows: list[dict[str, Any]], contender: str, epochs: int) -> list[dict[str, Any]]:
    return [row for row in rows if (row["contender"], row["epochs"]) == (contender, epochs)]


def to_run(rows: list[dict[str, Any]], seeds: int) -> Iterator[tuple[str, int, int]]:
    """(contender, epochs, seed) not run yet, contenders in turn, each until it is past the last target."""
    longest = max(len(lengths) for _, lengths in CONTENDERS.values())
    for number in range(longest):
        for seed in range(seeds):
            for contender, (_, lengths) in CONTENDERS.items():
                before = lengths[number - 1] if number else 0
                done = [row["knn"] for row in of_length(rows, contender, before)]
                if number >= len(lengths) or (done and statistics.mean(done) >= TARGETS[-1]):
                    continue
                known = [row["seed"] for row in of_length(rows, contender, lengths[number])]
                if seed not in known:
                    yield contender, lengths[number], seed


def minutes_to(rows: list[dict[str, Any]], contender: str, target: float) -> dict[int, float] | None:
    """Seed -> minutes of the shortest length whose mean reaches `target`; None where none does."""
    for epochs in CONTENDERS[contender][1]:
        found = of_length(rows, contender, epochs)
        if found and statistics.mean(row["knn"] for row in found) >= target:
            return {row["seed"]: row["seconds"] / 60 for row in found}
    return None


def show(rows: list[dict[str, Any]]) -> None:
    """Every length, then the minutes to each target and how many times as fast as lightly's loop that is."""
    table = Table(title="runs", box=SIMPLE, title_justify="left")
    for column in ("contender", "epochs", "kNN %", "minutes", "seeds"):
        table.add_column(column, no_wrap=True)
    for contender, (_, lengths) in CONTENDERS.items():
        for epochs in lengths:
            if found := of_length(rows, contender, epochs):
                accuracy = spread([row["knn"] for row in found])
                minutes = spread([row["seconds"] / 60 for row in found])
                table.add_row(contender, str(epochs), accuracy, minutes, str(len(found)))
    last = Table(title="time to quality", box=SIMPLE, title_justify="left")
    for column in ("kNN %", "contender", "minutes", "times as fast as lightly's loop"):
        last.add_column(column, no_wrap=True)
    for target in TARGETS:
        theirs = minutes_to(rows, "lightly", target)
        tried = [row["seconds"] / 60 for row in rows if row["contender"] == "lightly"]
        for contender in CONTENDERS:
            mine = minutes_to(rows, contender, target)
            times = ""
            if mine and theirs:
                ratios = [theirs[seed] / mine[seed] for seed in mine.keys() & theirs.keys()]
                times = f"{spread(ratios)} (goal {GOAL:g})" if ratios else ""
            elif mine and tried:
                times = f"more than {max(tried) / statistics.mean(mine.values()):.1f}: it did not get there"
            last.add_row(
                f"{target:g}", contender, spread(list(mine.values())) if mine else "not reached", times
            )
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    console.print(table)
    console.print(last)


def spread(values: list[float]) -> str:
    """`mean ± standard deviation`."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def main(argv: list[str] | None = None) -> None:
    options = common.parser("Minutes to a kNN accuracy against lightly's own loop.")
    options.add_argument("--data", required=True, help="CIFAR-10 as a folder of parquet files")
    options.add_argument("--width", type=int, default=8, help="of the ResNet-18")
    options.add_argument("--images", type=int, default=10_000, help="of the train split")
    options.add_argument("--until", metavar="HH:MM", help="start no run after this time of the day")
    arguments = common.parse(options, argv)
    out = Path(arguments.out) if arguments.out else common.RESULTS / "time_to_quality.jsonl"
    end = datetime.strptime(arguments.until, "%H:%M").time() if arguments.until else None
    while (todo := next(to_run(read(out), arguments.repeats), None)) is not None:
        if end and datetime.now().time() >= end:
            break
        contender, epochs, seed = todo
        with tempfile.TemporaryDirectory() as name:
            began, load = time.strftime("%H:%M"), os.getloadavg()[0]
            seconds = run_of(contender, epochs, seed, arguments, Path(name))
            row = {"contender": contender, "epochs": epochs, "seed": seed, "seconds": round(seconds, 1)}
            row |= {"knn": knn_of(Path(name), arguments), "began": began, "load_before": round(load, 1)}
        row |= {"width": arguments.width, "images": arguments.images}
        row["environment"] = common.environment(arguments.device)
        with open(out, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{contender}, {epochs} epochs, seed {seed}: {row['knn']:.1f} % in {seconds / 60:.1f} min",
            file=sys.stderr,
        )
    show(read(out))


if __name__ == "__main__":
    common.run(main)
