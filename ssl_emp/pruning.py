"""The score of EMP (arXiv 2408.16031), the plan, the selection of the highest, the batches.

Everything here is a pure function on the device of the scores. Letters: N samples, K kept, B batch, D
features.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_emp.keyed import keyed_bits

# first key of each use of keyed randomness, so that no two uses share a draw
SHUFFLE, ROTATION = 101, 102


def feature_distance(h_a: Tensor, h_b: Tensor, memory: str = "raw") -> Tensor:
    """The memory term's distance ||f(x_i) - f(x_j)||_2 between the two views' backbone features, (B, D) x 2
    -> (B,) float32.

    `memory="normalized"` takes it between L2-normalised features (0 to 2); `raw` and `standardized` as they
    are.
    """
    h_a, h_b = h_a.float(), h_b.float()
    if memory == "normalized":
        h_a, h_b = F.normalize(h_a, dim=1), F.normalize(h_b, dim=1)
    return (h_a - h_b).square().sum(1).sqrt()


def emp_score(loss: Tensor, h_a: Tensor, h_b: Tensor, beta: float) -> Tensor:
    """EMP's score for contrastive pretraining: NT-Xent_i - beta * ||f(x_i) - f(x_j)||_2, the paper's SSL
    rule.

    Args:
        loss: (B,) per-sample NT-Xent, nats.
        h_a, h_b: (B, D) backbone features of the two views, before the projection head.
        beta: weight of the memory term, >= 0.

    Returns:
        (B,) float32; the highest are kept.
    """
    return loss.float() - beta * feature_distance(h_a, h_b)


def combine_terms(terms: Tensor, beta: float, memory: str, loss_weight: float = 1.0) -> Tensor:
    """The score of every sample from its two stored terms: loss_weight * loss - beta * memory term.

    Args:
        terms: (2, N) float32; +inf in both = never scored. Rows: the loss, and the distance of the views,
            or minus the entropy of the prediction where the objective is supervised (the paper adds it
            there).
        beta: weight of the memory term.
        memory: `standardized` first brings both terms to mean 0 and standard deviation 1 over the scored
            samples, so that beta is a ratio of influences; `raw` is `emp_score`, `normalized` differs in the
            distance only.
        loss_weight: 1 in the paper; below 0 easy samples are preferred.

    Returns:
        (N,) float32, +inf where never scored.
    """
    scored = terms[0] < torch.inf
    if memory == "standardized":
        terms = torch.stack([_standardize(row, scored) for row in terms])
    # inf - beta * inf is NaN, hence the mask, without a host round trip
    return torch.where(scored, loss_weight * terms[0] - beta * terms[1], torch.inf)


def mean_and_std(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (of a population) over the masked values, 0-d, without a host round trip."""
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, values, 0).sum() / count
    return mean, torch.where(mask, (values - mean).square(), 0).sum().div(count).sqrt()


def _standardize(values: Tensor, mask: Tensor) -> Tensor:
    """Zero mean, unit standard deviation over the masked values; a constant row becomes zeros."""
    mean, std = mean_and_std(values, mask)
    return (values - mean) / std.clamp(min=1e-12)


@dataclass(frozen=True)
class PrunePlan:
    """How many samples each epoch keeps: a pure function of the epoch, so every step is known before the
    first.

    Args:
        epochs: length of the run, T.
        prune_fraction: s, the share left out of a pruned epoch, 0 <= s < 1.
        warmup_epochs: first epochs on everything (the paper: 1).
        anneal_fraction: alpha, the share of the last epochs on everything, rounded to whole epochs.
        shorter: spend the same number of steps on full epochs, fewer of them: what pruning must beat.
        earlier: of each plan before this one, its epochs and the first epoch that is not run under it:
            what was run stays as it was.
    """

    epochs: int
    prune_fraction: float
    warmup_epochs: int = 1
    anneal_fraction: float = 0.0
    shorter: bool = False
    earlier: tuple[tuple[int, int], ...] = ()

    def at(self, epoch: int) -> "PrunePlan":
        """The plan that this epoch is run under."""
        number = sum(end <= epoch for _, end in self.earlier)
        return (
            self
            if number == len(self.earlier)
            else replace(self, epochs=self.earlier[number][0], earlier=self.earlier[:number])
        )

    def is_pruned(self, epoch: int) -> bool:
        """Whether this epoch, counted from 0, trains on a part only."""
        return not self.shorter and self._asks_less(epoch)

    def _asks_less(self, epoch: int) -> bool:
        planned = self.at(epoch).epochs
        return self.prune_fraction > 0 and self.warmup_epochs <= epoch < planned - round(
            self.anneal_fraction * planned
        )

    def kept_count(self, epoch: int, num_samples: int) -> int:
        """Samples that the paper's rule keeps in this epoch: all, or (1 - s) N rounded."""
        return round((1 - self.prune_fraction) * num_samples) if self.is_pruned(epoch) else num_samples

    def asked_share(self) -> float:
        """Samples that the run is asked to train on, over those of the same run unpruned."""
        pruned = sum(self._asks_less(epoch) for epoch in range(self.epochs))
        return 1 - self.prune_fraction * pruned / self.epochs

    def epoch_steps(self, num_samples: int, batch_size: int) -> list[int]:
        """Whole batches of every epoch that is run.

        A pruned epoch is asked for (1 - s) times the batches of a full one, which is seldom a whole number;
        what is rounded off is made up for in the epochs after, so that asked and real budget differ by half a
        batch in the whole run, not in each epoch.
        """
        full = num_samples // batch_size
        steps, owed = [], 0.0
        for epoch in range(self.epochs):
            asks_less = self._asks_less(epoch)
            owed += full * (1 - self.prune_fraction * asks_less)
            steps.append(round(owed) if asks_less else full)
            owed -= steps[-1]
        if self.shorter and full:
            return [full] * (sum(steps) // full) + [rest for rest in (sum(steps) % full,) if rest]
        return steps

    def total_steps(self, num_samples: int, batch_size: int) -> int:
        """Whole batches in the run: what the learning-rate curve is laid over."""
        return sum(self.epoch_steps(num_samples, batch_size))


def select_kept(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, (N,) -> (count,) int64, same device, no order promised.

    Never-scored samples (+inf) come first, among equals at the border the lowest indices (on the CPU). On a
    GPU nothing waits for the device: the size is known.
    """
    assert scores.dim() == 1 and 0 < count <= len(scores), (scores.shape, count)
    return _highest(scores, count)


def _highest(values: Tensor, count: int) -> Tensor:
    if values.device.type != "cpu":
        return values.topk(count, sorted=False).indices
    # topk moves pairs of value and index about: at 100 million 3.3 times the time, 2.7 times the memory
    # (benchmarks/selection.py)
    border = np.partition(values.numpy(), -count)[-count]
    kept = values > border.item()
    kept[(values == border.item()).nonzero()[: count - int(kept.sum())]] = True
    indices = kept.nonzero().squeeze(1)
    # it compares to nothing, and would shorten the epoch unnoticed
    assert len(indices) == count, "a score is NaN"
    return indices


def shuffled_batches(kept: Tensor, batch_size: int, seed: int, epoch: int) -> Tensor:
    """Cut a kept set into shuffled whole batches, (K,) int64 -> (K // batch_size, batch_size) int64, same
    device.

    A short batch has fewer negatives and would look easy, so the remainder is left out; what is left out
    moves round a fixed circle of the samples from epoch to epoch, so that over a full set nobody is left out
    twice before everybody was once. The order depends on (seed, epoch, which samples are kept) only, not on
    the order of `kept`: pruned and unpruned runs shuffle alike.
    """
    remainder = len(kept) % batch_size
    circle = kept[keyed_bits(ROTATION, seed, kept).argsort()]  # (K,)
    trained = circle.roll(-(epoch * remainder))[remainder:]
    return trained[keyed_bits(SHUFFLE, seed, epoch, trained).argsort()].view(-1, batch_size)
