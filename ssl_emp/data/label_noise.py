"""Wrong labels on purpose, to measure what a pruning policy does with them."""

import torch
from torch import Tensor

from ssl_emp.keyed import keyed_bits, keyed_uniform

WHICH_SAMPLES, WHICH_CLASS = 201, 202  # first keys, so that the two draws and other uses of a seed differ


def noisy_labels(labels: Tensor, num_classes: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Give exactly round(share * N) samples a label drawn uniformly from the other classes (symmetric noise).

    A function of (seed, index): with a larger share, the same samples get the same wrong labels, and more do.

    Args:
        labels: (N,) int64 in 0 .. num_classes - 1.
        num_classes: at least 2.
        share: of the samples, in 0 .. 1.

    Returns:
        New labels (N,) int64 and whether each is wrong (N,) bool, on the device of `labels`.
    """
    assert labels.dim() == 1 and num_classes >= 2 and 0 <= share <= 1, (labels.shape, num_classes, share)
    index = torch.arange(len(labels), device=labels.device)
    is_noisy = torch.zeros_like(labels, dtype=torch.bool)
    is_noisy[keyed_bits(WHICH_SAMPLES, seed, index).argsort(stable=True)[: round(share * len(labels))]] = True
    # uniform in 1 .. C - 1, added modulo C, so that a noisy label is never the true one
    step = 1 + (keyed_uniform(WHICH_CLASS, seed, index) * (num_classes - 1)).long()
    return torch.where(is_noisy, (labels + step) % num_classes, labels), is_noisy
