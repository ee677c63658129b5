"""The contrastive losses against double loops in float64, from SimCLR's Algorithm 1 and DCL's equation 6."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightly.loss import DCLLoss, NTXentLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_emp import loss as loss_module
from ssl_emp.loss import dcl, nt_xent, nt_xent_and_dcl, perfect_pair_share

Contrastive = Callable[[Tensor, Tensor, float], Tensor]
# each loss as it is trained on, and as it comes beside the other
COUPLED = [nt_xent, lambda *arguments: nt_xent_and_dcl(*arguments)[0]]
DECOUPLED = [dcl, lambda *arguments: nt_xent_and_dcl(*arguments)[1]]
BOTH = pytest.mark.parametrize("loss_of", [nt_xent, dcl])


def algorithm_1(z_a: Tensor, z_b: Tensor, temperature: float, decoupled: bool = False) -> Tensor:
    """SimCLR, Algorithm 1, with Python's loops and numbers: the 2N views in the order a0 b0 a1 b1 ...

    Decoupled: equation 6 of arXiv 2110.06848, whose denominator leaves out the positive as well.
    """
    views = [row.tolist() for pair in zip(z_a.double(), z_b.double(), strict=True) for row in pair]

    def similarity(u: list[float], v: list[float]) -> float:
        dot = sum(x * y for x, y in zip(u, v, strict=True))
        return dot / (math.sqrt(sum(x * x for x in u)) * math.sqrt(sum(y * y for y in v)))

    def pair_loss(i: int, j: int) -> float:
        positive = math.exp(similarity(views[i], views[j]) / temperature)
        left_out = {i, j} if decoupled else {i}
        return -math.log(
            positive
            / sum(
                math.exp(similarity(views[i], views[k]) / temperature)
                for k in range(len(views))
                if k not in left_out
            )
        )

    return torch.tensor(
        [(pair_loss(2 * k, 2 * k + 1) + pair_loss(2 * k + 1, 2 * k)) / 2 for k in range(len(z_a))],
        dtype=torch.float64,
    )


def random_pair(
    count: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z_a, z_b = (torch.randn(count, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return z_a, z_b


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("count", [2, 3, 17])
@pytest.mark.parametrize("decoupled", [False, True])
def test_equals_algorithm_1(count: int, temperature: float, decoupled: bool) -> None:
    z_a, z_b = random_pair(count, 5, seed=count)
    expected = algorithm_1(z_a, z_b, temperature, decoupled)
    for loss_of in DECOUPLED if decoupled else COUPLED:
        torch.testing.assert_close(loss_of(z_a, z_b, temperature), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("loss_of", [*COUPLED, *DECOUPLED])
def test_gradient(loss_of: Contrastive, count: int) -> None:
    z_a, z_b = (z.requires_grad_() for z in random_pair(count, 3))
    assert torch.autograd.gradcheck(lambda a, b: loss_of(a, b, 0.5), (z_a, z_b))


@pytest.mark.parametrize(("loss_of", "lightlys"), [(nt_xent, NTXentLoss), (dcl, DCLLoss)])
def test_mean_and_gradient_equal_lightlys(loss_of: Contrastive, lightlys: Any) -> None:
    """Theirs is the mean over the batch and both directions, ours its value for each sample. The negatives of
    a view are both views of all other samples.
    """
    z_a, z_b = random_pair(32, 16, dtype=torch.float32)
    ours, theirs = [[z.clone().requires_grad_() for z in (z_a, z_b)] for _ in range(2)]
    loss, expected = loss_of(ours[0], ours[1], 0.5).mean(), lightlys(temperature=0.5)(*theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    for z, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(z.grad, reference.grad, rtol=1e-5, atol=1e-7)


def test_decoupling_takes_the_factor_1_minus_p_out_of_a_samples_gradient() -> None:
    """What docs/method.md says of it, for a sample with equal views, which share one p = exp(-NT-Xent)."""
    z_a, z_b = random_pair(6, 4)
    z_b[0] = z_a[0]
    views = (z_a.requires_grad_(), z_b.requires_grad_())
    coupled, decoupled = nt_xent(*views, 0.3)[0], dcl(*views, 0.3)[0]
    share = math.exp(-coupled.item())
    assert 0.1 < share < 0.9
    pairs = [torch.autograd.grad(loss, views) for loss in (coupled, decoupled)]
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, (1 - share) * theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("count", [2, 64])
def test_identical_embeddings_without_the_positive(count: int) -> None:
    z = torch.ones(count, 8)
    torch.testing.assert_close(
        dcl(z, z, 0.1), torch.full((count,), math.log(2 * count - 2)), rtol=1e-5, atol=1e-5
    )


def test_a_single_pair_has_no_negatives() -> None:
    z_a, z_b = random_pair(1, 4)
    for loss_of in (dcl, nt_xent_and_dcl):
        with pytest.raises(ValueError, match="no negatives. fix: give two pairs"):
            loss_of(z_a, z_b, 0.5)
    assert nt_xent(z_a, z_b, 0.5).tolist() == [0.0]


class MatrixProducts(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm)
        return function(*args, **(kwargs or {}))


def test_neither_dcl_nor_both_losses_together_cost_a_matrix_product_more() -> None:
    z_a, z_b = (z.requires_grad_() for z in random_pair(8, 4))
    counts = []
    for loss_of in (nt_xent, dcl, lambda *arguments: torch.stack(nt_xent_and_dcl(*arguments))):
        with MatrixProducts() as products:
            loss_of(z_a, z_b, 0.5).sum().backward()
        counts.append(products.count)
    assert counts == [3, 3, 3]  # similarities, again in the backward pass, and the gradient


@pytest.mark.parametrize("count", [1, 2, 64])
def test_identical_embeddings_cannot_be_told_apart(count: int) -> None:
    z = torch.ones(count, 8)
    torch.testing.assert_close(
        nt_xent(z, z, 0.1), torch.full((count,), math.log(2 * count - 1)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("count", "temperature"), [(2, 0.5), (8, 0.5), (8, 0.1)])
def test_a_perfect_pair_among_unrelated_negatives_has_the_share_that_is_stated(
    count: int, temperature: float
) -> None:
    z = torch.eye(count, dtype=torch.float64)
    assert nt_xent(z, z, temperature).neg().exp().tolist() == pytest.approx(
        [perfect_pair_share(count, temperature)] * count, rel=1e-12
    )


@BOTH
def test_is_per_sample_and_symmetric_in_the_views(loss_of: Contrastive) -> None:
    z_a, z_b = random_pair(8, 4)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    loss = loss_of(z_a, z_b, 0.5)
    torch.testing.assert_close(loss_of(z_b, z_a, 0.5), loss)
    torch.testing.assert_close(loss_of(z_a[order], z_b[order], 0.5), loss[order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 3e4])
@pytest.mark.parametrize("loss_of", [*COUPLED, *DECOUPLED])
def test_finite_in_every_dtype(loss_of: Contrastive, dtype: torch.dtype, scale: float) -> None:
    z_a, z_b = (z.mul(scale).clamp(-6e4, 6e4).to(dtype) for z in random_pair(16, 8))
    z_a[3] = 0  # a dead projection
    z_a.requires_grad_()
    loss = loss_of(z_a, z_b, 0.05)
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    loss.mean().backward()
    assert z_a.grad is not None and z_a.grad[3].eq(0).all()
    if scale != 1e-6:  # the true gradient goes with 1/scale, out of float16's range
        assert z_a.grad.isfinite().all()


@BOTH
def test_a_sick_projection_is_not_hidden(loss_of: Contrastive) -> None:
    z_a, z_b = random_pair(4, 3)
    z_a[1, 2] = math.nan
    assert loss_of(z_a, z_b, 0.5).isnan().any()


@BOTH
def test_half_precision_is_computed_in_float32(loss_of: Contrastive) -> None:
    z_a, z_b = random_pair(16, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(z_a, z_b, 0.1)
    expected = algorithm_1(z_a, z_b, 0.1, decoupled=loss_of is dcl)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("block", [1, 7 * 26, 10_000])  # a row at a time, a remainder, everything at once
@BOTH
def test_blocks_of_rows_change_nothing(
    loss_of: Contrastive, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    z_a, z_b = (z.requires_grad_() for z in random_pair(13, 5))
    upstream = torch.rand(13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = loss_of(z_a, z_b, 0.3)
    gradients = torch.autograd.grad(expected, (z_a, z_b), upstream)
    monkeypatch.setitem(loss_module.BLOCK_ELEMENTS, "cpu", block)
    loss = loss_of(z_a, z_b, 0.3)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (z_a, z_b), upstream), gradients, rtol=1e-12, atol=1e-14
    )
    assert torch.autograd.gradcheck(lambda a, b: loss_of(a, b, 0.3), (z_a, z_b))


@BOTH
def test_memory_does_not_grow_with_the_square_of_the_batch(
    loss_of: Contrastive, monkeypatch: pytest.MonkeyPatch
) -> None:
    z_a, z_b = (z.requires_grad_() for z in random_pair(500, 4, dtype=torch.float32))
    for block, expected in ((100_000, 100_000), (10**7, 1000**2)):
        monkeypatch.setitem(loss_module.BLOCK_ELEMENTS, "cpu", block)
        with LargestTensor() as largest:
            loss_of(z_a, z_b, 0.5).mean().backward()
        assert largest.elements == expected
