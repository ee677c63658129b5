"""What pruning saves in seconds, against what the arithmetic promises, and what keeping the scores costs.

    python -m benchmarks.pruning --data FOLDER

Whole runs of pretrain.py in turn, unpruned and with s = 0.3, 0.5, 0.7, a = 0.125, `scoring: stale`. The
promise for a long run is 1 / (1 - s (1 - a)); a run of 80 epochs cannot quite reach it, because its first
epoch is a full one (0.978 of it at s = 0.7), so the share of the steps that the plan counts stands beside it.
Then, piece by piece, what pruning adds to a step: the memory term and what `Pruner` notes in each, and the
selection and the shuffle once an epoch, spread over the steps of an epoch with s = 0.7, the fewest.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Ratio
from ssl_emp.augment import Recipe, cut_views, draw_params
from ssl_emp.loss import nt_xent
from ssl_emp.model import SimCLR, build_encoder
from ssl_emp.optim import build_optimizer
from ssl_emp.prune import Pruner, closeness
from ssl_emp.prune.plan import PrunePlan, shuffled_batches

CONFIG = "configs/cifar10_emp.yaml"
FRACTIONS = (0.3, 0.5, 0.7)
ANNEAL = 0.125
SHARE_GOAL = 0.005  # of a step


def run_seconds(fraction: float, sizes: dict[str, Any], arguments: Any) -> float:
    """Seconds of training and scoring of a whole run."""
    overrides = sizes | {
        "data.source": arguments.data,
        "data.labels": "none",
        "compile": "false",
        "monitor.knn_every": 0,
        "monitor.tensorboard": "false",
        "checkpoint.every_minutes": 1000,
    }
    if fraction:
        overrides |= {"prune.policy": "emp", "prune.fraction": fraction, "prune.anneal_fraction": ANNEAL}
    else:
        overrides["prune.policy"] = "none"
    last = common.run_pretrain(CONFIG, [f"{key}={value}" for key, value in overrides.items()], arguments)[-1]
    return float(last["training_seconds"] + last["scoring_seconds"])


def whole_runs(arguments: Any) -> dict[str, Any]:
    """Speed-up of whole runs. The number of images is a multiple of ten batches: a kept count is then whole
    batches too.
    """
    batch_size, epochs = (8, 8) if arguments.quick else (128, 80)
    images = 10 * batch_size
    sizes = {
        "batch_size": batch_size,
        "data.max_images": images,
        "epochs": epochs,
        "model.width": 8,
        "augment.size": 24,
    }
    contenders = {"none": partial(run_seconds, 0.0, sizes, arguments)}
    contenders |= {
        f"s={fraction}": partial(run_seconds, fraction, sizes, arguments) for fraction in FRACTIONS
    }
    ratios = []
    unpruned = sum(PrunePlan(epochs, 0.0).epoch_steps(images, batch_size))
    for fraction in FRACTIONS:
        name, limit = f"s={fraction}", 1 / (1 - fraction * (1 - ANNEAL))
        exact = unpruned / sum(PrunePlan(epochs, fraction, 1, ANNEAL).epoch_steps(images, batch_size))
        ratios += [
            Ratio("none", name, name=f"speed-up, {name}"),
            Ratio("none", name, per=limit, goal=0.97, name=f"speed-up / {limit:.3f} (limit), {name}"),
            Ratio("none", name, per=exact, name=f"speed-up / {exact:.3f} (steps), {name}"),
        ]
    return {**common.summary(common.interleave(contenders, arguments.repeats), ratios, "seconds"), **sizes}


def added_cost(
    width: int, size: int, batch_size: int, num_samples: int, compiled: bool, arguments: Any
) -> dict[str, Any]:
    """Seconds of a step of training, and of what pruning adds to it, at most."""
    device, seed = arguments.device, 0
    recipe = Recipe(size)
    encoder = build_encoder("resnet18", width, "cifar", size, list(recipe.mean), list(recipe.std))
    network = SimCLR(encoder, encoder.feature_dim, 128)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs miss this form
    optimizer = build_optimizer(network, "sgd", 0.06, 0.9, 5e-4)
    model: Any = torch.compile(network) if compiled else network
    views_of: Any = torch.compile(cut_views, dynamic=False) if compiled else cut_views
    images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    index = torch.randperm(num_samples, device=device)[:batch_size]
    pruner = Pruner(
        num_samples,
        batch_size=batch_size,
        epochs=10_000,
        fraction=max(FRACTIONS),
        anneal_fraction=0.0,
        seed=seed,
        device=device,
    )
    everyone = torch.arange(num_samples, device=device)
    pruner.record.observe(everyone, torch.rand(2, num_samples, device=device), None, 0)
    h_a, h_b = torch.rand(2, batch_size, encoder.feature_dim, device=device).unbind()
    loss_now = torch.rand(batch_size, device=device)

    def step() -> None:
        view_a, view_b = views_of(images, draw_params(seed, 0, index, recipe, images.shape[-1]), recipe)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            z: Tensor = model(torch.cat([view_a, view_b]).to(memory_format=torch.channels_last))[1]
        z_a, z_b = z.chunk(2)
        loss = nt_xent(z_a, z_b, 0.5)
        optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        optimizer.step()

    def score() -> None:
        pruner.observe(pruner.gather(index, loss_now, closeness(h_a, h_b)))

    count = pruner.steps[1] * batch_size

    def select() -> None:
        kept = pruner.policy.choose(pruner.record.known, count, seed, 1, 1)
        shuffled_batches(kept.index, batch_size, seed, 1)

    def mean_seconds(work: Callable[[], None], times: int) -> float:
        def repeat() -> None:
            for _ in range(times):
                work()

        return common.seconds(repeat) / times

    contenders = {
        "step": partial(mean_seconds, step, 1 if arguments.quick else 3),
        "scoring, a step": partial(mean_seconds, score, 100),
        "selection, an epoch": partial(mean_seconds, select, 20),
    }
    for work in (step, step, score, select):  # warm-up, and where compiled the compilation
        work()
    figures = common.interleave(contenders, arguments.repeats)
    steps = count // batch_size
    added = [
        a + b / steps for a, b in zip(figures["scoring, a step"], figures["selection, an epoch"], strict=True)
    ]
    figures["added to a step"] = added
    ratio = Ratio("added to a step", "step", goal=SHARE_GOAL, at_most=True)
    return {**common.summary(figures, [ratio], "seconds"), "steps_an_epoch": steps, "compiled": compiled}


def main(argv: list[str] | None = None) -> None:
    options = common.parser("Seconds saved by pruning, and the cost of scores and selection.")
    options.add_argument(
        "--data", required=True, help="CIFAR-10 as a folder of parquet files, or any other data.source"
    )
    arguments = common.parse(options, argv)
    cases = {"whole runs": whole_runs(arguments)}
    if arguments.quick:
        cases["share, tiny"] = added_cost(8, 16, 8, 80, False, arguments)
    else:
        cases["share, width 8, batch 128, 24 px, N 1,280"] = added_cost(8, 24, 128, 1280, False, arguments)
        cases["share, width 16, batch 256, 32 px, N 50,000"] = added_cost(
            16, 32, 256, 50_000, True, arguments
        )
    common.write("pruning", {"cases": cases}, arguments)


if __name__ == "__main__":
    common.run(main)
