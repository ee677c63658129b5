"""Wrong labels on purpose: how a pruning policy bears them is an experiment."""

import torch
from torch import Tensor

from ssl_emp.keyed import keyed_bits, keyed_uniform

WHO, WHAT = 201, 202  # first keys: apart from each other and from other uses of the same seed


def noisy_labels(labels: Tensor, num_classes: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Give exactly round(share * N) samples a label drawn uniformly from the other classes (symmetric noise).

    A function of (seed, place in the set): a larger share spoils the same samples in the same way, and more.

    Args:
        labels: (N,) int64 in 0 .. num_classes - 1.
        num_classes: at least 2.
        share: of the samples, in 0 .. 1.

    Returns:
        New labels (N,) int64, and whether each is wrong now (N,) bool; on the labels' device.
    """
    assert labels.dim() == 1 and num_classes >= 2 and 0 <= share <= 1, (labels.shape, num_classes, share)
    index = torch.arange(len(labels), device=labels.device)
    is_noisy = torch.zeros_like(labels, dtype=torch.bool)
    is_noisy[keyed_bits(WHO, seed, index).argsort(stable=True)[: round(share * len(labels))]] = True
    # 1 .. C - 1: round the circle of classes, never home
    step = 1 + (keyed_uniform(WHAT, seed, index) * (num_classes - 1)).long()
    return torch.where(is_noisy, (labels + step) % num_classes, labels), is_noisy
