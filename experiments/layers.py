"""Does the memory of earlier layers choose better? A SimCLR grid with EMP's distance taken at other stages.

    python -m experiments.layers experiments/ssl_layers.yaml data.source=PATH [--until 18:30]

EMP's memory term is the distance of a sample's two views in the backbone's features. The paper leaves open
which layer it should be taken at. Here it is the distance between the L2-normalised means over the places of
a stage's map, at `layer1` to `layer4`, or at `all` of them, joined. The mean over layer4 are the features, so
that is `prune.memory=normalized`, up to rounding in bf16. All else is as in pretrain.py: the runs of one seed
share weights and views.

One JSON line a cell. Finished cells are skipped, an interrupted one begins again; after `--until` none
begins.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.information import run_grid
from ssl_emp import evaluate
from ssl_emp.augment import cut_views, draw_params
from ssl_emp.commands.job import Job
from ssl_emp.commands.pretrain import contrastive, through
from ssl_emp.errors import UserError
from ssl_emp.model import save_encoder
from ssl_emp.optim import build_optimizer
from ssl_emp.prune import closeness

STAGES = ("layer1", "layer2", "layer3", "layer4")
LOG = ("rank_correlation", "kept_overlap", "times_gini")  # means over the pruned epochs


class Stages:
    """What the last forward gave at some stages, joined: (M, sum of their channels).

    The part of each stage has length one.
    """

    def __init__(self, backbone: nn.Module, names: tuple[str, ...]) -> None:
        self._means: dict[str, Tensor] = {}
        self.names = names
        for name in names:
            backbone.get_submodule(name).register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, given: Any, maps: Tensor) -> None:
            self._means[name] = maps.detach().float().mean((2, 3))

        return hook

    def __call__(self) -> Tensor:
        return torch.cat([F.normalize(self._means[name], dim=1) for name in self.names], 1)


def train(job: Job, memory: str) -> dict[str, Any]:
    """A SimCLR run as pretrain.py makes it, with this memory term; its row."""
    if memory not in (*STAGES, "all"):
        raise UserError(f"memory is {memory!r}", f"choose one of {', '.join(STAGES)}, all")
    config, pruner = job.config, job.pruner
    stages = Stages(job.encoder.backbone, STAGES if memory == "all" else (memory,))
    of = config.optimizer
    assert isinstance(of.lr, float) and of.name == "sgd" and of.weight_decay is not None
    optimizer = build_optimizer(job.model, of.name, of.lr, of.momentum, of.weight_decay, job.lr_scales)
    step, pruned, began = 0, [], time.process_time()
    job.model.train()
    for epoch in range(len(pruner.steps)):
        recipe = job.recipe_at(epoch)
        for index, images in job.store.stream(pruner.batches(epoch)):
            draw = draw_params(config.seed, epoch, index, recipe, images.shape[-1])
            _, z = through(job, job.model, torch.cat(cut_views(images, draw, recipe)))
            z_a, z_b = z.chunk(2)
            names = config.loss, config.scored_loss
            loss, scored = contrastive(*names, z_a, z_b, config.temperature, job.ranks)
            optimizer.zero_grad()
            pruner.weighted(index, loss).backward()
            h_a, h_b = stages().chunk(2)
            seen = pruner.gather(index, scored, closeness(h_a, h_b))
            job.schedule.set(optimizer, step)
            optimizer.step()
            pruner.observe(seen)
            step += 1
        figures = pruner.figures()
        pruned += [figures] if pruner.plan.is_pruned(epoch) else []
    row = {"samples_seen": step * config.batch_size, "cpu_seconds": time.process_time() - began}
    with tempfile.TemporaryDirectory() as folder:
        save_encoder(job.encoder, Path(folder))
        data = {"data.max_images": config.data.max_images}  # at the encoder's own size, as a run is judged
        table = evaluate(folder, config.data.source, ["knn", "linear"], config=data, verbose=False)
    found = {name: [figures[name] for figures in pruned if name in figures] for name in LOG}
    log = {name: statistics.fmean(values) for name, values in found.items() if values}
    return row | {line.evaluator: line.value for line in table} | {"log": log}


def main(argv: list[str] | None = None) -> int:
    return run_grid(argv, str(__doc__), train)


if __name__ == "__main__":
    sys.exit(main())
