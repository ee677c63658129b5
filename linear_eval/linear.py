"""Linear probe: multinomial logistic regression on frozen, cached features, its regularisation chosen without the test split.

Protocol: Kornblith et al. 2019, Do better ImageNet models transfer better? (appendix A.2): L-BFGS, l2 from a log grid chosen on
a held-out part of the train split, then a fit on the whole train split. No augmentation, unlike the SGD probe of SimCLR.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_eval.features import EvalError, Features, check_splits

L2_GRID = tuple(10.0**exponent for exponent in range(-6, 3))
Layer = tuple[Tensor, Tensor]  # weight (C, D), bias (C,)
PATIENCE = 3  # this many falls in a row below the best end the walk along the grid: the weakest l2 take most of the time


@dataclass(frozen=True)
class LinearResult:
    """What a linear probe found.

    Attributes:
        top1: accuracy on the test split, 0..1.
        val_top1: accuracy on the held-out part of the train split at the chosen `l2`, 0..1.
        l2: the chosen weight of ||W||^2 / 2 beside the mean cross-entropy.
        train_loss: mean cross-entropy (nats) plus penalty of the final fit.
        num_steps: L-BFGS steps of the final fit; `max_iter` means it stopped before it converged.
    """

    top1: float
    val_top1: float
    l2: float
    train_loss: float
    num_steps: int


def linear_probe(
    train: Features,
    test: Features,
    *,
    seed: int,
    l2_grid: Sequence[float] = L2_GRID,
    max_iter: int = 200,
    val_fraction: float = 0.2,
    device: str | torch.device = "cpu",
) -> LinearResult:
    """Fits a linear classifier to the train features and scores it once on the test features.

    Features are standardised with the statistics of what is fitted. The only random thing is which rows are held out.

    Args:
        seed: draws the held-out part.
        l2_grid: candidates for the weight of ||W||^2 / 2 (the bias is free); equal to 1 / (C N) in scikit-learn's terms.
        max_iter: L-BFGS steps for each fit.
        val_fraction: share of every class that is held out to choose `l2`, in (0, 1); at least one row, never all.
        device: where the fits run.

    Raises:
        EvalError: features that are empty, not finite or of different width, fewer than two classes or two rows in one,
            test classes that are missing in train, a value out of range.
    """
    check_splits(train, test)
    if not l2_grid or min(l2_grid) <= 0:
        raise EvalError(f"l2_grid is {list(l2_grid)}", "give at least one value, all > 0")
    if not 0 < val_fraction < 1:
        raise EvalError(f"val_fraction is {val_fraction}", "choose 0 < val_fraction < 1, e.g. 0.2")
    classes, target = train.y.unique(return_inverse=True)  # (C,) ascending, (N,) in 0..C-1
    if len(classes) < 2:
        raise EvalError(f"the train split has only class {classes.tolist()}", "give at least two classes")
    missing = sorted(set(test.y.tolist()) - set(classes.tolist()))
    if missing:
        raise EvalError(f"classes {_shorten(missing)} of the test split have no train images", "use more train images, or another split")

    fit, val = split_rows(train.y, val_fraction, seed)
    x_fit, x_val = _standardize(train.x[fit].to(device), train.x[val].to(device))
    y_fit, y_val = target[fit].to(device), target[val].to(device)
    layer = (torch.zeros(len(classes), train.x.shape[1], device=device), torch.zeros(len(classes), device=device))
    best, num_falls = (-1.0, 0.0, layer), 0  # held-out accuracy, l2, layer
    for l2 in sorted(l2_grid, reverse=True):  # strong to weak: each fit starts from its neighbour's end
        layer, _, _ = _fit(x_fit, y_fit, layer, l2, max_iter)
        accuracy = _accuracy(layer, x_val, y_val)
        num_falls = num_falls + 1 if accuracy < best[0] else 0
        if accuracy > best[0]:  # equal: the stronger l2 stays
            best = (accuracy, l2, layer)
        if num_falls == PATIENCE:
            break
    val_top1, l2, layer = best

    x_train, x_test = _standardize(train.x.to(device), test.x.to(device))
    layer, train_loss, num_steps = _fit(x_train, target.to(device), layer, l2, max_iter)
    top1 = _accuracy(layer, x_test, torch.searchsorted(classes, test.y).to(device))
    return LinearResult(top1, val_top1, l2, train_loss, num_steps)


def split_rows(labels: Tensor, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows (fit, held out), each (K,) int64 ascending, together all of `labels` (N,); every class split alike."""
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    classes, counts = labels.unique(return_counts=True)
    alone = classes[counts < 2].tolist()
    if alone:
        raise EvalError(f"classes {_shorten(alone)} have one train image, none can be held out", "give at least two of each")
    for label, count in zip(classes, counts.tolist(), strict=True):
        rows = (labels == label).nonzero().squeeze(1)
        held = min(max(round(val_fraction * count), 1), count - 1)
        held_out[rows[torch.randperm(count, generator=generator)[:held]]] = True
    return (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)


def _standardize(fitted: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the mean and standard deviation of `fitted`; columns that are constant there become 0 in it."""
    std, mean = torch.std_mean(fitted, dim=0, correction=0)
    # A "constant" column's std is rounding noise of its mean; dividing by it would blow up the other split.
    scale = torch.where(std > 1e-6 * mean.abs(), std, torch.inf)
    return (fitted - mean) / scale, (other - mean) / scale


@torch.enable_grad()
def _fit(x: Tensor, y: Tensor, start: Layer, l2: float, max_iter: int) -> tuple[Layer, float, int]:
    """Minimises mean cross-entropy + l2 / 2 ||W||^2 from `start`; gives the layer, the loss and the steps taken."""
    # Two contiguous tensors: autograd's product for the gradient of a slice is eight times slower on the CPU.
    weight, bias = (tensor.clone().requires_grad_() for tensor in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iter, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    loss = objective().item()
    return (weight.detach(), bias.detach()), loss, optimizer.state[weight]["n_iter"]


def _accuracy(layer: Layer, x: Tensor, y: Tensor) -> float:
    return (F.linear(x, *layer).argmax(dim=1) == y).double().mean().item()


def _shorten(classes: list[int]) -> str:
    return ", ".join(map(str, classes[:10])) + (f" and {len(classes) - 10} more" if len(classes) > 10 else "")
