"""Main memory of training: the peak of pretrain.py on 50,000 images over that of a process which only imports
what it uses.

    python -m benchmarks.memory --data FOLDER

The peaks are the kernel's (`ru_maxrss`), of one process each: helpers that the compiler starts are not in the
sum. The importing process also compiles a function of one line, because torch.compile brings in its compiler
only then, and it leaves by os._exit: an orderly end takes up to 170 MB more for a moment, while that of a
training process stays below its peak. That one reports progress a minute into its first epoch (or at the end
of it); it is then stopped by SIGTERM, so it has also written a checkpoint, and it says after how many steps
that was.

Parts: `pixels` and `a sample` (its score state, 36 bytes) grow with the images; `weights` are the
parameters three times (gradient, momentum); `views` are a step's two; `activations` is what eager autograd
keeps of a step for the backward pass. The rest of the difference is compiled code, workspaces, and what the
allocator holds back.
"""

import json
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Ratio
from ssl_emp.model import SimCLR, build_encoder

CONFIG = "configs/cifar10_emp.yaml"
CASES = {"width 16, batch 256": (16, 256), "width 8, batch 128": (8, 128)}
IMAGES, SIZE = 50_000, 32
GOAL_MB = 600
IMPORTS = """
import os, pretrain, pyarrow.parquet, torch, torch.utils.tensorboard
from lightly.models.modules.heads import SimCLRProjectionHead
torch.compile(lambda x: x + 1)(torch.zeros(8))
os._exit(0)
"""


def peak_megabytes(command: list[str], quick: bool, stop_at: str = "") -> tuple[float, str]:
    """(Peak resident MB of a process, its output), see `benchmarks/peak.py`. Raises UserError where it ends
    otherwise than expected.
    """
    result = json.loads(common.run_python(["benchmarks/peak.py", stop_at, *command], quick))
    return result["peak_megabytes"], result["output"]


def imports_peak(arguments: Any) -> float:
    """MB of the process that only imports."""
    return peak_megabytes([sys.executable, "-c", IMPORTS], arguments.quick)[0]


def training_peak(
    width: int, batch_size: int, images: int, keeps: bool, steps: list[int], arguments: Any
) -> float:
    """MB of pretrain.py, with or without `keep_freed_memory`; appends the steps that it made."""
    overrides = [
        f"data.source={arguments.data}",
        f"data.max_images={images}",
        f"model.width={width}",
        f"batch_size={batch_size}",
        f"augment.size={SIZE}",
    ]
    overrides += [f"keep_freed_memory={str(keeps).lower()}"]
    # written at the end of an epoch, which slow machines do not reach
    overrides += ["monitor.knn_every=0"]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "pretrain.py",
            "--config",
            CONFIG,
            *overrides,
            f"device={arguments.device}",
            f"out={folder}/run",
        ]
        peak, output = peak_megabytes(command, arguments.quick, stop_at="epoch 1/")
    steps += [int(number) for number in re.findall(r"after step (\d+), saved", output)]
    return peak


def activation_megabytes(width: int, batch_size: int) -> float:
    """MB of the distinct storages that a step's eager forward pass keeps for its backward pass, the weights
    not counted.
    """
    encoder = build_encoder("resnet18", width, "cifar", SIZE, [0.0] * 3, [1.0] * 3)
    model = SimCLR(encoder, encoder.feature_dim, 128)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # keeps the storages, whose addresses would otherwise be used again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    unpack: Callable[[Any], Any] = lambda tensor: tensor  # noqa: E731 - the identity
    with torch.autograd.graph.saved_tensors_hooks(note, unpack):
        model(torch.rand(2 * batch_size, 3, SIZE, SIZE).to(memory_format=torch.channels_last))
    return sum(kept.values()) / 1e6


def parts(width: int, batch_size: int, images: int) -> dict[str, float]:
    """MB that can be counted without running anything."""
    encoder = build_encoder("resnet18", width, "cifar", SIZE, [0.0] * 3, [1.0] * 3)
    weights = sum(parameter.numel() for parameter in SimCLR(encoder, encoder.feature_dim, 128).parameters())
    pixels = 3 * SIZE * SIZE
    return {
        "pixels": images * pixels / 1e6,
        "a sample": images * 36 / 1e6,
        "weights": 3 * 4 * weights / 1e6,
        "views": 2 * batch_size * pixels * 4 / 1e6,
        "activations": activation_megabytes(width, batch_size),
    }


def measure(width: int, batch_size: int, images: int, arguments: Any) -> dict[str, Any]:
    """One case: peaks, difference, steps made, parts."""
    steps: list[int] = []
    contenders = {
        "imports": partial(imports_peak, arguments),
        "training": partial(training_peak, width, batch_size, images, True, steps, arguments),
        "training, keep_freed_memory=false": partial(
            training_peak, width, batch_size, images, False, steps, arguments
        ),
    }
    figures = common.interleave(contenders, arguments.repeats)
    for name in ("training", "training, keep_freed_memory=false"):
        figures[name.replace("training", "difference")] = [
            a - b for a, b in zip(figures[name], figures["imports"], strict=True)
        ]
    counted = parts(width, batch_size, images)
    goals = [
        Ratio(name, goal=GOAL_MB, at_most=True, name=name.replace("difference", "difference in MB"))
        for name in ("difference", "difference, keep_freed_memory=false")
    ]
    for name, value in counted.items():
        print(f"{name}  {value:.1f} MB", file=sys.stderr)
    return {**common.summary(figures, goals, "MB"), "parts_megabytes": counted, "steps_until_stopped": steps}


def main(argv: list[str] | None = None) -> None:
    options = common.parser("Peak memory of training over that of importing.")
    options.add_argument(
        "--data", required=True, help="CIFAR-10 as a folder of parquet files, or any other data.source"
    )
    arguments = common.parse(options, argv)
    if not Path("/proc").exists():
        print("not Linux: the peaks may be counted differently", file=sys.stderr)
    tiny = {"tiny": (8, 8)}
    images = 16 if arguments.quick else IMAGES
    cases = {
        name: measure(*sizes, images, arguments)
        for name, sizes in (tiny if arguments.quick else CASES).items()
    }
    common.write("memory", {"cases": cases}, arguments)


if __name__ == "__main__":
    common.run(main)
