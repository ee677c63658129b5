"""Is there a better memory term than the entropy? A supervised grid with a term of one's own.

    python -m experiments.information experiments/supervised_information.yaml data.source=PATH [--until 18:30]

EMP's supervised score is loss + beta * H(p), where H stands for the information I(theta; y | x) that the
weights would gain from a label. A known estimate of it is the entropy of the mean prediction less the mean
entropy, H(mean p) - mean H(p), over draws of the weights (BALD, arXiv 1112.5745); here over the network's
states whenever the sample was trained on, which costs N x C numbers and no forward. The runs are those of
pretrain.py but for this term: the grid's `memory` is `entropy`, which is EMP's, or `information`.

One JSON line a cell. Finished cells are skipped, an interrupted one begins again; after `--until` none
begins.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.glue import append, time_today
from experiments.run import ROOT, Cell, expand, git_revision, read_grid, words_of
from experiments.table import read_rows
from ssl_emp.augment import cut_views
from ssl_emp.commands.job import Job, prepare
from ssl_emp.commands.pretrain import classify, forward
from ssl_emp.config import load_config
from ssl_emp.errors import Parser, UserError
from ssl_emp.optim import build_optimizer
from ssl_emp.prune import entropy
from ssl_emp.run.report import Report

# a job and the name of its memory term -> the row: samples_seen, cpu_seconds, accuracies in per cent, log
Train = Callable[[Job, str], dict[str, Any]]
METRICS = ("test_accuracy", "knn", "linear")


class Predictions:
    """Of every sample: the running mean of its predictions, and that of their entropies."""

    def __init__(self, num_samples: int, num_classes: int) -> None:
        self.mean = torch.zeros(num_samples, num_classes)
        self.entropy, self.times = torch.zeros(num_samples), torch.zeros(num_samples)

    def information(self, index: Tensor, logits: Tensor) -> Tensor:
        """Take in the logits (B, C) of samples (B,): their H(mean p) - mean H(p), (B,) in nats, 0 or more."""
        self.times[index] += 1
        rate = 1 / self.times[index]
        p = logits.detach().float().softmax(1)
        self.mean[index] += rate.unsqueeze(1) * (p - self.mean[index])
        self.entropy[index] += rate * (entropy(logits.detach().float()) - self.entropy[index])
        of_mean = torch.special.entr(self.mean[index]).sum(1)
        return (of_mean - self.entropy[index]).clamp(min=0)


def train(job: Job, memory: str) -> dict[str, Any]:
    """A supervised run as pretrain.py makes it, with this memory term; its row."""
    assert job.labels is not None and job.test is not None
    predictions, logits = Predictions(job.num_samples, job.labels.num_classes), [torch.empty(0)]

    def keep(module: nn.Module, given: Any, outputs: tuple[Tensor, Tensor]) -> None:
        logits[0] = outputs[1]

    job.model.register_forward_hook(keep)
    own = None if memory == "entropy" else lambda index: predictions.information(index, logits[0])
    row = train_with(job, own, ["noisy_kept"])
    return row | {"test_accuracy": round(100 * classify(job, job.test), 2)}


def train_with(job: Job, memory: Callable[[Tensor], Tensor] | None, log: Sequence[str]) -> dict[str, Any]:
    """Train as pretrain.py does, but for the memory term; what of the row is known then.

    Args:
        memory: the samples (b,) that the last forward saw -> their term (b,); None: the objective's own.
        log: figures of the pruned epochs, whose means are kept.
    """
    config, pruner = job.config, job.pruner
    labels = (job.labels.values, job.labels.is_noisy) if job.labels else (None, None)
    of = config.optimizer
    assert isinstance(of.lr, float) and of.name == "sgd" and of.weight_decay is not None
    optimizer = build_optimizer(job.model, of.name, of.lr, of.momentum, of.weight_decay, job.lr_scales)
    step, pruned, began = 0, [], time.process_time()
    job.model.train()
    for epoch in range(len(pruner.steps)):
        recipe = job.recipe_at(epoch)
        for index, images in job.store.stream(pruner.batches(epoch)):
            loss, scored, term, draw = forward(job, job.model, cut_views, index, images, epoch, recipe)
            optimizer.zero_grad()
            pruner.weighted(index, loss).backward()
            seen = pruner.gather(index, scored, term if memory is None else memory(index), draw)
            job.schedule.set(optimizer, step)
            optimizer.step()
            pruner.observe(seen)
            step += 1
        figures = pruner.figures(*labels)
        pruned += [figures] if pruner.plan.is_pruned(epoch) else []
    found = {name: [figures[name] for figures in pruned if name in figures] for name in log}
    return {
        "samples_seen": step * config.batch_size,
        "cpu_seconds": time.process_time() - began,
        "log": {name: statistics.fmean(values) for name, values in found.items() if values},
    }


def main(argv: list[str] | None = None) -> int:
    return run_grid(argv, str(__doc__), train)


def run_grid(argv: list[str] | None, about: str, train: Train) -> int:
    """The command: a grid whose cells have a `memory`, each one trained by `train`. Returns the exit code."""
    parser = Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as data.source=PATH")
    parser.add_argument("--until", metavar="HH:MM", help="begin no cell after this time of today")
    parser.add_argument("--results", type=Path, default=ROOT / "experiments" / "results")
    try:
        arguments = parser.parse_args(argv)
        grid = read_grid(arguments.grid)
        until = math.inf if arguments.until is None else time_today(arguments.until)
        results = arguments.results / f"{arguments.grid.stem}.jsonl"
        run_cells(grid, arguments.overrides, until, results, train)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_cells(grid: dict[str, Any], overrides: list[str], until: float, results: Path, train: Train) -> None:
    """Every cell of the grid that `results` does not have, one after the other."""
    torch.set_num_threads(1)
    for cell in expand(grid["cells"]):
        done = [row["settings"] for row in (read_rows(results) if results.exists() else [])]
        settings: Cell = {**grid["overrides"], **cell}
        if settings in done or time.time() > until:
            continue
        words = words_of({key: value for key, value in settings.items() if key != "memory"})
        job = prepare(load_config(grid["config"], [*words, *overrides]), Report(silent=True))
        row = {"cell": cell, **train(job, cell.get("memory", "entropy")), "settings": settings}
        append(results, row | {"revision": git_revision(), "torch": torch.__version__})
        found = ", ".join(f"{name} {row[name]:.2f}" for name in METRICS if name in row)
        print(f"{cell}: {found}, {row['cpu_seconds']:.0f} CPU s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
