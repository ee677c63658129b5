"""Where a training step's time goes, beside the roofline of the machine, and what keeping freed memory saves.

    python -m benchmarks.step                                                  # configs/demo.yaml
    python -m benchmarks.step --config configs/cifar10_emp.yaml --name step_cifar10 data.source=FOLDER
    batch_size=256 model.width=16

Every stage of the loop of pretrain.py is timed by itself over 20 steps of its own job, the median a stage (on
a GPU with a wait after each, which the real loop does not have). Operations are those of convolutions and
matrix products, forward and backward, as torch counts them; bytes are what the backward pass keeps, written
once and read twice, and the weights with gradient and momentum. The floor is the larger of operations / peak
and bytes / bandwidth, both measured here: a product of two 4,096² matrices in the precision of the run, and a
copy of 512 MiB. Each round is a process of its own, with and without `ssl_emp.device.keep_freed_memory`.
"""

import argparse
import json
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.common import Ratio
from ssl_emp.augment import draw_params
from ssl_emp.commands.job import prepare
from ssl_emp.commands.pretrain import compiled, through
from ssl_emp.config import load_config
from ssl_emp.loss import nt_xent
from ssl_emp.optim import build_optimizer
from ssl_emp.prune import closeness
from ssl_emp.prune.plan import shuffled_batches
from ssl_emp.prune.record import Record
from ssl_emp.run.report import Report

STAGES = ("gather", "views", "forward", "loss", "scores", "backward", "optimizer")


def profile(config: str, overrides: list[str], steps: int, keeps: bool) -> dict[str, Any]:
    """Seconds of each stage of a step, its operations and bytes, and what this machine can do at most."""
    job = prepare(load_config(config, [*overrides, f"keep_freed_memory={str(keeps).lower()}"]), Report())
    settings = job.config
    model, views_of = compiled(job, Report())
    optimizer = build_optimizer(
        job.model,
        settings.optimizer.name,
        settings.optimizer.lr,
        settings.optimizer.momentum,
        settings.optimizer.weight_decay,
    )
    policy = job.pruner.policy
    record = Record(job.num_samples, getattr(policy, "ema", 1.0), 0, False, job.device)
    normalized = getattr(policy, "memory", "raw") == "normalized"
    job.model.train()
    batches = shuffled_batches(torch.arange(job.num_samples, device=job.device), settings.batch_size, 0, 0)
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    state: dict[str, Any] = {}

    def gather(index: Tensor) -> None:
        state["index"], state["images"] = next(iter(job.store.stream(index.unsqueeze(0))))

    def views(index: Tensor) -> None:
        params = draw_params(settings.seed, 0, state["index"], job.recipe, state["images"].shape[-1])
        state["views"] = views_of(state["images"], params, job.recipe)

    def forward(index: Tensor) -> None:
        state["out"] = through(job, model, torch.cat(state["views"]))

    def loss(index: Tensor) -> None:
        z_a, z_b = state["out"][1].chunk(2)
        state["loss"] = nt_xent(z_a, z_b, settings.temperature)

    def scores(index: Tensor) -> None:
        h_a, h_b = state["out"][0].chunk(2)
        memory = closeness(h_a, h_b, normalized=normalized)
        record.observe(state["index"], torch.stack([state["loss"].detach(), memory]), None, 0)
        record.count_trained(state["index"], 0)

    def backward(index: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        state["loss"].mean().backward()

    def update(index: Tensor) -> None:
        optimizer.step()

    work = dict(zip(STAGES, (gather, views, forward, loss, scores, backward, update), strict=True))
    warm_up = 3
    for number in range(warm_up + steps):
        for stage, function in work.items():
            took = common.seconds(partial(function, batches[number % len(batches)]))
            if number >= warm_up:
                times[stage].append(took)

    with FlopCounterMode(display=False) as flops:
        through(job, job.model, torch.cat(state["views"]))[1].chunk(2)[1].sum().backward()
    kept, seen = 0, set()

    def note(tensor: Tensor) -> Tensor:
        nonlocal kept
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive = through(job, job.model, torch.cat(state["views"]))
    del alive
    weights = sum(parameter.nbytes for parameter in job.model.parameters())
    medians = {stage: statistics.median(values) for stage, values in times.items()}
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


def main(argv: list[str] | None = None) -> None:
    options = common.parser("Profile of a training step beside the roofline.")
    options.add_argument("--config", default="configs/demo.yaml")
    options.add_argument("--name", default="step", help="of the result file")
    options.add_argument("--child", choices=["kept", "returned"], help=argparse.SUPPRESS)
    options.add_argument("overrides", nargs="*", metavar="key=value", help="as for pretrain.py")
    arguments = common.parse(options, argv)
    steps = 2 if arguments.quick else 20
    if arguments.child:
        overrides = [*arguments.overrides, f"device={arguments.device}"]
        return print(json.dumps(profile(arguments.config, overrides, steps, arguments.child == "kept")))
    profiles: dict[str, list[dict[str, Any]]] = {"kept": [], "returned": []}

    def child(name: str) -> float:
        chosen = ["--config", arguments.config, "--child", name, *(["--quick"] if arguments.quick else [])]
        command = ["-m", "benchmarks.step", *chosen, "--device", str(arguments.device), *arguments.overrides]
        profiles[name].append(json.loads(common.run_python(command).splitlines()[-1]))
        return float(profiles[name][-1]["step"])

    figures = common.interleave({name: partial(child, name) for name in profiles}, arguments.repeats)
    result = common.summary(figures, [Ratio("returned", "kept")], "seconds")
    rows = profiles["kept"]
    stages = {stage: [row["stages"][stage] for row in rows] for stage in STAGES} | {
        "floor": [row["floor"] for row in rows]
    }
    stages["step"] = figures["kept"]
    cases = {
        "step": result,
        "stages": common.summary(stages, [Ratio(stage, "step") for stage in (*STAGES, "floor")], "seconds"),
    }
    roofline = {
        key: statistics.median(row[key] for row in rows) for key in rows[0] if key not in ("stages", "step")
    }
    print({key: f"{value:.3g}" for key, value in roofline.items()})
    payload = {
        "config": arguments.config,
        "overrides": [o for o in arguments.overrides if not o.startswith("data.")],
    }
    common.write(arguments.name, {**payload, "cases": cases, "roofline": roofline}, arguments)


if __name__ == "__main__":
    common.run(main)
