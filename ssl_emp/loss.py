"""The contrastive losses NT-Xent (SimCLR) and DCL (without the positive in the denominator), one value per
sample.

Letters: B pairs, M = 2B views, P projection dimensions of one rank; A views of all ranks (A = M for one).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_emp.run.ranks import ALONE, Ranks

# similarities computed at a time: on a CPU what its caches hold, on a GPU all of 8,192 views (256 MiB)
BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}


def nt_xent(z_a: Tensor, z_b: Tensor, temperature: float, ranks: Ranks = ALONE) -> Tensor:
    """Per-sample NT-Xent: the mean of l(i, j) and l(j, i) of SimCLR's equation 1, in nats.

    Args:
        z_a, z_b: (B, P) projections of the two views of the same B samples; any float type, computed in
            float32 (float64 stays float64).
        temperature: softmax temperature, > 0, on cosine similarities.
        ranks: the processes that share the batch, with B pairs each. The views of all ranks are negatives.
            The gradient is that of the sum of all ranks' losses with respect to this rank's projections.

    Returns:
        (B,) losses. Each of the 2B views has one positive and A - 2 negatives; identical projections give
        log(A - 1). Differentiable once. Memory does not grow with B².
    """
    positive, normaliser = _positive_and_normaliser(z_a, z_b, temperature, ranks, decoupled=False)
    return _mean_of_views(normaliser) - positive


def dcl(z_a: Tensor, z_b: Tensor, temperature: float, ranks: Ranks = ALONE) -> Tensor:
    """Per-sample decoupled contrastive loss: equation 6 of arXiv 2110.06848, its mean over the two views.

    NT-Xent whose denominator holds the negatives alone, so that a view's gradient lacks the factor 1 - p, p
    being the share that its positive has in the softmax. Arguments as for `nt_xent`.

    Returns:
        (B,) losses in nats, below 0 where the positive outweighs all negatives; identical projections give
        log(A - 2). The same one matrix product a block as `nt_xent`.

    Raises:
        ValueError: one pair in all, which has no negatives.
    """
    positive, normaliser = _positive_and_normaliser(z_a, z_b, temperature, ranks, decoupled=True)
    return _mean_of_views(normaliser) - positive


def nt_xent_and_dcl(
    z_a: Tensor, z_b: Tensor, temperature: float, ranks: Ranks = ALONE
) -> tuple[Tensor, Tensor]:
    """Both losses (B,) for the price of one: NT-Xent's denominator is DCL's plus the positive.

    Arguments and errors as for `dcl`. NT-Xent is that of `nt_xent` up to rounding.
    """
    positive, normaliser = _positive_and_normaliser(z_a, z_b, temperature, ranks, decoupled=True)
    coupled = torch.logaddexp(normaliser, positive.repeat(2))  # (2B,)
    return _mean_of_views(coupled) - positive, _mean_of_views(normaliser) - positive


def _positive_and_normaliser(
    z_a: Tensor, z_b: Tensor, temperature: float, ranks: Ranks, decoupled: bool
) -> tuple[Tensor, Tensor]:
    """Scaled similarity of each pair (B,), and each view's log of the sum over the other views, of which
    `decoupled` leaves the positive out (2B,).
    """
    assert z_a.shape == z_b.shape and z_a.dim() == 2, (z_a.shape, z_b.shape)
    if decoupled and len(z_a) * ranks.world_size < 2:
        raise ValueError("dcl of a single pair has no negatives. fix: give two pairs or more")
    z = torch.cat([z_a, z_b])
    z = z if z.dtype == torch.float64 else z.float()
    norm = z.norm(dim=1, keepdim=True)  # (2B, 1)
    # (2B, P); a zero row stays zero, with gradient zero; NaN stays NaN, so that divergence is noticed
    z = torch.where(norm == 0, 0, z / norm.where(norm != 0, 1))
    half = len(z_a)
    positive = (z[:half] * z[half:]).sum(1) / temperature  # (B,)
    return positive, _LogSumExpOfOthers.apply(z, temperature, ranks, decoupled)


def _mean_of_views(values: Tensor) -> Tensor:
    """(2B,), first views first -> (B,)."""
    half = len(values) // 2
    return (values[:half] + values[half:]) / 2


def perfect_pair_share(batch_size: int, temperature: float) -> float:
    """Softmax probability of a positive with similarity 1 among 2B - 2 negatives with similarity 0.

    A pair's gradient is proportional to 1 minus this probability, so where it is small, even perfect pairs
    keep their gradient (docs/method.md).
    """
    return 1 / (1 + (2 * batch_size - 2) * math.exp(-1 / temperature))


class _LogSumExpOfOthers(torch.autograd.Function):
    """z (M, P) -> (M,): log of the sum over j != i of exp(z_i . z_j / T), j over the views of all ranks.

    `decoupled` leaves out the other view of the same sample too, j = i + B or i - B of this rank's views.
    Computed in blocks of rows, so that only a block of the (M, A) similarities s exists at a time. With p_ij
    = exp(s_ij) / sum_j exp(s_ij) and upstream gradients w, the gradient of z_i is sum_j (w_i p_ij + w_j p_ji)
    z_j / T. Because s is symmetric, the block of s_ij also gives p_ji, so one matrix product serves both
    terms, which makes up for computing s again in the backward pass. For the same reason ranks need not
    exchange gradients of z (M P numbers): the (A,) logarithms and upstream gradients suffice.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float, ranks: Ranks, decoupled: bool) -> Tensor:
        columns = (ranks.gather(z) / temperature).T.contiguous()  # (P, A)
        own = ranks.rank * len(z)  # the column of view 0
        result = z.new_empty(len(z))
        for rows in _row_blocks(z, columns):
            similarity = _similarity(z, columns, rows, own, decoupled)  # (R, A)
            highest = similarity.amax(1, keepdim=True)  # (R, 1)
            result[rows] = similarity.sub_(highest).exp_().sum(1).log_() + highest.squeeze(1)
        ctx.save_for_backward(z, columns, result)
        ctx.ranks, ctx.own, ctx.decoupled = ranks, own, decoupled
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        z, columns, result = ctx.saved_tensors
        scaled = columns.T  # (A, P), z / T
        results, upstreams = ctx.ranks.gather(result), ctx.ranks.gather(upstream)  # (A,)
        gradient = torch.empty_like(z)
        for rows in _row_blocks(z, columns):
            similarity = _similarity(z, columns, rows, ctx.own, ctx.decoupled)  # (R, A)
            # w_i p_ij
            weight = (similarity - result[rows].unsqueeze(1)).exp_().mul_(upstream[rows].unsqueeze(1))
            weight += similarity.sub_(results).exp_().mul_(upstreams)  # w_j p_ji
            with torch.autocast(z.device.type, enabled=False):
                gradient[rows] = weight @ scaled
        return gradient, None, None, None


def _row_blocks(z: Tensor, columns: Tensor) -> list[slice]:
    rows = max(1, BLOCK_ELEMENTS.get(z.device.type, BLOCK_ELEMENTS["cuda"]) // columns.shape[1])
    return [slice(start, start + rows) for start in range(0, len(z), rows)]


def _similarity(z: Tensor, columns: Tensor, rows: slice, own: int, decoupled: bool) -> Tensor:
    """(R, A) scaled similarities of a block of views to all views; -inf of a view to itself, and where
    `decoupled` to the other view of its sample.
    """
    with torch.autocast(z.device.type, enabled=False):
        similarity = z[rows] @ columns
    similarity.diagonal(own + rows.start).fill_(-torch.inf)
    if decoupled:
        view = torch.arange(rows.start, rows.start + len(similarity), device=z.device)  # (R,)
        other = own + (view + len(z) // 2) % len(z)
        similarity.scatter_(1, other.unsqueeze(1), -torch.inf)
    return similarity
