"""Accuracy on a test split, with a bootstrap interval over its samples.

Metrics (all 0..1): `top1`; `mean_per_class`, the mean of the accuracies of the classes that occur; `voc_map`,
the mean over classes of PASCAL VOC 2007's 11-point average precision (Everingham et al. 2010, section 4.2);
`map`, the mean over classes of the area under the precision-recall curve without interpolation.

The bootstrap (Efron, 1979) answers "how much of this number is the choice of test images": the N test samples
are drawn again with replacement. What the training seed contributes is not in it. Average precision is a
little higher on draws than on the split (a positive drawn twice helps itself), so its interval sits a little
high, too. Letters: N samples, C classes, R resamples.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from linear_eval.features import EvalError

Metric = Literal["top1", "mean_per_class", "voc_map", "map"]
METRICS: tuple[Metric, ...] = get_args(Metric)
NUM_RESAMPLES = 1000  # of the bootstrap
MULTI_LABEL: tuple[Metric, ...] = ("voc_map", "map")
CHUNK_ELEMENTS = 2**23  # weights (resamples, samples) held at once: 32 MiB, and temporaries of that size


@dataclass(frozen=True)
class Measured:
    """A metric on the whole test split, 0..1, and its percentile interval; `num_test` samples."""

    value: float
    low: float
    high: float
    num_test: int


def measure(
    outputs: Tensor,
    labels: Tensor,
    metric: Metric,
    *,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Measured:
    """The metric and its bootstrap percentile interval.

    Args:
        outputs: for top1 and mean_per_class (N,) predicted class ids, or (N, C) scores whose column is
            the class id; for voc_map and map (N, C) scores, the higher the more likely.
        labels: (N,) class ids; for voc_map and map (N, C): 1 present, 0 absent, -1 not counted for that
            class.
        num_resamples: R; at 1,000 the ends of the interval wander by about 2 % of its width.
        confidence: share of the resamples within the interval, in (0, 1).
        seed: of the resamples; equal seeds give the same ones for equal labels.

    Raises:
        EvalError: no samples, shapes do not fit, scores not finite, no positives, a value out of range.
    """
    outputs, labels = outputs.detach().cpu(), labels.detach().cpu()
    _check(outputs, labels, metric)
    if num_resamples < 2 or not 0 < confidence < 1:
        fix = "choose num_resamples >= 2, e.g. 1000, and 0 < confidence < 1"
        raise EvalError(f"num_resamples is {num_resamples}, confidence {confidence}", fix)
    if metric in MULTI_LABEL:
        value = average_precision(outputs, labels, metric).nanmean().item()
        values = _bootstrap_map(outputs, labels, metric, num_resamples, seed)  # (R,)
    else:
        hit = (outputs.argmax(dim=1) if outputs.ndim == 2 else outputs) == labels  # (N,)
        groups = torch.zeros(len(labels), dtype=torch.int64)
        if metric == "mean_per_class":
            groups = labels.unique(return_inverse=True)[1]
        # Only (class, right or wrong) of a sample matters, so that resampling N samples is one multinomial
        # draw over these cells.
        # (2C,) wrong, right of every class
        cells = torch.bincount(2 * groups + hit, minlength=2 * int(groups.max()) + 2).numpy()
        value = _accuracy_of_cells(cells[None]).item()
        shares = cells / cells.sum()
        values = _accuracy_of_cells(
            np.random.default_rng(seed).multinomial(len(labels), shares, num_resamples)
        )
    values = values[~values.isnan()]  # a resample may lack a class, or all positives
    tail = (1 - confidence) / 2
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Measured(value, low, high, len(labels))


def average_precision(scores: Tensor, labels: Tensor, metric: Metric) -> Tensor:
    """(C,) float64 average precision of scores (N, C) for labels (N, C) in {1, 0, -1}; NaN without positives.

    `voc_map`: the mean over recalls 0, 0.1, ... 1 of the highest precision at that recall or beyond. `map`:
    the precision at each threshold times the recall gained there. Samples of equal score enter together.
    """
    ones = torch.ones(1, len(scores), dtype=torch.float64)
    return torch.cat([_weighted_ap(scores[:, c], labels[:, c], ones, metric) for c in range(scores.shape[1])])


def _weighted_ap(scores: Tensor, labels: Tensor, weights: Tensor, metric: Metric) -> Tensor:
    """(R,) average precision of a class, scores and labels (N,), by weights (R, N): counts of samples."""
    rows = (labels >= 0).nonzero().squeeze(1)
    if len(rows) == 0:
        return torch.full((len(weights),), torch.nan, dtype=weights.dtype)
    rows = rows[scores[rows].argsort(descending=True)]
    _, run = scores[rows].unique_consecutive(return_inverse=True)
    last = torch.bincount(run).cumsum(0)[run] - 1  # (N,) where the run of equal scores ends
    weights = weights[:, rows]  # (R, N)
    gained = weights * (labels[rows] == 1)
    found = gained.cumsum(dim=1)  # whole numbers: exact
    precision = (found / weights.cumsum(dim=1).clamp(min=1))[:, last]  # (R, N)
    positives = found[:, -1:]  # (R, 1)
    if metric == "map":
        return (gained * precision).sum(dim=1) / positives.squeeze(1)
    best = precision.flip(1).cummax(dim=1).values.flip(1)  # (R, N) highest from here on
    # (R, 11) positives found at a recall of 0, 0.1, ... 1
    wanted = (torch.arange(11, dtype=weights.dtype) * positives / 10).ceil()
    ap = best.gather(1, torch.searchsorted(found, wanted)).mean(dim=1)
    return torch.where(positives.squeeze(1) > 0, ap, torch.nan)


def _bootstrap_map(scores: Tensor, labels: Tensor, metric: Metric, num_resamples: int, seed: int) -> Tensor:
    """(R,) means over the classes. 1,000 resamples of 5,000 x 20 take about ten seconds on one core."""
    generator = torch.Generator().manual_seed(seed)
    num, num_classes = scores.shape
    answers = []
    for start in range(0, num_resamples, step := max(1, CHUNK_ELEMENTS // num)):
        count = min(step, num_resamples - start)
        drawn = torch.randint(num, (count, num), generator=generator) + num * torch.arange(count)[:, None]
        weights = torch.bincount(drawn.flatten(), minlength=count * num).view(count, num).float()
        aps = [_weighted_ap(scores[:, c], labels[:, c], weights, metric) for c in range(num_classes)]
        answers.append(torch.stack(aps).nanmean(dim=0))
    return torch.cat(answers).double()


def _accuracy_of_cells(cells: np.ndarray) -> Tensor:
    """(R,) mean over the classes that occur of right / (right + wrong), from counts (R, 2C)."""
    counts = torch.from_numpy(cells).double().view(len(cells), -1, 2)  # (R, C, wrong and right)
    return (counts[:, :, 1] / counts.sum(dim=2)).nanmean(dim=1)  # 0 / 0 is NaN: the resample lacks the class


def _check(outputs: Tensor, labels: Tensor, metric: str) -> None:
    if metric not in METRICS:
        raise EvalError(f"metric is {metric!r}", f"choose one of {', '.join(METRICS)}")
    if len(labels) == 0:
        raise EvalError("there are no test samples", "give at least one")
    shapes = f"outputs are {tuple(outputs.shape)} {outputs.dtype}, labels {tuple(labels.shape)}"
    if metric in MULTI_LABEL:
        if outputs.ndim != 2 or outputs.shape != labels.shape:
            raise EvalError(f"{shapes}, for {metric}", "give (N, C) scores and (N, C) labels of 1, 0 and -1")
        if not (labels == 1).any():
            fix = "use another test split"
            raise EvalError("no class has a positive test sample, average precision is undefined", fix)
    elif (
        labels.ndim != 1
        or len(outputs) != len(labels)
        or outputs.ndim > 2
        or (outputs.ndim == 1 and outputs.is_floating_point())
    ):
        fix = "give (N,) whole class ids or (N, C) scores, and (N,) labels"
        raise EvalError(f"{shapes}, for {metric}", fix)
    if outputs.is_floating_point() and not outputs.isfinite().all():
        fix = "use another checkpoint: this one has diverged"
        raise EvalError(f"{int((~outputs.isfinite()).sum())} test scores are not finite", fix)
