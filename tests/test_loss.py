"""nt_xent against a double loop typed from SimCLR's Algorithm 1, in float64."""

import math
from typing import Any

import pytest
import torch
from lightly.loss import NTXentLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_emp import loss as loss_module
from ssl_emp.loss import nt_xent, perfect_pair_share


def algorithm_1(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """SimCLR, Algorithm 1, with Python's loops and numbers: the 2N views in the order a0 b0 a1 b1 ..."""
    views = [row.tolist() for pair in zip(z_a.double(), z_b.double(), strict=True) for row in pair]

    def similarity(u: list[float], v: list[float]) -> float:
        dot = sum(x * y for x, y in zip(u, v, strict=True))
        return dot / (math.sqrt(sum(x * x for x in u)) * math.sqrt(sum(y * y for y in v)))

    def pair_loss(i: int, j: int) -> float:
        positive = math.exp(similarity(views[i], views[j]) / temperature)
        return -math.log(
            positive
            / sum(math.exp(similarity(views[i], views[k]) / temperature) for k in range(len(views)) if k != i)
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
def test_equals_algorithm_1(count: int, temperature: float) -> None:
    z_a, z_b = random_pair(count, 5, seed=count)
    torch.testing.assert_close(
        nt_xent(z_a, z_b, temperature), algorithm_1(z_a, z_b, temperature), rtol=1e-12, atol=1e-12
    )


def test_gradient() -> None:
    z_a, z_b = (z.requires_grad_() for z in random_pair(4, 3))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.5), (z_a, z_b))


def test_mean_and_gradient_equal_lightlys() -> None:
    z_a, z_b = random_pair(32, 16, dtype=torch.float32)
    ours, theirs = [[z.clone().requires_grad_() for z in (z_a, z_b)] for _ in range(2)]
    loss, expected = nt_xent(ours[0], ours[1], 0.5).mean(), NTXentLoss(temperature=0.5)(*theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    for z, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(z.grad, reference.grad, rtol=1e-5, atol=1e-7)


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


def test_is_per_sample_and_symmetric_in_the_views() -> None:
    z_a, z_b = random_pair(8, 4)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    loss = nt_xent(z_a, z_b, 0.5)
    torch.testing.assert_close(nt_xent(z_b, z_a, 0.5), loss)
    torch.testing.assert_close(nt_xent(z_a[order], z_b[order], 0.5), loss[order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 3e4])
def test_finite_in_every_dtype(dtype: torch.dtype, scale: float) -> None:
    z_a, z_b = (z.mul(scale).clamp(-6e4, 6e4).to(dtype) for z in random_pair(16, 8))
    z_a[3] = 0  # a dead projection
    z_a.requires_grad_()
    loss = nt_xent(z_a, z_b, 0.05)
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    loss.mean().backward()
    assert z_a.grad is not None and z_a.grad[3].eq(0).all()
    if scale != 1e-6:  # the true gradient goes with 1/scale, out of float16's range
        assert z_a.grad.isfinite().all()


def test_a_sick_projection_is_not_hidden() -> None:
    z_a, z_b = random_pair(4, 3)
    z_a[1, 2] = math.nan
    assert nt_xent(z_a, z_b, 0.5).isnan().any()


def test_half_precision_is_computed_in_float32() -> None:
    z_a, z_b = random_pair(16, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(z_a, z_b, 0.1)
    torch.testing.assert_close(loss.double(), algorithm_1(z_a, z_b, 0.1), rtol=1e-5, atol=1e-5)


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
def test_blocks_of_rows_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    z_a, z_b = (z.requires_grad_() for z in random_pair(13, 5))
    upstream = torch.rand(13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = nt_xent(z_a, z_b, 0.3)
    gradients = torch.autograd.grad(expected, (z_a, z_b), upstream)
    monkeypatch.setitem(loss_module.BLOCK_ELEMENTS, "cpu", block)
    loss = nt_xent(z_a, z_b, 0.3)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (z_a, z_b), upstream), gradients, rtol=1e-12, atol=1e-14
    )
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3), (z_a, z_b))


def test_memory_does_not_grow_with_the_square_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    z_a, z_b = (z.requires_grad_() for z in random_pair(500, 4, dtype=torch.float32))
    for block, expected in ((100_000, 100_000), (10**7, 1000**2)):
        monkeypatch.setitem(loss_module.BLOCK_ELEMENTS, "cpu", block)
        with LargestTensor() as largest:
            nt_xent(z_a, z_b, 0.5).mean().backward()
        assert largest.elements == expected
