"""Order a data set by the reliable scores of a finished run: what selection could do at best, if its scores
were not noise.

    python -m experiments.proxy RUN --data PATH --out runs/proxy          # RUN from
    experiments/reliability_runs.yaml
    python -m experiments.run experiments/proxy_subsets.yaml data.source=PATH

Each image's score is the mean of `--draws` draws with RUN's last weights. Writes one .npy of all indices an
order, most wanted first, for `prune.policy=indices`: easy and hard (lowest and highest loss), near and far
(normalised distance), emp (loss - 5 raw distance), random.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from experiments.reliability import draws, halves, load
from ssl_emp.commands.job import Job
from ssl_emp.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Orders of a data set by a run's scores; see the file's head."
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", help="data.source, where it is not where the run found it")
    parser.add_argument("--draws", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/proxy"))
    arguments = parser.parse_args()
    try:
        job: Job = load(arguments.run, arguments.data)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    everyone = torch.arange(job.num_samples)
    scores, _ = draws(job, everyone, arguments.batch_size, arguments.draws, common=False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    orders = {
        "easy": scores["loss"],
        "hard": -scores["loss"],
        "near": scores["normalised distance"],
        "far": -scores["normalised distance"],
        "emp": -scores["EMP raw"],
        "random": torch.rand(1, job.num_samples, generator=torch.Generator().manual_seed(0)),
    }
    for name, values in orders.items():
        np.save(arguments.out / f"{name}.npy", values.nanmean(0).argsort().numpy())
        print(
            f"{name}: reliability of half the draws' mean {halves(values):.2f}" if len(values) > 1 else name,
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
