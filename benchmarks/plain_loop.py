"""What a Pruner costs in somebody else's loop: a plain loop without one, and with one that prunes nothing.

    python -m benchmarks.plain_loop

Supervised, a narrow ResNet-18, random images of 32 pixels in memory, batch 256, a DataLoader without workers,
which leaves everything in the step. `pruner` has the three lines of docs/your_loop.md with `fraction=0`: the
index in the batch, the sampler, the entropy and the scores. The loops take turns step by step, and each goes
first as often as the other: what slows the machine down slows both. A round's figure is the median over its
steps.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import common
from benchmarks.common import Ratio
from ssl_emp.model import build_encoder
from ssl_emp.prune import Pruner, entropy

BATCH, CLASSES = 256, 10
LOOPS = ("plain", "pruner")


def loop(name: str, width: int, samples: int, device: torch.device) -> Iterator[float]:
    """Seconds of each step, reading the batch included, for as many epochs as anybody asks for."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", width, "auto", 32, [0.5] * 3, [0.25] * 3)
    model = torch.nn.Sequential(encoder, torch.nn.Linear(encoder.feature_dim, CLASSES)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    dataset = TensorDataset(torch.rand(samples, 3, 32, 32), torch.randint(CLASSES, (samples,)))
    pruner = Pruner(samples, batch_size=BATCH, epochs=1_000, fraction=0.0) if name == "pruner" else None
    loader: DataLoader[Any] = (
        DataLoader(pruner.indexed(dataset), BATCH, sampler=pruner.sampler())
        if pruner
        else DataLoader(dataset, BATCH, shuffle=True, drop_last=True)
    )
    while True:
        batches = iter(loader)
        for _ in range(len(loader)):
            common.synchronize()
            began = time.perf_counter()
            x, y, *index = next(batches)
            logits = model(x.to(device))
            if pruner:
                losses = F.cross_entropy(logits, y.to(device), reduction="none")
                loss = pruner.update(index[0], losses, entropy(logits))
            else:
                loss = F.cross_entropy(logits, y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            common.synchronize()
            yield time.perf_counter() - began


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """The median second of a step of either loop, a round."""
    width, samples, steps = (2, 2 * BATCH, 2) if arguments.quick else (arguments.width, 20 * BATCH, 40)
    loops = {name: loop(name, width, samples, arguments.device) for name in LOOPS}
    for steps_of in loops.values():  # the first steps allocate
        next(steps_of), next(steps_of)
    figures: dict[str, list[float]] = {name: [] for name in LOOPS}
    for _ in range(arguments.repeats):
        seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
        for step in range(steps):
            for name in LOOPS if step % 2 else reversed(LOOPS):
                seconds[name].append(next(loops[name]))
        for name in LOOPS:
            figures[name].append(statistics.median(seconds[name]))
    return figures


def main(argv: list[str] | None = None) -> None:
    options = common.parser("The cost of a Pruner that prunes nothing, in a plain PyTorch loop.")
    options.add_argument("--width", type=int, default=16, help="of the ResNet-18")
    arguments = common.parse(options, argv)
    ratios = [Ratio("pruner", "plain", goal=1.01, at_most=True)]
    cases = {f"a step of {BATCH} images": common.summary(measure(arguments), ratios, "seconds")}
    common.write("plain_loop", {"cases": cases}, arguments)


if __name__ == "__main__":
    common.run(main)
