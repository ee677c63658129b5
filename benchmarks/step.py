"""Where a training step's time goes, beside the roofline of the machine, and what keeping freed memory saves.

    python -m benchmarks.step                                                  # configs/demo.yaml
    python -m benchmarks.step --config configs/cifar10_emp.yaml --name step_cifar10 data.source=FOLDER
    batch_size=256 model.width=16 augment.size=32

Every stage of the loop of pretrain.py is timed by itself over 20 steps of its own job, the median a stage (on
a GPU with a wait after each, which the real loop does not have). Operations are those of convolutions and
matrix products, forward and backward, as torch counts them; bytes are what the backward pass keeps, written
once and read twice, and the weights with gradient and momentum. The floor is the larger of operations / peak
and bytes / bandwidth, both measured here: a product of two 4,096² matrices in the precision of the run, and a
copy of 512 MiB. Each round is a process of its own, with and without `ssl_emp.device.keep_freed_memory`.

    git worktree add /elsewhere REVISION
    python -m benchmarks.step --before /elsewhere --repeats 5

times whole steps of two revisions instead, in turn: `pretrain.py` of the checkout given and of this one, with
the same config and overrides, the training seconds of a step after the first epoch, the median of the rounds.
The ratio is before / now: above 1 this revision is faster.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.common import Ratio
from ssl_emp.commands.job import prepare
from ssl_emp.commands.pretrain import compiled, forward, through
from ssl_emp.config import load_config
from ssl_emp.errors import UserError
from ssl_emp.optim import build_optimizer
from ssl_emp.run.guard import Guard
from ssl_emp.run.report import Report

# `loss` is the rest of the forward pass: the draw of the augmentation, the loss and the memory term
STAGES = ("gather", "views", "forward", "loss", "scores", "backward", "optimizer")
WARM_UP = 3  # steps
BEFORE_EPOCHS = 4  # of a run that is compared: the first warms up
BEFORE_GOAL = 0.98


def profile(config: str, overrides: list[str], steps: int, keeps: bool) -> dict[str, Any]:
    """Seconds of each stage of a step, its operations and bytes, and what this machine can do at most."""
    job = prepare(load_config(config, [*overrides, f"keep_freed_memory={str(keeps).lower()}"]), Report())
    settings, pruner = job.config.optimizer, job.pruner
    optimizer = build_optimizer(
        job.model, settings.name, job.schedule.peak_lr, settings.momentum, settings.weight_decay
    )
    guard = Guard(job.model, optimizer, 10, torch.zeros((), dtype=torch.int64, device=job.device), None)
    job.model.train()
    network, views_of = (Timed(part) for part in compiled(job, Report()))
    read = Timed(lambda rows: next(iter(job.store.stream(rows))))
    whole_forward = Timed(forward)
    backward = Timed(lambda index, loss: pruner.weighted(index, loss).backward())
    gather, update, observe = Timed(pruner.gather), Timed(guard.step), Timed(pruner.observe)
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    while len(times["gather"]) < WARM_UP + steps:
        epoch = pruner.epoch_of(pruner.step)
        batches, number = pruner.batches(epoch), pruner.step - pruner.first_step(epoch)
        if number == 0:
            guard.norms = None  # epochs differ in length
        index, images = read(batches[number : number + 1])
        loss, _, memory, draw = whole_forward(job, network, views_of, index, images, epoch, job.recipe)
        optimizer.zero_grad(set_to_none=True)
        backward(index, loss)
        seen = gather(index, loss, memory, draw)
        observe(seen, update(seen.terms, number, batches))
        rest = whole_forward.seconds - views_of.seconds - network.seconds
        scores = gather.seconds + observe.seconds
        figures = (read.seconds, views_of.seconds, network.seconds, rest, scores, backward.seconds)
        for stage, value in zip(STAGES, (*figures, update.seconds), strict=True):
            times[stage].append(value)

    views = network.given
    with FlopCounterMode(display=False) as flops:
        through(job, job.model, views)[1].sum().backward()
    kept, noted = 0, set()

    def note(tensor: Tensor) -> Tensor:
        nonlocal kept
        if tensor.data_ptr() not in noted:
            noted.add(tensor.data_ptr())
            kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive = through(job, job.model, views)
    del alive
    weights = sum(parameter.nbytes for parameter in job.model.parameters())
    medians = {stage: statistics.median(values[WARM_UP:]) for stage, values in times.items()}
    moved = 3 * kept + 6 * weights
    peak, bandwidth = machine_limits(job.device, torch.bfloat16 if job.bf16 else torch.float32)
    operations = flops.get_total_flops()
    return {
        "stages": medians,
        "step": sum(medians.values()),
        "operations": operations,
        "bytes": moved,
        "peak_operations_per_second": peak,
        "peak_bytes_per_second": bandwidth,
        "floor": max(operations / peak, moved / bandwidth),
    }


class Timed:
    """A function that notes the seconds of its last call, and its first argument."""

    def __init__(self, function: Any) -> None:
        self.function, self.seconds = function, 0.0
        self.given: Any = None

    def __call__(self, *arguments: Any) -> Any:
        self.given, result = arguments[0], []
        self.seconds = common.seconds(lambda: result.append(self.function(*arguments)))
        return result[0]


def machine_limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(operations a second of a large matrix product, bytes a second of a large copy), the best of five."""
    side = 4096
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = [
        min(common.seconds(work) for _ in range(5)) for work in (lambda: a @ b, lambda: target.copy_(source))
    ]
    return 2 * side**3 / best[0], 2 * source.nbytes / best[1]


def step_seconds(root: Path, arguments: Any) -> float:
    """Training seconds of a step of `pretrain.py` in a checkout, after its first epoch."""
    overrides = [f"epochs={BEFORE_EPOCHS}", "monitor.knn_every=0", "monitor.reliability_every=0"]
    overrides += ["monitor.tensorboard=false", "checkpoint.every_minutes=1000", *arguments.overrides]
    rows = common.run_pretrain(arguments.config, overrides, arguments, root)
    return float(
        (rows[-1]["training_seconds"] - rows[0]["training_seconds"]) / (rows[-1]["step"] - rows[0]["step"])
    )


def two_revisions(arguments: Any) -> dict[str, Any]:
    """The case of two checkouts in turn."""
    before = Path(arguments.before).resolve()
    if not (before / "pretrain.py").is_file():
        raise UserError(f"--before {arguments.before} is no checkout", "give a folder with a pretrain.py")
    roots = {"before": before, "now": common.ROOT}
    contenders = {name: partial(step_seconds, root, arguments) for name, root in roots.items()}
    figures = common.interleave(contenders, arguments.repeats)
    ratio = Ratio("before", "now", goal=BEFORE_GOAL)
    return {**common.summary(figures, [ratio], "seconds"), "revision_before": common.revision(before)}


def main(argv: list[str] | None = None) -> None:
    options = common.parser("Profile of a training step beside the roofline.")
    options.add_argument("--config", default="configs/demo.yaml")
    options.add_argument("--name", default="step", help="of the result file")
    options.add_argument("--before", metavar="FOLDER", help="a checkout of another revision to compare with")
    options.add_argument("--child", choices=["kept", "returned"], help=argparse.SUPPRESS)
    options.add_argument("overrides", nargs="*", metavar="key=value", help="as for pretrain.py")
    arguments = common.parse(options, argv)
    steps = 2 if arguments.quick else 20
    if arguments.child:
        overrides = [*arguments.overrides, f"device={arguments.device}"]
        return print(json.dumps(profile(arguments.config, overrides, steps, arguments.child == "kept")))
    payload: dict[str, Any] = {
        "config": arguments.config,
        "overrides": [o for o in arguments.overrides if not o.startswith("data.")],
    }
    if arguments.before:
        name = "step_before" if arguments.name == "step" else arguments.name
        return common.write(name, payload | {"cases": {"step": two_revisions(arguments)}}, arguments)
    profiles: dict[str, list[dict[str, Any]]] = {"kept": [], "returned": []}

    def child(name: str) -> float:
        chosen = ["--config", arguments.config, "--child", name, *(["--quick"] if arguments.quick else [])]
        command = ["-m", "benchmarks.step", *chosen, "--device", str(arguments.device), *arguments.overrides]
        profiles[name].append(json.loads(common.run_python(command).splitlines()[-1]))
        return float(profiles[name][-1]["step"])

    figures = common.interleave({name: partial(child, name) for name in profiles}, arguments.repeats)
    result = common.summary(figures, [Ratio("returned", "kept")], "seconds")
    rows = profiles["kept"]
    stages = {stage: [row["stages"][stage] for row in rows] for stage in STAGES}
    stages |= {"floor": [row["floor"] for row in rows], "step": figures["kept"]}
    ratios = [Ratio(stage, "step") for stage in (*STAGES, "floor")]
    cases = {"step": result, "stages": common.summary(stages, ratios, "seconds")}
    roofline = {
        key: statistics.median(row[key] for row in rows) for key in rows[0] if key not in ("stages", "step")
    }
    print({key: f"{value:.3g}" for key, value in roofline.items()})
    common.write(arguments.name, payload | {"cases": cases, "roofline": roofline}, arguments)


if __name__ == "__main__":
    common.run(main)
