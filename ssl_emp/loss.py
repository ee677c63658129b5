"""NT-Xent, the contrastive loss of SimCLR, one value per sample.

Letters: B pairs, P projection dimensions.
"""

import torch
from torch import Tensor


def nt_xent(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """Per-sample NT-Xent: the mean of l(i, j) and l(j, i) of SimCLR's equation 1, in nats.

    Args:
        z_a, z_b: (B, P) projections of the two views of the same B samples; any float type, computed in float32
            (float64 stays float64).
        temperature: softmax temperature, > 0, on cosine similarities.

    Returns:
        (B,) losses. Each of the 2B views has one positive and 2B - 2 negatives; identical projections give log(2B - 1).
    """
    assert z_a.shape == z_b.shape and z_a.dim() == 2, (z_a.shape, z_b.shape)
    z = torch.cat([z_a, z_b])
    z = z if z.dtype == torch.float64 else z.float()
    norm = z.norm(dim=1, keepdim=True)  # (2B, 1)
    # (2B, P); a zero row stays zero, with gradient zero; NaN stays NaN, so that a sick network is noticed
    z = torch.where(norm == 0, 0, z / norm.where(norm != 0, 1))
    with torch.autocast(z.device.type, enabled=False):
        logits = z @ z.T / temperature  # (2B, 2B)
        half = len(z_a)
        positive = (z[:half] * z[half:]).sum(1) / temperature  # (B,)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        normaliser = logits.masked_fill(itself, -torch.inf).logsumexp(1)  # (2B,)
    return (normaliser[:half] + normaliser[half:]) / 2 - positive
