"""What saving costs: seconds that training waits for a checkpoint, and their share at the default interval.

    python -m benchmarks.checkpoint

`save_checkpoint` of a run's whole state: network, projection head, momentum, and the pruner, which is what is
remembered of N samples and the epoch's batches; hashed, synced, with its manifests. Beside it plain
`torch.save` to one file, neither synced nor hashed, which is what most training loops call.
"""

import tempfile
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Ratio
from ssl_emp.config import CheckpointConfig
from ssl_emp.model import SimCLR, build_encoder
from ssl_emp.optim import build_optimizer
from ssl_emp.prune import Pruner
from ssl_emp.run.checkpoint import num_bytes, save_checkpoint

CASES = {
    "ResNet-18, 50,000 samples": ("resnet18", 50_000),
    "ResNet-50, 1,281,167 samples": ("resnet50", 1_281_167),
}


def state_of(arch: str, num_samples: int, device: torch.device, width: int = 64) -> dict[str, Any]:
    """What `pretrain.py` saves within an epoch, after one step."""
    model = SimCLR(build_encoder(arch, width, "imagenet", 32, [0.5] * 3, [0.25] * 3), 2048, 128).to(device)
    optimizer = build_optimizer(model, "sgd", 0.1, 0.9, 1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    pruner = Pruner(num_samples, batch_size=256, epochs=2, policy="loss", device=device)
    pruner.batches(0)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "pruner": pruner.state_dict(),
    }


def measure(state: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """Seconds of a save, ours and torch's."""
    steps = count(1)
    with tempfile.TemporaryDirectory(dir=".") as folder:  # the working directory's disk: /tmp may be memory
        runs, plain = Path(folder) / "checkpoints", Path(folder) / "plain.pt"
        save_checkpoint(runs, state, 0)
        contenders = {
            "save_checkpoint": lambda: common.seconds(lambda: save_checkpoint(runs, state, next(steps))),
            "torch.save": lambda: common.seconds(lambda: torch.save(state, plain)),
        }
        return common.interleave(contenders, repeats)


def main(argv: list[str] | None = None) -> None:
    arguments = common.parse(common.parser("The cost of a checkpoint."), argv)
    interval = 60 * CheckpointConfig().every_minutes
    cases = {}
    for case, (arch, num_samples) in CASES.items():
        state = state_of(
            arch,
            num_samples // 100 if arguments.quick else num_samples,
            arguments.device,
            8 if arguments.quick else 64,
        )
        figures = measure(state, arguments.repeats)
        ratios = [
            Ratio(
                "save_checkpoint",
                goal=0.02,
                at_most=True,
                per=interval,
                name=f"share of the time, every {interval / 60:.0f} minutes",
            ),
            Ratio("save_checkpoint", "torch.save"),
        ]
        cases[f"{case}, {num_bytes(state) / 1e6:.0f} MB"] = common.summary(figures, ratios, "seconds")
    common.write("checkpoint", {"cases": cases}, arguments)


if __name__ == "__main__":
    common.run(main)
