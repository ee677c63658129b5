"""The supervised variant of EMP (arXiv 2408.16031): a classifier, its per-sample loss, and the entropy that
stands for memory.

Letters: B images, M views, D features, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """f and a linear head: normalised views (M, 3, S, S) -> h = f(x) (M, D), logits (M, C)."""

    def __init__(self, backbone: nn.Module, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(feature_dim, num_classes)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        h = self.backbone(views)
        return h, self.head(h)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Per-sample cross-entropy against (1 - e) * one-hot + e / C, in nats.

    Args:
        logits: (B, C); any float type, computed in float32 (float64 stays float64).
        labels: (B,) int64 in 0 .. C - 1.
        label_smoothing: e, in 0 .. 1.

    Returns:
        (B,) losses.
    """
    return F.cross_entropy(_wide(logits), labels, reduction="none", label_smoothing=label_smoothing)


def prediction_entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax, (B, C) -> (B,) float32 (float64 stays float64), in nats, 0 .. log C.

    A class of logit -inf adds nothing; NaN stays NaN, so that a sick network is noticed.
    """
    log_p = _wide(logits).log_softmax(1)
    # the clamp makes 0 log 0 zero, not NaN
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(1)


def emp_supervised_score(loss: Tensor, logits: Tensor, beta: float) -> Tensor:
    """EMP's score for supervised training: L + beta * H(softmax(logits)), the paper's rule; the highest are
    kept.

    From two stored terms, loss and `prediction_entropy`, it is `terms[0] + beta * terms[1]`: plus, where the
    rule for SimCLR subtracts its distance. Entropy favours the uncertain, so a wrong label that the network
    confidently contradicts ranks lower than by its loss alone.

    Args:
        loss: (B,) per-sample loss as trained, nats.
        logits: (B, C).
        beta: weight of the memory term, >= 0; the paper's best is 5.

    Returns:
        (B,) float32.
    """
    return loss.float() + beta * prediction_entropy(logits).float()


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
