"""A pruned epoch in numbers: what was kept, how even, how reliable the scores are.

The functions are pure, give 0-d tensors and do not wait for a GPU; `diagnose` and `describe_terms` read from
it. Letters: N samples, K trained on in an epoch, C classes.
"""

import math

import torch
from torch import Tensor

IDLE_EPOCHS = 8  # training on a random 70 % skips a sample that long once in 15,000 times
# a class is judged from this many expected among the kept: chance then moves its ratio by 0.14, the worst of
# 1,000 classes by 0.45
MIN_EXPECTED = 50
LEARNED_SHARE = 0.5  # of its softmax: from here on a pair, or an image's class, counts as learned
LEARNED_BELOW = -math.log(LEARNED_SHARE)  # the loss of NT-Xent and cross-entropy at that share


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of two (K,) tensors, a 0-d tensor on their device; 0 where one is constant
    or K is 0.
    """
    if len(a) == 0:
        return a.new_zeros((), dtype=torch.float32)
    places = torch.stack([ranks(a), ranks(b)])
    places = places - places.mean(1, keepdim=True)
    varies = torch.stack([a.max() > a.min(), b.max() > b.min()]).all()
    return torch.where(
        varies, (places[0] * places[1]).sum() / places.norm(dim=1).prod().clamp(min=1e-12), 0.0
    )


def ranks(values: Tensor) -> Tensor:
    """(K,) float32: how many are smaller, and half of the others that are equal. Does not wait for a GPU."""
    values = values.contiguous()
    ordered = values.sort().values
    below, up_to = (torch.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return (below + up_to - 1).float() / 2


def describe_terms(
    trained: Tensor, beta: float, standardized: bool, learned_below: float = LEARNED_BELOW
) -> dict[str, float]:
    """What decides EMP's ranking, from loss and memory (2, K) of an epoch's samples: is one drowned by the
    other? One read.

    `rank_correlation` is that of the loss with minus the memory: with the distance of the views.
    `learned_share` counts the samples with a loss below `learned_below`, which as it stands means that the
    positive (or right class) has more than half of the softmax: where it is 0, there is nothing yet that a
    loss could tell to leave out.
    """
    loss, memory = trained
    distance = torch.where(memory < torch.inf, -memory, torch.inf)
    if standardized:  # in nats: what the rule subtracts, times the loss's spread; nothing where all are alike
        distance = torch.where(distance.std() > 0, distance / distance.std() * loss.std(), 0.0)
    figures = {"loss": loss.mean(), "std_loss": loss.std(), "std_beta_memory": (beta * distance).std()}
    figures |= {
        "rank_correlation": rank_correlation(loss, distance),
        "learned_share": (loss < learned_below).float().mean(),
    }
    values = dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))
    # samples of steps that were skipped have no loss
    known = trained.isfinite().all(0) if not math.isfinite(values["loss"]) else None
    return (
        values
        if known is None or known.sum() < 2
        else describe_terms(trained[:, known], beta, standardized, learned_below)
    )


def kept_overlap(trained: Tensor, trained_before: Tensor) -> Tensor:
    """Share of the now trained that were trained the epoch before, (N,) bool x 2 -> 0-d float64.

    Two independent draws give `trained_before.mean()`, the share that was trained then.
    """
    return (trained & trained_before).sum() / trained.sum().clamp(min=1).double()


def gini(times_trained: Tensor) -> Tensor:
    """Gini coefficient of (N,) counts, 0-d float64: 0 all equal, (N - 1) / N one sample has all; 0 where all
    are 0.

    It is the mean difference of all N² pairs over twice the mean; exact in O(N log N) from the sorted values.
    """
    ordered = times_trained.sort().values.double()
    place = torch.arange(len(ordered), device=ordered.device, dtype=torch.float64)
    weight = 2 * place + 1 - len(ordered)  # (N,)
    return (weight * ordered).sum() / (len(ordered) * ordered.sum()).clamp(min=1)


def share_not_trained_for(last_trained: Tensor, epoch: int, num_epochs: int) -> Tensor:
    """Share of the samples that none of the last `num_epochs` epochs, `epoch` included, trained on, 0-d
    float64.

    Args:
        last_trained: (N,) epoch of the last training, counted from 0; -1 = never. 0 until the run is
            `num_epochs` old.
    """
    return (epoch - last_trained >= num_epochs).double().mean()


def class_balance(trained: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """How a kept set stands to the classes of the data.

    Args:
        trained: (N,) bool, at least one True.
        labels: (N,) int64 in 0 .. num_classes - 1.

    Returns:
        (C,) each class's share among the trained over its share in the data, NaN where the data has none of
        it;
        (C,) how many of it a random choice of this size would hold;
        0-d entropy of the classes among the trained over the log of the number of classes in the data, 1 =
        even
        (and for one class).
    """
    empty = torch.zeros(num_classes, dtype=torch.int64, device=labels.device)
    in_data = empty.index_add(0, labels, torch.ones_like(labels)).double()
    in_kept = empty.index_add(0, labels, trained.long()).double()
    expected = in_data * (in_kept.sum() / in_data.sum())
    share = in_kept / in_kept.sum()
    present = (in_data > 0).sum()
    entropy = -torch.special.xlogy(share, share).sum() / present.log()
    return in_kept / expected, expected, torch.where(present > 1, entropy, 1.0)


def noisy_share(trained: Tensor, is_noisy: Tensor) -> Tensor:
    """Share of the trained whose label is known to be wrong, (N,) bool x 2 -> 0-d float64."""
    return (trained & is_noisy).sum() / trained.sum().clamp(min=1).double()


def diagnose(
    epoch: int,
    *,
    times_trained: Tensor,
    last_trained: Tensor,
    last_trained_before: Tensor | None = None,
    scores: Tensor | None = None,
    scores_before: Tensor | None = None,
    fresh: Tensor | None = None,
    labels: Tensor | None = None,
    num_classes: int = 0,
    is_noisy: Tensor | None = None,
) -> dict[str, float]:
    """The figures of `epoch`, from 0, once it has trained on something; tensors (N,), read from twice.

    Args:
        times_trained, last_trained: this epoch included; last_trained -1 = never, trained now: == epoch.
        last_trained_before: as the epoch began. None where it or the one before was full: then the overlap
            says nothing.
        scores, scores_before: from each sample's last observation, as the epoch ended and as it began; +inf =
            never scored. Running means would do, but they resemble themselves.
        fresh: bool, the samples observed anew in both epochs, each time with other views. The others' scores
            agree with themselves, which would pass for reliability. Where only kept samples are observed,
            these are the high scores alone, and a narrow range lowers a correlation: at s = 0.7 one of 0.2
            shows as 0.1.
        labels, num_classes, is_noisy: int64 labels, and bool where wrong ones are known.

    Returns:
        Without those that cannot be known: `times_gini`, `times_p10`, `times_p50`, `times_p90` (deciles),
        `idle_share` (not trained for IDLE_EPOCHS epochs), `kept_overlap`, `kept_overlap_chance`,
        `score_repeat` (rank correlation of the two scores over the `score_repeat_samples` fresh ones), those
        of `class_figures`, `noisy_kept`, `noisy_data`.
    """
    trained = last_trained == epoch
    ordered, last = times_trained.sort().values, len(times_trained) - 1
    idle_share = share_not_trained_for(last_trained, epoch, IDLE_EPOCHS)
    figures = {"times_gini": gini(times_trained), "idle_share": idle_share}
    figures |= {f"times_p{percent}": ordered[round(percent / 100 * last)] for percent in (10, 50, 90)}
    if last_trained_before is not None:
        before = last_trained_before == epoch - 1
        figures |= {
            "kept_overlap": kept_overlap(trained, before),
            "kept_overlap_chance": before.double().mean(),
        }
    repeated = {}
    if scores is not None and scores_before is not None and fresh is not None:
        # waits for a GPU: its size is not known
        index = (fresh & scores.isfinite() & scores_before.isfinite()).nonzero().squeeze(1)
        repeated["score_repeat_samples"] = float(len(index))
        if len(index) > 1:
            figures["score_repeat"] = rank_correlation(scores[index], scores_before[index])
    if labels is not None:
        figures |= class_figures(trained, labels, num_classes)
    if is_noisy is not None:
        figures |= {"noisy_kept": noisy_share(trained, is_noisy), "noisy_data": is_noisy.double().mean()}
    values = torch.stack([figure.double() for figure in figures.values()]).tolist()
    known = {name: value for name, value in zip(figures, values, strict=True) if math.isfinite(value)}
    # no class is large enough: nor is there a worst one
    unknown = () if "class_ratio_min" in known else ("class_min", "class_max")
    return {name: value for name, value in known.items() if name not in unknown} | repeated


def class_figures(trained: Tensor, labels: Tensor, num_classes: int) -> dict[str, Tensor]:
    """`class_entropy`, and of the classes that are large enough to judge the least and most kept.

    `class_ratio_min`, `class_ratio_max`: share among the trained over share in the data; `class_min`,
    `class_max`: which class that is. Arguments as for `class_balance`.
    """
    ratio, expected, entropy = class_balance(trained, labels, num_classes)
    judged = expected >= MIN_EXPECTED
    lowest, least = torch.where(judged, ratio, torch.inf).min(0)
    highest, most = torch.where(judged, ratio, -torch.inf).max(0)
    return {
        "class_entropy": entropy, "class_ratio_min": lowest, "class_min": least,
        "class_ratio_max": highest, "class_max": most,
    }  # fmt: skip
