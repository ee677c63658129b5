"""Few labels: accuracy when only some train images are labeled, over several subsets of them.

Protocol: class-balanced subsets (as for the 1 % and 10 % of SimCLR, arXiv 2002.05709, section 4.2); every
one is scored on the whole test split; mean and sample standard deviation over the subsets. `fewshot` takes
any way of training, `fewshot_probe` is the frozen one. Letters: N labeled images at hand, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from linear_eval.features import EvalError, Features, check_splits
from linear_eval.finetune import keyed_seed
from linear_eval.linear import linear_probe

Score = Callable[[Tensor, int], float]  # train rows (K,) int64 ascending, seed -> test accuracy, 0..1

MIN_SUBSETS, NUM_SUBSETS = 3, 5
# Weight of ||W||^2 / 2 beside the mean cross-entropy where a class has one image, and none to choose it on.
# It matters little: on MNIST (features of a trained and an untrained network, pixels; 8 subsets) 1e-4 to 1
# lie within 0.3 points of each other.
FIXED_L2 = 0.1


@dataclass(frozen=True)
class FewShotResult:
    """Accuracy with few labels.

    Attributes:
        accuracies: of each subset, 0..1.
        mean, std: of the accuracies; std is the sample's (over their number - 1).
        num_labels: labeled images in each subset, `per_class` times the classes.
        per_class: labeled images of each class.
    """

    accuracies: tuple[float, ...]
    mean: float
    std: float
    num_labels: int
    per_class: int


def labels_per_class(labels: Tensor, fraction: float) -> int:
    """What a fraction (0..1) of N labels is for each of C classes: round(fraction * N / C), at least 1."""
    if not 0 < fraction <= 1:
        raise EvalError(f"fraction is {fraction}", "choose 0 < fraction <= 1, e.g. 0.01")
    return max(1, round(fraction * len(labels) / len(labels.unique())))


def balanced_subset(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Rows of exactly `per_class` images of every class, (K,) int64 ascending, drawn without replacement.

    With the same seed, a smaller subset is part of every larger one.

    Raises:
        EvalError: a class has fewer images than that; none is ever drawn twice or left out.
    """
    classes, counts = labels.cpu().unique(return_counts=True)
    if per_class < 1 or len(classes) == 0:
        fix = "choose per_class >= 1, and give labels"
        raise EvalError(f"per_class is {per_class}, there are {len(labels)} labels", fix)
    if counts.min() < per_class:
        fewest = int(counts.min())
        raise EvalError(
            f"class {int(classes[counts.argmin()])} has {fewest} train images, {per_class} of "
            "every class are asked for",
            f"choose per_class <= {fewest}, or a fraction <= {fewest * len(classes) / len(labels):.2g}",
        )
    generator = torch.Generator().manual_seed(keyed_seed(seed))
    chosen = [
        (labels.cpu() == label).nonzero().squeeze(1)[torch.randperm(count, generator=generator)[:per_class]]
        for label, count in zip(classes, counts.tolist(), strict=True)
    ]
    return torch.cat(chosen).sort().values


def fewshot(
    labels: Tensor,
    score: Score,
    *,
    seed: int,
    fraction: float | None = None,
    per_class: int | None = None,
    num_subsets: int = NUM_SUBSETS,
) -> FewShotResult:
    """Trains on several subsets of few labels.

    Args:
        labels: (N,) class ids of all train images.
        score: trains on these rows only, with this seed, and gives the accuracy on the whole test split:
            fine-tuning, a probe.
        seed: what is drawn; no subset and no seed of one depends on how many there are.
        fraction: of the labels, see `labels_per_class`; or
        per_class: this many labels of each class.
        num_subsets: >= 3.

    Raises:
        EvalError: values out of range, both or neither of `fraction` and `per_class`, a class too small.
    """
    if (fraction is None) == (per_class is None):
        raise EvalError(f"fraction is {fraction}, per_class {per_class}", "give one of the two")
    if num_subsets < MIN_SUBSETS:
        fix = f"choose num_subsets >= {MIN_SUBSETS}: one subset says little about the next"
        raise EvalError(f"num_subsets is {num_subsets}", fix)
    count = per_class if per_class is not None else labels_per_class(labels, fraction or 0.0)
    accuracies = []
    for number in range(num_subsets):
        subset_seed = keyed_seed(seed, number)
        accuracies.append(score(balanced_subset(labels, count, subset_seed), subset_seed))
    values = torch.tensor(accuracies, dtype=torch.float64)
    return FewShotResult(
        tuple(accuracies), values.mean().item(), values.std().item(), count * len(labels.unique()), count
    )


def fewshot_probe(
    train: Features,
    test: Features,
    *,
    seed: int,
    fraction: float | None = None,
    per_class: int | None = None,
    num_subsets: int = NUM_SUBSETS,
    device: str | torch.device = "cpu",
) -> FewShotResult:
    """Few labels over a frozen encoder: l2-regularised logistic regression on the features of the labeled
    images alone: `linear_probe`, or with one image a class, where nothing can be held out, `fixed_l2_probe`.

    Args:
        device: where the fits run.
        All others: as for `fewshot`.
    """
    check_splits(train, test)

    def score(rows: Tensor, subset_seed: int) -> float:
        few = Features(train.x[rows], train.y[rows])
        if len(rows) == len(few.y.unique()):
            return fixed_l2_probe(few, test, device=device)
        return linear_probe(few, test, seed=subset_seed, device=device).top1

    return fewshot(train.y, score, seed=seed, fraction=fraction, per_class=per_class, num_subsets=num_subsets)


def fixed_l2_probe(
    train: Features, test: Features, *, l2: float = FIXED_L2, device: str | torch.device = "cpu"
) -> float:
    """Test accuracy (0..1) of `linear_probe` with a given l2 beside the mean cross-entropy."""
    # linear_probe weighs l2 against the sum of cross-entropies, not their mean
    return linear_probe(
        train, test, seed=0, l2_grid=[l2 * len(train.x)], precision="float64", device=device
    ).top1
