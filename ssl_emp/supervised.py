"""The supervised variant of EMP (arXiv 2408.16031): a classifier and its per-sample loss.

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
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
