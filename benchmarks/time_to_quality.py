"""Minutes to a kNN accuracy: lightly's own loop against pretrain.py, unpruned and pruned, on the same images.

    python -m benchmarks.time_to_quality --data CIFAR10 [--until 18:30]
    python -m benchmarks.time_to_quality --data CIFAR10 --encoders [--jobs 3] [--device cuda]

`lightly` is `benchmarks.lightly_loop` with the recipe of lightly's CIFAR-10 benchmark (T = 0.5, rate 0.06 for
128 images, views of 32 px, crops from 8 % of the image, a cosine), `lightly, our recipe` the same loop with
the recipe of `ours`, of which only the pace is taken. Each is given runs of growing length, and takes the
time of the shortest one whose encoder, at the end of its cosine, reaches the accuracy in the mean over the
seeds: no accuracy is read in the middle of a run. kNN: k = 20, T = 0.1, the train images as bank, the whole
test split, at 32 px for all.

The time is that of training and scoring, without start, reading and evaluation; all of the machine's cores,
one run at a time, contenders in turn; medians over the seeds. Ours are whole runs. An epoch of lightly's loop
costs the same from the first to the last, and many are needed: its time is that of PACE epochs, in turn with
ours, times the epochs. So its encoders can be trained by the second command, several at a time and on any
device.

One line a run is appended to `--out` and is not run again, so the same commands go on where they stopped.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks import common
from ssl_emp.errors import UserError

CONFIG = "configs/cifar10_emp.yaml"
TARGETS = (45.0, 50.0)  # percent
GOAL = 5.0  # times as fast as lightly's loop
PACE = 3  # epochs that lightly's loop is timed for
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
    "precision": "bf16",
}
SIZES = "[[16, 0.6], [24, 1.0]]"  # small views first
THEIRS = {"batch-size": 256, "lr": 0.12, "temperature": 0.5, "image-size": 32, "min-scale": 0.08}
OURS = {"batch-size": 64, "lr": 0.48, "temperature": 0.2, "image-size": 24, "min-scale": 0.2}
# contender -> settings, lengths in epochs, shortest first
CONTENDERS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "lightly": (THEIRS, [20, 40, 80, 160, 320]),
    "lightly, our recipe": (OURS, []),
    "ours": ({"prune.policy": "none"}, [16, 28, 56]),
    "ours, small views first": ({"prune.policy": "none", "augment.size": SIZES}, [16, 32, 60]),
    "ours, pruned": ({"prune.policy": "ucb", "prune.fraction": 0.5, "augment.size": SIZES}, [24, 48, 80]),
}


def run_of(contender: str, epochs: int, seed: int, arguments: argparse.Namespace, folder: Path) -> float:
    """Train one encoder into `folder`/encoder; the seconds of training and scoring."""
    settings, images = CONTENDERS[contender][0], arguments.images
    if theirs(contender):
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


def theirs(contender: str) -> bool:
    """Whether it is lightly's loop, of which pace and encoders are measured apart."""
    return contender.startswith("lightly")


def of_length(rows: list[dict[str, Any]], contender: str, epochs: int) -> list[dict[str, Any]]:
    """The encoders of a contender at a length."""
    return [row for row in rows if (row["contender"], row["epochs"]) == (contender, epochs) and "knn" in row]


def paces(rows: list[dict[str, Any]], contender: str) -> list[float]:
    """Seconds an epoch, of every timed run of a contender."""
    return [
        row["seconds"] / row["epochs"] for row in rows if row["contender"] == contender and "seconds" in row
    ]


def to_run(rows: list[dict[str, Any]], seeds: int, encoders: bool) -> Iterator[tuple[str, int, int]]:
    """(contender, epochs, seed) not run yet, contenders in turn, each until it is past the last target.

    encoders: those of lightly's loop; otherwise its pace and all of ours.
    """
    longest = max(len(lengths) for _, lengths in CONTENDERS.values())
    for number in range(longest):
        for seed in range(seeds):
            for contender, (_, lengths) in CONTENDERS.items():
                if theirs(contender) and not encoders:
                    if number == 0 and len(paces(rows, contender)) <= seed:
                        yield contender, PACE, seed
                    continue
                if number >= len(lengths) or encoders != theirs(contender):
                    continue
                done = (
                    [row["knn"] for row in of_length(rows, contender, lengths[number - 1])] if number else []
                )
                if done and statistics.mean(done) >= TARGETS[-1]:
                    continue
                if seed not in [row["seed"] for row in of_length(rows, contender, lengths[number])]:
                    yield contender, lengths[number], seed


def minutes_of(rows: list[dict[str, Any]], contender: str, epochs: int) -> list[float]:
    """Minutes of each run of that length: measured, or for lightly's loop by its pace."""
    if theirs(contender):
        return [pace * epochs / 60 for pace in paces(rows, contender)]
    return [row["seconds"] / 60 for row in of_length(rows, contender, epochs)]


def lengths_to(rows: list[dict[str, Any]], contender: str, target: float) -> tuple[int | None, int | None]:
    """The longest length before which `target` is not reached in the mean, and the shortest that reaches it;
    None where there is none.
    """
    missed = None
    for epochs in CONTENDERS[contender][1]:
        if found := of_length(rows, contender, epochs):
            if statistics.mean(row["knn"] for row in found) >= target:
                return missed, epochs
            missed = epochs
    return missed, None


def show(rows: list[dict[str, Any]]) -> None:
    """Every length, then the minutes to each target and how many times as fast as lightly's loop that is."""
    table = Table(title="runs", box=SIMPLE, title_justify="left")
    for column in ("contender", "epochs", "kNN %", "minutes", "seconds an epoch", "seeds"):
        table.add_column(column, no_wrap=True)
    for contender, (_, lengths) in CONTENDERS.items():
        if not lengths:
            table.add_row(contender, "", "", "", median(paces(rows, contender)), "")
        for epochs in lengths:
            if found := of_length(rows, contender, epochs):
                minutes = minutes_of(rows, contender, epochs)
                pace = median([60 * took / epochs for took in minutes])
                accuracy = spread([row["knn"] for row in found])
                table.add_row(contender, str(epochs), accuracy, median(minutes), pace, str(len(found)))
    last = Table(title=f"time to quality (goal: {GOAL:g} times as fast)", box=SIMPLE, title_justify="left")
    for column in ("kNN %", "contender", "minutes", "times as fast as lightly's loop"):
        last.add_column(column, no_wrap=True)
    for target in TARGETS:
        missed, reached = (
            statistics.median(minutes_of(rows, "lightly", epochs) or [0.0]) if epochs else None
            for epochs in lengths_to(rows, "lightly", target)
        )
        for contender in (name for name, (_, lengths) in CONTENDERS.items() if lengths):
            enough = lengths_to(rows, contender, target)[1]
            minutes = minutes_of(rows, contender, enough) if enough else []
            times = ""
            if minutes and not theirs(contender):
                mine = statistics.median(minutes)
                times = f"{reached / mine:.1f}" if reached else ""
                if missed:  # the length that is just enough lies between
                    times += (
                        f", at least {missed / mine:.1f}" if reached else f"more than {missed / mine:.1f}"
                    )
            last.add_row(f"{target:g}", contender, median(minutes) if minutes else "not reached", times)
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    console.print(table)
    console.print(last)


def spread(values: list[float]) -> str:
    """`mean ± standard deviation`."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def median(values: list[float]) -> str:
    """`median (lowest to highest)`; empty where there is none."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else ""


def measure(cell: tuple[str, int, int], arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of one run: its seconds, its accuracy, or for ours both."""
    contender, epochs, seed = cell
    row: dict[str, Any] = {"contender": contender, "epochs": epochs, "seed": seed}
    row |= {"began": time.strftime("%H:%M"), "load_before": round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as name:
        seconds = run_of(contender, epochs, seed, arguments, Path(name))
        if not arguments.encoders:
            row["seconds"] = round(seconds, 1)
        if arguments.encoders or not theirs(contender):
            row["knn"] = knn_of(Path(name), arguments)
    row |= {"width": arguments.width, "images": arguments.images}
    return row | {"environment": common.environment(arguments.device)}


def main(argv: list[str] | None = None) -> None:
    options = common.parser("Minutes to a kNN accuracy against lightly's own loop.")
    options.add_argument("--data", required=True, help="CIFAR-10 as a folder of parquet files")
    options.add_argument("--width", type=int, default=8, help="of the ResNet-18")
    options.add_argument("--images", type=int, default=10_000, help="of the train split")
    options.add_argument("--until", metavar="HH:MM", help="start no run after this time of the day")
    options.add_argument("--encoders", action="store_true", help="train those of lightly's loop, untimed")
    options.add_argument("--jobs", type=int, default=1, help="with --encoders: so many at once")
    arguments = common.parse(options, argv)
    if arguments.jobs < 1 or (arguments.jobs > 1 and not arguments.encoders):
        raise UserError(
            f"--jobs is {arguments.jobs}", "give 1, or more with --encoders: timed runs are alone"
        )
    out = Path(arguments.out) if arguments.out else common.RESULTS / "time_to_quality.jsonl"
    end = datetime.strptime(arguments.until, "%H:%M").time() if arguments.until else None
    with ThreadPoolExecutor(arguments.jobs) as pool:
        while not (end and datetime.now().time() >= end):
            todo = list(to_run(read(out), arguments.repeats, arguments.encoders))
            # a longer run starts when the shorter ones are known
            batch = [cell for cell in todo if cell[:2] == todo[0][:2]][: arguments.jobs]
            if not batch:
                break
            for row in pool.map(partial(measure, arguments=arguments), batch):
                with open(out, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    row["contender"],
                    row["epochs"],
                    row["seed"],
                    row.get("knn"),
                    row.get("seconds"),
                    file=sys.stderr,
                )
    show(read(out))


if __name__ == "__main__":
    common.run(main)
