"""LARS against a plain loop, the curve against its definition."""

import copy
import math

import pytest
import torch
from torch import nn

from ssl_emp.optim import Lars, build_optimizer, lr_at, set_lr


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()


def test_lars_equals_a_plain_loop() -> None:
    """You et al., Algorithm 1: local rate trust * |w| / |g + wd w|, momentum on the scaled step; none of it for 1-d tensors."""
    ours, reference = small_model(), small_model()
    optimizer = build_optimizer(ours, "lars", 0.3, 0.9, 0.01)
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    for step in range(5):
        backward(ours, step)
        backward(reference, step)
        set_lr(optimizer, 0.3 / (step + 1))
        optimizer.step()
        with torch.no_grad():
            for p, v in zip(reference.parameters(), velocity, strict=True):
                assert p.grad is not None
                update = p.grad.clone()
                if p.dim() > 1:
                    update += 0.01 * p
                    update *= 0.001 * math.sqrt(p.square().sum().item()) / math.sqrt(update.square().sum().item())
                v.mul_(0.9).add_(update)
                p.sub_(v, alpha=0.3 / (step + 1))
        for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_lars_leaves_a_zero_tensor_a_finite_step() -> None:
    weight = nn.Parameter(torch.zeros(3, 3))
    weight.grad = torch.ones(3, 3)
    Lars([weight], lr=0.1).step()
    torch.testing.assert_close(weight.data, torch.full((3, 3), -0.1))
    untouched = nn.Parameter(torch.ones(3, 3))
    untouched.grad = torch.zeros(3, 3)
    Lars([untouched], lr=0.1).step()
    assert untouched.eq(1).all()


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_biases_and_norms_do_not_decay_and_state_survives(name: str) -> None:
    model = small_model()
    optimizer = build_optimizer(model, name, 0.1, 0.9, 0.5)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decays[id(p)] for p in model.parameters() if p.dim() == 1} == {0.0}
    assert {decays[id(p)] for p in model.parameters() if p.dim() > 1} == {0.5}
    backward(model, 0)
    optimizer.step()
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    resumed = build_optimizer(twin, name, 0.1, 0.9, 0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, resumed)):
        backward(m, 1)
        o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.equal(q)


def test_curve() -> None:
    curve = [lr_at(step, 100, 10, 2.0) for step in range(100)]
    assert curve[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert curve[10] == 2.0
    assert curve[55] == pytest.approx(1.0)
    assert all(a > b for a, b in zip(curve[10:], curve[11:], strict=False)) and 0 < curve[-1] < 0.01
    assert lr_at(0, 5, 0, 1.0) == 1.0
