"""Training in images a second: pretrain.py without pruning against lightly's own SimCLR loop.

    python -m benchmarks.training --data FOLDER

`L` and `L+` are `benchmarks.lightly_loop` without and with `--plus`; `ours` is pretrain.py with
configs/cifar10_emp.yaml and `prune.policy=none`, fp32 on the CPU, `ours_eager` the same without
torch.compile, `ours_bf16` with `precision=bf16` on a CPU that computes in it (no goal: it is another
precision). Each contender is a process of its own on all cores, in turn. Start, reading and compilation are
in none of the figures: lightly's loop has steps of warm-up, and of pretrain.py's two epochs the second
counts.
"""

import json
from functools import partial
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Ratio

CONFIG = "configs/cifar10_emp.yaml"
# width -> timed steps, steps of warm-up, goals of ours against L and L+
CASES = {16: (8, 2, 1.6, 1.15), 64: (2, 1, 1.3, 1.02)}


def theirs(
    data: str, width: int, batch_size: int, steps: int, warmup_steps: int, plus: bool, arguments: Any
) -> float:
    """Images a second of lightly's loop."""
    sizes = {"width": width, "batch-size": batch_size, "steps": steps, "warmup-steps": warmup_steps}
    options = [
        "--data",
        data,
        "--device",
        str(arguments.device),
        *(f"--{name}={value}" for name, value in sizes.items()),
    ]
    printed = common.run_python(
        ["-m", "benchmarks.lightly_loop", *options, *(["--plus"] if plus else [])], arguments.quick
    )
    return float(json.loads(printed.splitlines()[-1])["images_per_second"])


def ours(
    data: str, width: int, batch_size: int, steps: int, compiled: bool, precision: str, arguments: Any
) -> float:
    """Images a second of pretrain.py's second epoch."""
    overrides = {
        "data.source": data,
        "data.max_images": steps * batch_size,
        "data.labels": "none",
        "batch_size": batch_size,
        "model.width": width,
        "augment.size": 32,
        "epochs": 2,
        "precision": precision,
        "compile": str(compiled).lower(),
        "prune.policy": "none",
        "monitor.knn_every": 0,
        "monitor.tensorboard": "false",
        "checkpoint.every_minutes": 1000,
    }
    first, second = common.run_pretrain(
        CONFIG, [f"{key}={value}" for key, value in overrides.items()], arguments
    )
    images = second["samples_seen"] - first["samples_seen"]
    return images / (second["training_seconds"] - first["training_seconds"])


def measure(width: int, arguments: Any) -> dict[str, Any]:
    """One width: its summary and the steps behind a figure."""
    steps, warmup_steps, over_l, over_plus = CASES.get(width, (8, 2, None, None))
    if arguments.device.type == "cuda":
        steps, warmup_steps = 150, 10
    steps = arguments.steps or (2 if arguments.quick else steps)
    batch_size = 8 if arguments.quick else arguments.batch_size
    shared = (arguments.data, width, batch_size, steps)
    precision = "fp32" if arguments.device.type == "cpu" else "auto"
    contenders = {
        "L": partial(theirs, *shared, warmup_steps, False, arguments),
        "L+": partial(theirs, *shared, warmup_steps, True, arguments),
        "ours": partial(ours, *shared, True, precision, arguments),
    }
    if width == 16:
        contenders["ours_eager"] = partial(ours, *shared, False, precision, arguments)
        if arguments.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
            contenders["ours_bf16"] = partial(ours, *shared, True, "bf16", arguments)
    ratios = [
        Ratio("ours", "L", goal=over_l),
        Ratio("ours", "L+", goal=over_plus),
        Ratio("ours_eager", "L"),
        Ratio("ours", "ours_eager"),
        Ratio("ours_bf16", "ours"),
    ]
    figures = common.interleave(contenders, arguments.repeats)
    return {**common.summary(figures, ratios, "images/s"), "batch_size": batch_size, "timed_steps": steps}


def main(argv: list[str] | None = None) -> None:
    options = common.parser("Training speed against lightly's own loop.")
    options.add_argument(
        "--data", required=True, help="CIFAR-10 as a folder of parquet files, or any other data.source"
    )
    options.add_argument(
        "--widths", type=int, nargs="+", help="of the ResNet-18 (default: 16 64; 16 with --quick)"
    )
    options.add_argument("--batch-size", type=int, default=256)
    options.add_argument(
        "--steps", type=int, help="timed (default: 8 at width 16, 2 at width 64; 150 on a GPU)"
    )
    arguments = common.parse(options, argv)
    widths = arguments.widths or ([16] if arguments.quick else list(CASES))
    cases = {f"width {width}": measure(width, arguments) for width in widths}
    common.write("training", {"cases": cases}, arguments)


if __name__ == "__main__":
    common.run(main)
