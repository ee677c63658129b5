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

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.information import run_grid, train_with
from ssl_emp import evaluate
from ssl_emp.commands.job import Job
from ssl_emp.errors import UserError
from ssl_emp.model import save_encoder
from ssl_emp.prune import closeness

STAGES = ("layer1", "layer2", "layer3", "layer4")
LOG = ("rank_correlation", "kept_overlap", "times_gini")  # means over the pruned epochs


class Stages:
    """Keeps what the last forward gave at some stages: the means of their maps over the places, (2b, C)."""

    def __init__(self, backbone: nn.Module, names: tuple[str, ...]) -> None:
        self._means: dict[str, Tensor] = {}
        for name in names:
            backbone.get_submodule(name).register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, given: Any, maps: Tensor) -> None:
            self._means[name] = maps.detach().float().mean((2, 3))

        return hook

    def closeness(self) -> Tensor:
        """Minus the distance (b,) of the two views, of the stages' means brought to length one and joined."""
        h_a, h_b = torch.cat([F.normalize(mean, dim=1) for mean in self._means.values()], 1).chunk(2)
        return closeness(h_a, h_b)


def train(job: Job, memory: str) -> dict[str, Any]:
    """A SimCLR run as pretrain.py makes it, with this memory term; its row."""
    if memory not in (*STAGES, "all"):
        raise UserError(f"memory is {memory!r}", f"choose one of {', '.join(STAGES)}, all")
    stages = Stages(job.encoder.backbone, STAGES if memory == "all" else (memory,))
    row = train_with(job, lambda index: stages.closeness(), LOG)
    with tempfile.TemporaryDirectory() as folder:
        save_encoder(job.encoder, Path(folder))
        data = {"data.max_images": job.config.data.max_images}  # at the encoder's own size
        table = evaluate(folder, job.config.data.source, ["knn", "linear"], config=data, verbose=False)
    return row | {line.evaluator: line.value for line in table}


def main(argv: list[str] | None = None) -> int:
    return run_grid(argv, str(__doc__), train)


if __name__ == "__main__":
    sys.exit(main())
