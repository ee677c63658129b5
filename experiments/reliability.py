"""How much of a score is the sample and not the draw: repeated scores of the same samples at fixed weights.

    python -m experiments.run experiments/reliability_runs.yaml --keep-checkpoints data.source=PATH
    python -m experiments.reliability runs/reliability_runs/* --data PATH

For each finished run (its last checkpoint), a fixed set of images is drawn `--draws` times: new views and new
batch mates each time, weights and BatchNorm mode of training. Then, for the loss, the raw and the normalised
distance and EMP's score (beta 5):

    one          mean rank correlation of two draws
    adjusted     the same after a regression on what the augmentation drew (ssl_emp.augment.draw_features)
    common       the same augmentation for all images of a pass
    averaged     of the means of two halves of the draws, and `averaged adjusted`
    explained    share of the variance that the regression explains

One JSON line for each (run, batch size, score) goes to experiments/results/reliability.jsonl; a markdown
table is printed.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_emp.augment import NUM_DRAW_FEATURES, cut_views, draw_features, draw_params
from ssl_emp.commands.job import Job, prepare
from ssl_emp.commands.pretrain import forward
from ssl_emp.config import load_config
from ssl_emp.errors import UserError
from ssl_emp.prune import Emp, closeness
from ssl_emp.prune.figures import rank_correlation
from ssl_emp.prune.plan import shuffled_batches
from ssl_emp.prune.pruner import RELIABILITY_EPOCHS
from ssl_emp.prune.record import Known
from ssl_emp.run.checkpoint import load_checkpoint
from ssl_emp.run.report import Report

RESULTS = Path(__file__).parent / "results" / "reliability.jsonl"
BETA = 5.0
SCORES = ("loss", "raw distance", "normalised distance", "EMP raw")
COLUMNS = ("one", "adjusted", "common", "averaged", "averaged adjusted", "explained")


@torch.no_grad()
def draws(
    job: Job, sample: Tensor, batch_size: int, count: int, common: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """`count` draws of `sample` (n,): -> each score (count, n), and what was drawn (count, n, F)."""
    seed, recipe = job.config.seed, job.recipe
    place = torch.empty(job.num_samples, dtype=torch.int64)
    place[sample] = torch.arange(len(sample))
    # NaN: in no batch of a draw
    scores = {name: torch.full((count, len(sample)), torch.nan) for name in SCORES}
    features = torch.zeros(count, len(sample), NUM_DRAW_FEATURES)
    h = torch.empty(0)

    def network(views: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal h
        h, z = job.model(views)
        return h, z

    for draw in range(count):
        key = RELIABILITY_EPOCHS + draw
        for index, images in job.store.stream(shuffled_batches(sample, batch_size, seed, key)):
            side, where = images.shape[-1], place[index]
            drawn = torch.zeros_like(index) if common else index  # views are keyed on the sample
            _, loss, _, _ = forward(job, network, cut_views, drawn, images, key, recipe)
            features[draw, where] = draw_features(*draw_params(seed, key, drawn, recipe, side), side)
            h_a, h_b = h.chunk(2)
            raw, normalised = (closeness(h_a, h_b, normalized) for normalized in (False, True))
            emp = Emp(beta=BETA).score(Known(torch.stack([loss, raw]), torch.zeros_like(loss)))
            for name, value in zip(SCORES, (loss, -raw, -normalised, emp), strict=True):
                scores[name][draw, where] = value
    return scores, features


def residuals(values: Tensor, features: Tensor) -> tuple[Tensor, float]:
    """Residuals of a regression of all draws (count, n) on features (count, n, F), and its R²."""
    y = (values - values.mean(1, keepdim=True)).flatten().double()
    x = (features - features.mean((0, 1))).flatten(0, 1).double()
    x = x[:, x.std(0) > 0]
    left = y - x @ torch.linalg.lstsq(x, y.unsqueeze(1)).solution.squeeze(1)
    return left.view_as(values).float(), 1 - float(left.square().sum() / y.square().sum())


def mean_correlation(values: Tensor) -> float:
    """Mean rank correlation of all pairs of rows."""
    pairs = [rank_correlation(a, b) for a, b in itertools.combinations(values, 2)]
    return float(torch.stack(pairs).mean())


def halves(values: Tensor) -> float:
    """Rank correlation of the means of the even and the odd rows."""
    return float(rank_correlation(values[::2].nanmean(0), values[1::2].nanmean(0)))


def load(run: Path, data: str | None) -> Job:
    """A finished run's job with its last weights, in training mode, no running statistic touched."""
    overrides = [f"data.source={data}"] if data else []
    job = prepare(load_config(run / "config.yaml", overrides), Report())
    state, _ = load_checkpoint(run / "checkpoints")
    if state is None:
        raise UserError(f"{run} has no checkpoint", "run the grid with --keep-checkpoints")
    job.model.load_state_dict(state["model"])
    job.model.train()
    for module in job.model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
    return job


def measure(run: Path, batch_size: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one run at one batch size."""
    job = load(run, arguments.data)
    count = arguments.images // batch_size * batch_size
    if not 0 < count <= job.num_samples:
        raise UserError(
            f"{count} images in batches of {batch_size} from {job.num_samples}",
            "change --images or --batch-sizes",
        )
    sample = torch.randperm(job.num_samples, generator=torch.Generator().manual_seed(0))[:count]
    own, features = draws(job, sample, batch_size, arguments.draws, common=False)
    shared, _ = draws(job, sample, batch_size, arguments.draws, common=True)
    rows = []
    for name, values in own.items():
        left, explained = residuals(values, features)
        figures = (
            mean_correlation(values),
            mean_correlation(left),
            mean_correlation(shared[name]),
            halves(values),
            halves(left),
            explained,
        )
        about = {
            "run": run.name,
            "data": Path(job.config.data.source).name,
            "epochs": job.config.epochs,
            "width": job.config.model.width,
        }
        about |= {"batch_size": batch_size, "score": name}
        rows.append(
            about | {"images": count, "draws": arguments.draws} | dict(zip(COLUMNS, figures, strict=True))
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Reliability of the scores of finished runs; see the file's head."
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", help="data.source, where it is not where the run found it")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    heads = ("run", "batch_size", "score", *COLUMNS)
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
    try:
        for run, batch_size in itertools.product(arguments.runs, arguments.batch_sizes):
            rows = measure(run, batch_size, arguments)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            with open(arguments.out, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            for row in rows:
                cells = [
                    f"{row[head]:.2f}" if isinstance(row[head], float) else str(row[head]) for head in heads
                ]
                print(f"| {' | '.join(cells)} |", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
