"""The memory term of EMP (arXiv 2408.16031): what a sample's loss does not tell about how well it is
remembered.

In both of the paper's rules score = loss + beta * memory. Letters: B samples, D features, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def closeness(h_a: Tensor, h_b: Tensor, normalized: bool = False) -> Tensor:
    """Memory of a sample in contrastive pretraining: minus the distance of its two views, -||f(x_i) -
    f(x_j)||_2.

    Args:
        h_a, h_b: (B, D) backbone features of the two views, before the projection head.
        normalized: take the distance between L2-normalised features (0 to 2); the paper takes them as
            they are.

    Returns:
        (B,) float32, at most 0, detached.
    """
    h_a, h_b = h_a.detach().float(), h_b.detach().float()
    if normalized:
        h_a, h_b = F.normalize(h_a, dim=1), F.normalize(h_b, dim=1)
    return -(h_a - h_b).square().sum(1).sqrt()


def entropy(logits: Tensor) -> Tensor:
    """Memory of a sample in supervised training: the entropy of its prediction, H(softmax(logits)), in nats.

    It favours samples of which the network is unsure: a wrong label that the network confidently contradicts
    ranks lower than by its loss alone.

    Args:
        logits: (B, C), any float type; computed in float32 (float64 stays float64).

    Returns:
        (B,), 0 .. log C, detached. A class of logit -inf adds nothing; NaN stays NaN, so that a diverged
        network is noticed.
    """
    logits = logits.detach()
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(1)
    # the clamp makes 0 log 0 zero, not NaN
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(1)
