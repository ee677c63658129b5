"""Linear probes on frozen, cached features: a linear classifier, its settings chosen without the test split.

`linear_probe`: logistic regression to the optimum, by L-BFGS, the transfer protocol of Kornblith et al. 2019,
Do better ImageNet models transfer better? (appendix A), and of SimCLR: 45 strengths of l2, refitted on train
and validation. `multi_label_probe`: the same for images with several labels, a binary regression for each
class, its l2 chosen for that class. `sgd_probe`: heads of many learning rates and weight decays, trained side
by side on the same batches by SGD with momentum.

Neither augments: a probe that crops and flips is another protocol.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from linear_eval.errors import EvalError
from linear_eval.features import Features, check_features, check_splits
from linear_eval.lbfgs import BinaryClassifiers, fit_binary, fit_logistic
from linear_eval.metrics import MULTI_LABEL, Metric, average_precision
from linear_eval.numeric import cosine_schedule, ieee_matmul

L2_GRID = tuple(10.0 ** (-6 + 11 * step / 44) for step in range(45))
L2_RANGE = "1e-6..1e5"  # in words
# 1e-3 .. 1, for standardised features
LEARNING_RATES = tuple(10.0 ** (-3 + 3 * step / 9) for step in range(10))
WEIGHT_DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
BATCH_SIZE = 256  # of the heads that SGD trains
VAL_FRACTION = 0.2  # of the train split, held out to choose on
MAX_ITER = 1000  # L-BFGS steps of a fit
EPOCHS = 100  # of those heads
# relative, of the loss: while l2 is chosen, and of the probe that is reported
SWEEP_TOLERANCE, FIT_TOLERANCE = 1e-5, 1e-7


class LinearHead(nn.Module):
    """Logits ((x - center) / scale) W^T + b, (B, C), of features (B, D), in the weights' precision.

    Attributes:
        center: (D,), of the features it was fitted to.
        scale: (D,), above 0; infinite where the column is left out.
        weight: (C, D).
        bias: (C,).
    """

    center: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, center: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        for name, tensor in (("center", center), ("scale", scale), ("weight", weight), ("bias", bias)):
            self.register_buffer(name, tensor.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, (x.to(self.weight.dtype) - self.center) / self.scale, self.weight.T)


@dataclass(frozen=True)
class LinearResult:
    """What a linear probe found.

    Attributes:
        top1: accuracy on the test split, 0..1.
        val_top1: accuracy on the validation rows at the chosen `l2`, 0..1; None: there was no choice.
        l2: the chosen weight of ||W||^2 / 2 beside the sum of the cross-entropies, 1 / C of scikit-learn's
            LogisticRegression.
        train_loss: mean cross-entropy (nats) plus penalty / N of the final fit.
        num_steps: L-BFGS steps of the final fit, from the solution for the train part; `max_iter`: it had
            not converged.
        predicted: (N_test,) int64 class ids.
        head: the final fit.
        classes: (C,) int64 ascending, the class ids that its logits stand for.
    """

    top1: float
    val_top1: float | None
    l2: float
    train_loss: float
    num_steps: int
    predicted: Tensor = field(compare=False, repr=False)
    head: LinearHead = field(compare=False, repr=False)
    classes: Tensor = field(compare=False, repr=False)


@dataclass(frozen=True)
class HeadResult:
    """What `sgd_probe` found: as in `LinearResult`, with the chosen `learning_rate` and `weight_decay`."""

    top1: float
    val_top1: float | None
    learning_rate: float
    weight_decay: float
    train_loss: float
    predicted: Tensor = field(compare=False, repr=False)
    head: LinearHead = field(compare=False, repr=False)
    classes: Tensor = field(compare=False, repr=False)


@dataclass(frozen=True)
class MultiLabelResult:
    """What `multi_label_probe` found.

    Attributes:
        scores: (N_test, C) float32 logits of the test rows.
        l2: (C,) float64, chosen for each class.
        val_precision: (C,) float64 average precision on the validation rows at that l2, 0..1.
        train_loss: (C,) float64 mean loss (nats) plus penalty / N of the final fits.
    """

    scores: Tensor
    l2: Tensor
    val_precision: Tensor
    train_loss: Tensor


@dataclass(frozen=True)
class _Task:
    """Rows to fit, to choose on and to report, labels as indices into `classes`, on the device of the fit."""

    classes: Tensor
    fit: Features
    val: Features
    both: Features
    test: Features

    def labels(self, predicted: Tensor) -> Tensor:
        return self.classes[predicted.cpu()]


def linear_probe(
    train: Features,
    test: Features,
    *,
    seed: int,
    val: Features | None = None,
    val_fraction: float = VAL_FRACTION,
    l2_grid: Sequence[float] = L2_GRID,
    standardize: bool = True,
    max_iter: int = MAX_ITER,
    precision: Literal["float32", "float64"] = "float32",
    device: str | torch.device = "cpu",
) -> LinearResult:
    """Logistic regression: l2 chosen on validation rows, refitted on both, scored once on test.

    Everything is deterministic but for which rows are held out. Ties go to the larger l2. A test class that
    does not occur in `train` cannot be predicted and counts as wrong, as for `knn_accuracy`.

    Args:
        seed: draws the held-out part.
        val: validation split, for data that has one; default: a part of `train` is held out.
        val_fraction: share of every class held out of `train`, in (0, 1); at least one row, never all.
        l2_grid: weights of ||W||^2 / 2 beside the summed cross-entropy (the bias is free), all > 0; see
            `fit_logistic`. A single value is fitted to all of train (and val) without a choice.
        standardize: columns get mean 0 and standard deviation 1 over the rows that are fitted, so that a
            value of l2 asks the same of every encoder, whatever the scale of its features. False: centred
            only (which changes nothing), as in the papers.
        max_iter: L-BFGS steps for each fit.
        precision: float64 for an optimum to 1e-9 instead of 1e-5, at half the speed.
        device: where the fits run.

    Raises:
        EvalError: features that are empty, not finite or of different width, fewer than two classes or
            two rows in one that is to be split, validation classes that are missing in train, a value out of
            range.
    """
    grid = _sorted_grid(l2_grid)
    if max_iter < 1:
        raise EvalError(f"max_iter is {max_iter}", "choose max_iter >= 1, e.g. 1000")
    if precision not in ("float32", "float64"):
        raise EvalError(f"precision is {precision!r}", "choose float32 or float64")
    task = _prepare(
        train, val, test, val_fraction, seed, getattr(torch, precision), device, split=len(grid) > 1
    )
    fit = partial(fit_logistic, num_classes=len(task.classes), standardize=standardize, max_iter=max_iter)
    with ieee_matmul():
        val_top1, l2, start = None, grid[0], None
        if len(grid) > 1:
            sweep = fit(task.fit.x, task.fit.y, l2=grid, tolerance=SWEEP_TOLERANCE)
            accuracy = (sweep.predict(task.val.x) == task.val.y).double().mean(1).tolist()  # (H,)
            best = max(range(len(grid)), key=lambda h: (accuracy[h], grid[h]))
            val_top1, l2, start = accuracy[best], grid[best], (sweep.weight[best], sweep.bias[best])
        final = fit(task.both.x, task.both.y, l2=[l2], tolerance=FIT_TOLERANCE, start=start)
        head = LinearHead(final.center, torch.ones_like(final.center), final.weight[0], final.bias[0])
        predicted = head(task.test.x).argmax(1)
    top1 = (predicted == task.test.y).double().mean().item()
    about = (final.loss.item(), int(final.num_steps), task.labels(predicted), head, task.classes)
    return LinearResult(top1, val_top1, l2, *about)


def multi_label_probe(
    train: Features,
    test: Features,
    metric: Metric,
    *,
    seed: int,
    val: Features | None = None,
    val_fraction: float = VAL_FRACTION,
    l2_grid: Sequence[float] = L2_GRID,
    standardize: bool = True,
    max_iter: int = MAX_ITER,
    device: str | torch.device = "cpu",
) -> MultiLabelResult:
    """A binary logistic regression a class: l2 by average precision on validation rows, refitted on both.

    Rows labeled -1 for a class count neither as positive nor as negative of it, in fitting and in choosing.
    Ties go to the larger l2. The test split is not looked at beyond its features and their number of classes.

    Args:
        metric: `voc_map` or `map`, which average precision chooses.
        val: validation split; default: a part of `train` drawn from `seed` is held out, whatever its labels.
        All others: as for `linear_probe`.

    Raises:
        EvalError: features that are empty, not finite or of different width, labels other than (N, C) of
            1, 0 and -1, a class that is on all or on none of the rows that are fitted or chosen on, a value
            out of range.
    """
    grid = _sorted_grid(l2_grid)
    if metric not in MULTI_LABEL:
        raise EvalError(f"metric is {metric!r}", f"choose one of {', '.join(MULTI_LABEL)}")
    check_val_fraction(val_fraction)
    train, val, both = _prepare_multi_label(train, val, test, val_fraction, seed)
    num_classes = train.y.shape[1]
    strengths = torch.tensor(grid, dtype=torch.float64)

    def fit(part: Features, classes: Tensor, strengths: Tensor, tolerance: float) -> BinaryClassifiers:
        x, y, classes, strengths = (tensor.to(device) for tensor in (part.x, part.y, classes, strengths))
        return fit_binary(
            x, y, classes, strengths, standardize=standardize, max_iter=max_iter, tolerance=tolerance
        )

    with ieee_matmul():
        every = torch.arange(num_classes)
        sweep = fit(train, every.repeat(len(grid)), strengths.repeat_interleave(num_classes), SWEEP_TOLERANCE)
        scores = sweep.scores(val.x.to(device)).cpu().view(len(val.x), len(grid), num_classes)
        # (H, C)
        precision = torch.stack([average_precision(scores[:, h], val.y, metric) for h in range(len(grid))])
        # (C,) argmax: first of equal values, here the largest l2
        best = len(grid) - 1 - precision.flip(0).argmax(0)
        l2 = strengths[best]
        final = fit(both, every, l2, FIT_TOLERANCE)
        scores = final.scores(test.x.to(device)).cpu()
    return MultiLabelResult(scores, l2, precision.gather(0, best.unsqueeze(0)).squeeze(0), final.loss.cpu())


def sgd_probe(
    train: Features,
    test: Features,
    *,
    seed: int,
    val: Features | None = None,
    val_fraction: float = VAL_FRACTION,
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    momentum: float = 0.9,
    device: str | torch.device = "cpu",
) -> HeadResult:
    """Linear heads of all learning rates x weight decays at once; the best by validation rows, refitted.

    Features are standardised by what is fitted; heads begin at 0; the learning rate falls along a cosine.

    Args:
        seed: draws the held-out part and the order of the rows.
        val, val_fraction, device: as for `linear_probe`. One learning rate and one weight decay are not
            chosen.
        learning_rates: at the start, each > 0.
        weight_decays: times the weights (not the bias) are added to their gradients, as in
            torch.optim.SGD; each >= 0.
        epochs, batch_size, momentum: of SGD; the last batch of an epoch may be short.

    Raises:
        EvalError: as for `linear_probe`; every head diverged.
    """
    _check_sgd(learning_rates, weight_decays, epochs, batch_size, momentum)
    settings = [
        (rate, decay)
        for rate in sorted(set(learning_rates))
        for decay in sorted(set(weight_decays), reverse=True)
    ]
    task = _prepare(train, val, test, val_fraction, seed, torch.float32, device, split=len(settings) > 1)

    by_sgd = partial(train_heads, epochs=epochs, batch_size=batch_size, momentum=momentum, seed=seed)

    def train_on(
        rows: Features, settings: list[tuple[float, float]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        center, scale = _standards(rows.x)
        x = (rows.x - center) / scale
        rates, decays = (torch.tensor(values, device=x.device) for values in zip(*settings, strict=True))
        weight, loss = by_sgd(x, rows.y, len(task.classes), rates, decays)
        loss = torch.where(weight.flatten(1).isfinite().all(1), loss, torch.nan)
        return center, scale, weight, loss  # (D,), (D,), (H, C, D + 1), (H,)

    best, val_top1 = 0, None
    if len(settings) > 1:
        center, scale, weight, loss = train_on(task.fit, settings)
        predicted = (_with_ones((task.val.x - center) / scale) @ weight.transpose(1, 2)).argmax(2)  # (H, N)
        accuracy = torch.where(loss.isfinite(), (predicted == task.val.y).double().mean(1), -1)
        best = int(accuracy.argmax())  # argmax: of equals the first, of low rate and high decay
        val_top1 = float(accuracy[best])
    center, scale, weight, loss = train_on(task.both, [settings[best]])
    if not loss.isfinite():
        raise EvalError("every head diverged", f"lower learning_rates (lowest: {min(learning_rates):g})")
    head = LinearHead(center, scale, weight[0, :, :-1], weight[0, :, -1])
    predicted = head(task.test.x).argmax(1)
    top1 = (predicted == task.test.y).double().mean().item()
    return HeadResult(
        top1, val_top1, *settings[best], loss.item(), task.labels(predicted), head, task.classes
    )


def _check_sgd(
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    epochs: int,
    batch_size: int,
    momentum: float,
) -> None:
    for name, values, least in (
        ("learning_rates", learning_rates, 1e-30),
        ("weight_decays", weight_decays, 0.0),
    ):
        if not len(values) or not all(least <= value < math.inf for value in values):
            fix = f"give at least one value, all {'>' if least else '>='} 0"
            raise EvalError(f"{name} is {list(values)}", fix)
    if epochs < 1 or batch_size < 1 or not 0 <= momentum < 1:
        fix = "choose epochs >= 1, batch_size >= 1, 0 <= momentum < 1"
        raise EvalError(f"epochs is {epochs}, batch_size {batch_size}, momentum {momentum}", fix)


def train_heads(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    learning_rates: Tensor,
    weight_decays: Tensor,
    *,
    epochs: int,
    batch_size: int,
    momentum: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """H linear heads by SGD on the same batches: one matrix product forward and one backward for all of them.

    Args:
        x: (N, D) float32, standardised.
        y: (N,) int64 in 0..num_classes - 1.
        learning_rates: (H,), at the start.
        weight_decays: (H,), of the weights, not of the biases.

    Returns:
        (H, C, D + 1) weights, the bias last; (H,) mean cross-entropy (nats) of the last epoch as trained.
    """
    num_heads, x = len(learning_rates), _with_ones(x)
    generator = torch.Generator().manual_seed(seed)
    weight = x.new_zeros(num_heads, num_classes, x.shape[1])
    flat, velocity = weight.view(-1, x.shape[1]), torch.zeros_like(weight)  # (H C, D + 1), a view
    decay = weight_decays.to(x.dtype).view(-1, 1, 1).repeat(1, 1, x.shape[1])  # (H, 1, D + 1)
    decay[:, :, -1] = 0
    steps_per_epoch = -(-len(x) // batch_size)
    loss = torch.zeros(num_heads, device=x.device)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        loss.zero_()
        for step, (batch, labels) in enumerate(
            zip(x[order].split(batch_size), y[order].split(batch_size), strict=True)
        ):
            share = cosine_schedule(epoch * steps_per_epoch + step, epochs * steps_per_epoch)
            logits = (flat @ batch.T).view(num_heads, num_classes, -1)  # (H, C, B)
            label = labels.expand(num_heads, 1, -1)
            residual = logits.softmax(1)
            if epoch == epochs - 1:
                loss -= residual.gather(1, label).clamp_min(1e-38).log().sum((1, 2))
            residual.scatter_add_(1, label, residual.new_tensor(-1).expand(label.shape))
            velocity.view_as(flat).addmm_(residual.flatten(0, 1), batch, beta=momentum, alpha=1 / len(batch))
            velocity.addcmul_(decay, weight)
            weight.addcmul_(velocity, learning_rates.view(-1, 1, 1), value=-share)
    return weight, loss / len(x)


# ---- splits


def _prepare(
    train: Features,
    val: Features | None,
    test: Features,
    val_fraction: float,
    seed: int,
    dtype: torch.dtype,
    device: str | torch.device,
    *,
    split: bool,
) -> _Task:
    """Checked splits. Without `split` (nothing to choose) and `val`, train is `both`, `fit` and `val`.

    Test rows of a class that train lacks stay, with a label that no fit predicts: they count as wrong.
    """
    for name, other in (("validation", val), ("test", test)):
        if other is not None:
            check_features(other, name)
            check_splits(train, other)
            missing = sorted(set(other.y.tolist()) - set(train.y.tolist()))
            if missing and other is val:
                fix = "use more train images, or another split"
                raise EvalError(f"classes {_shorten(missing)} of the {name} split have no train images", fix)
    check_val_fraction(val_fraction)
    classes = train.y.unique()  # (C,) ascending
    if len(classes) < 2:
        raise EvalError(f"the train split has only class {classes.tolist()}", "give at least two classes")
    both = train if val is None else Features(torch.cat([train.x, val.x]), torch.cat([train.y, val.y]))
    if val is None and split:
        fit_rows, val_rows = split_rows(train.y, val_fraction, seed)
        train, val = (Features(train.x[rows], train.y[rows]) for rows in (fit_rows, val_rows))

    def on_device(part: Features) -> Features:
        return Features(part.x.to(device, dtype), number_in(classes, part.y).to(device))

    return _Task(classes, *map(on_device, (train, val or train, both, test)))


def _prepare_multi_label(
    train: Features, val: Features | None, test: Features, val_fraction: float, seed: int
) -> tuple[Features, Features, Features]:
    """What is fitted, what is chosen on, and both, checked."""
    for name, other in (("validation", val), ("test", test)):
        if other is not None:
            check_features(other, name, multi_label=True)
            check_splits(train, other, multi_label=True)
            if other.y.shape[1] != train.y.shape[1]:
                what = f"train labels have {train.y.shape[1]} classes, {name} labels {other.y.shape[1]}"
                raise EvalError(what, "label all alike")
    both = train if val is None else Features(torch.cat([train.x, val.x]), torch.cat([train.y, val.y]))
    if val is None:
        order = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(seed))
        held = min(max(round(val_fraction * len(order)), 1), len(order) - 1)
        halves = order[:held].sort().values, order[held:].sort().values
        val, train = (Features(train.x[rows], train.y[rows]) for rows in halves)
    for name, part in (("fitted", train), ("held-out", val)):
        one_sided = [
            c for c in range(part.y.shape[1]) if not ((part.y[:, c] == 1).any() and (part.y[:, c] == 0).any())
        ]
        if one_sided:
            fix = "use more train images"
            raise EvalError(f"classes {_shorten(one_sided)} are on all or on none of the {name} images", fix)
    return train, val, both


def check_val_fraction(val_fraction: float) -> None:
    if not 0 < val_fraction < 1:
        raise EvalError(f"val_fraction is {val_fraction}", "choose 0 < val_fraction < 1, e.g. 0.2")


def _sorted_grid(l2_grid: Sequence[float]) -> list[float]:
    grid = sorted(set(l2_grid))
    if not grid or not all(0 < l2 < math.inf for l2 in grid):
        raise EvalError(f"l2_grid is {list(l2_grid)}", "give at least one value, all > 0")
    return grid


def number_in(classes: Tensor, labels: Tensor) -> Tensor:
    """Place (N,) int64 of labels (N,) in classes (C,) ascending; -1, never predicted, if it has none."""
    place = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
    return torch.where(classes[place] == labels, place, -1)


def split_rows(labels: Tensor, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows (fit, held out), (K,) int64 ascending, together all of `labels` (N,), every class split alike."""
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    classes, counts = labels.unique(return_counts=True)
    alone = classes[counts < 2].tolist()
    if alone:
        fix = "give at least two of each"
        raise EvalError(f"classes {_shorten(alone)} have one train image, none can be held out", fix)
    for label, count in zip(classes, counts.tolist(), strict=True):
        rows = (labels == label).nonzero().squeeze(1)
        held = min(max(round(val_fraction * count), 1), count - 1)
        held_out[rows[torch.randperm(count, generator=generator)[:held]]] = True
    return (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)


def _standards(fitted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of the columns; infinity for constant ones, so that they become 0."""
    std, mean = torch.std_mean(fitted, dim=0, correction=0)
    # A "constant" column's std is rounding noise of its mean; dividing by it would blow up the other split.
    return mean, torch.where(std > 1e-6 * mean.abs(), std, torch.inf)


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)  # (N, D + 1): the bias is the last weight


def _shorten(classes: list[int]) -> str:
    return ", ".join(map(str, classes[:10])) + (f" and {len(classes) - 10} more" if len(classes) > 10 else "")
