"""NT-Xent, forward and backward, against lightly's: time, and peak memory of a process of its own.

    python -m benchmarks.loss

4,096 pairs of 128 dimensions, the batch of SimCLR's paper. The memory is what the process's peak
(`ru_maxrss`) grows by from the moment its inputs exist, in a fresh process each, after a warm-up on 64 pairs.
On a GPU it is torch's own count.
"""

import argparse
import json
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Ratio
from ssl_emp.loss import nt_xent

TEMPERATURE = 0.5


def make_loss(name: str) -> Any:
    """(z_a, z_b) -> scalar."""
    if name == "lightly":
        from lightly.loss import NTXentLoss

        return NTXentLoss(TEMPERATURE)
    return lambda z_a, z_b: nt_xent(z_a, z_b, TEMPERATURE).mean()


def inputs(pairs: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(pairs, 128, generator=generator).to(device).requires_grad_() for _ in range(2)]


def time_of(name: str, pairs: int, device: torch.device) -> float:
    """Seconds of a forward and backward pass."""
    loss, (z_a, z_b) = make_loss(name), inputs(pairs, device)
    loss(*inputs(64, device)).backward()
    return common.seconds(lambda: loss(z_a, z_b).backward())


def memory_of(name: str, pairs: int, arguments: Any) -> float:
    """MB by which the peak grows, measured by a process of its own."""
    options = ["--child", name, "--pairs", str(pairs), "--device", str(arguments.device)]
    return float(json.loads(common.run_python(["-m", "benchmarks.loss", *options]).splitlines()[-1]))


def print_memory(name: str, pairs: int, device: torch.device) -> None:
    """The measurement of `memory_of`, in its process."""
    loss, (z_a, z_b) = make_loss(name), inputs(pairs, device)
    loss(*inputs(64, device)).backward()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(z_a, z_b).backward()
        print((torch.cuda.max_memory_allocated() - before) / 1e6)
        return
    print(common.peak_growth(lambda: loss(z_a, z_b).backward()) / 1e6)


def main(argv: list[str] | None = None) -> None:
    options = common.parser("NT-Xent against lightly's.")
    options.add_argument("--pairs", type=int)
    options.add_argument("--child", choices=["ours", "lightly"], help=argparse.SUPPRESS)
    arguments = common.parse(options, argv)
    pairs = arguments.pairs or (256 if arguments.quick else 4096)
    if arguments.child:
        return print_memory(arguments.child, pairs, arguments.device)
    times = common.interleave(
        {name: partial(time_of, name, pairs, arguments.device) for name in ("lightly", "ours")},
        arguments.repeats,
    )
    memory = common.interleave(
        {name: partial(memory_of, name, pairs, arguments) for name in ("lightly", "ours")}, arguments.repeats
    )
    cases = {
        f"{pairs:,} pairs, time": common.summary(times, [Ratio("lightly", "ours", goal=3.0)], "seconds"),
        f"{pairs:,} pairs, memory": common.summary(
            memory, [Ratio("ours", "lightly", goal=1 / 3, at_most=True)], "MB"
        ),
    }
    common.write("loss", {"cases": cases}, arguments)


if __name__ == "__main__":
    common.run(main)
