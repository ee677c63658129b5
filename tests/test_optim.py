"""LARS against a plain loop, the curves against their definition and torch's scheduler."""

import copy
import math

import pytest
import torch
import torchvision
from torch import nn

from ssl_emp.optim import (
    Lars,
    Schedule,
    auto_lr,
    auto_name,
    build_optimizer,
    gradient_norm,
    lr_at,
    one_cycle_lr,
    one_cycle_momentum,
    step_where,
)
from ssl_emp.parts import lr_scales


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()


def set_all(optimizer: torch.optim.Optimizer, name: str, value: float) -> None:
    for group in optimizer.param_groups:
        group[name] = value


def test_lars_equals_a_plain_loop() -> None:
    """You et al., Algorithm 1: local rate trust * |w| / |g + wd w|, momentum on the scaled step; none of it
    for 1-d tensors.
    """
    ours, reference = small_model(), small_model()
    optimizer = build_optimizer(ours, "lars", 0.3, 0.9, 0.01)
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    for step in range(5):
        backward(ours, step)
        backward(reference, step)
        set_all(optimizer, "lr", 0.3 / (step + 1))
        optimizer.step()
        with torch.no_grad():
            for p, v in zip(reference.parameters(), velocity, strict=True):
                assert p.grad is not None
                update = p.grad.clone()
                if p.dim() > 1:
                    update += 0.01 * p
                    update *= (
                        0.001 * math.sqrt(p.square().sum().item()) / math.sqrt(update.square().sum().item())
                    )
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


def test_what_is_no_weight_matrix_does_not_decay_and_lower_parts_learn_slower() -> None:
    """Against timm's own groups: layer-wise decay; no weight decay of tokens and position embeddings."""
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=3)
    model = nn.ModuleDict({"head": nn.Linear(192, 8)})
    model.backbone = network
    scales = {f"backbone.{name}": scale for name, scale in lr_scales(network, 0.5).items()}
    optimizer = build_optimizer(model, "adamw", 0.1, 0.9, 0.3, scales)
    Schedule(0.1, 1, ((10, 10),)).set(optimizer, 0)
    ours = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert ours.keys() == {id(p) for p in model.parameters()}
    theirs = param_groups_layer_decay(network, 0.3, network.no_weight_decay(), layer_decay=0.5)
    # theirs counts the layers of a head that is not there: all scales are those of one more
    highest = max(group["lr_scale"] for group in theirs)
    for group in theirs:
        for p in group["params"]:
            assert ours[id(p)] == (
                pytest.approx(0.1 * 0.5 * group["lr_scale"] / highest),
                group["weight_decay"],
            )
    assert ours[id(model["head"].weight)] == (0.1, 0.3) and ours[id(model["head"].bias)] == (0.1, 0.0)
    no_decay = {name for name, p in network.named_parameters() if ours[id(p)][1] == 0}
    assert {"pos_embed", "cls_token", "norm.weight", "blocks.0.mlp.fc1.bias"} <= no_decay


def test_the_gradient_norm_is_that_of_all_gradients() -> None:
    torch.manual_seed(0)
    # the last: unused
    params = [nn.Parameter(torch.randn(shape)) for shape in [(3, 4), (5,), ()]] + [
        nn.Parameter(torch.ones(2))
    ]
    torch.stack([(p.square() * torch.rand_like(p)).sum() for p in params[:3]]).sum().backward()
    squares = [float(g) ** 2 for p in params[:3] if p.grad is not None for g in p.grad.flatten()]
    assert len(squares) == 18 and float(gradient_norm(params)) == pytest.approx(
        math.sqrt(sum(squares)), rel=1e-6
    )


def test_curve() -> None:
    curve = [lr_at(step, 100, 10, 2.0) for step in range(100)]
    assert curve[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert curve[10] == 2.0
    assert curve[55] == pytest.approx(1.0)
    assert all(a > b for a, b in zip(curve[10:], curve[11:], strict=False)) and 0 < curve[-1] < 0.01
    assert lr_at(0, 5, 0, 1.0) == 1.0


@pytest.mark.parametrize("total_steps", [1, 3, 4, 5, 7, 100, 1001])
@pytest.mark.parametrize(
    "pct_start, div, final_div", [(0.3, 25.0, 1e4), (0.5, 10.0, 1.0), (0.0, 25.0, 1e4), (0.9, 2.0, 100.0)]
)
def test_one_cycle_is_torchs(total_steps: int, pct_start: float, div: float, final_div: float) -> None:
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.05, total_steps, pct_start=pct_start, div_factor=div, final_div_factor=final_div
    )
    for step in range(total_steps):
        (group,) = optimizer.param_groups
        assert one_cycle_lr(step, total_steps, 0.05, pct_start, div, final_div) == pytest.approx(
            group["lr"], rel=1e-12, abs=0
        )
        assert one_cycle_momentum(step, total_steps, pct_start) == pytest.approx(
            group["momentum"], rel=1e-12, abs=0
        )
        optimizer.step()
        if step < total_steps - 1:
            scheduler.step()


def test_one_cycle_by_its_figures() -> None:
    curve = [one_cycle_lr(step, 100, 0.05) for step in range(100)]
    assert (
        curve[0] == pytest.approx(0.002)
        and curve[29] == 0.05 == max(curve)
        and curve[99] == pytest.approx(2e-7)
    )
    assert one_cycle_lr(0, 10, 1.0, pct_start=0.1) == 1.0  # nothing rises: torch divides by zero here
    assert [one_cycle_momentum(step, 100) for step in (0, 29, 99)] == pytest.approx([0.95, 0.85, 0.95])
    for step in (-1, 100):
        with pytest.raises(AssertionError):
            one_cycle_lr(step, 100, 0.05)


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_a_momentum_that_is_set_is_used(name: str) -> None:
    """With momentum 0 from the second step on, that step forgets the first."""
    model = small_model()
    optimizer = build_optimizer(model, name, 0.1, 0.9, 0.0)
    backward(model, 0)
    optimizer.step()
    fresh = small_model()
    fresh.load_state_dict(model.state_dict())
    set_all(optimizer, "momentum", 0.0)
    for m, o in ((model, optimizer), (fresh, build_optimizer(fresh, name, 0.1, 0.0, 0.0))):
        backward(m, 1)
        o.step()
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_a_step_that_is_skipped_leaves_no_trace(name: str) -> None:
    """Steps 0 to 3 with gradients of NaN in 0 and 2, against steps 1 and 3 alone."""
    ours, reference = small_model(), small_model()
    optimizers = [build_optimizer(model, name, 0.1, 0.9, 0.01) for model in (ours, reference)]
    for step in range(4):
        backward(ours, step)
        is_bad = step % 2 == 0
        if is_bad:
            for p in ours.parameters():
                assert p.grad is not None
                p.grad.fill_(math.nan)
        step_where(optimizers[0], torch.tensor(not is_bad))
        if not is_bad:
            backward(reference, step)
            optimizers[1].step()
    for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
        assert p.equal(q)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for number, kept in states[1].items():
        assert all(kept[key].equal(states[0][number][key]) for key in kept), number


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "sgd"), ("resnet50", "sgd"), ("mobilenet_v2", "sgd"), ("efficientnet_b0", "sgd"),
        ("densenet121", "sgd"), ("vit_b_16", "adamw"), ("swin_t", "adamw"), ("convnext_tiny", "adamw"),
    ],
)  # fmt: skip
def test_the_optimizer_of_a_backbone(name: str, expected: str) -> None:
    with torch.device("meta"):
        assert auto_name(torchvision.models.get_model(name)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", "adamw"), ("convnext_atto", "adamw"), ("aimv2_large_patch14_224", "adamw"),
        ("efficientnet_lite0", "sgd"), ("resnet18", "sgd"),
    ],
)  # fmt: skip
def test_the_optimizer_of_a_backbone_of_timm(name: str, expected: str) -> None:
    """Its norms are classes of its own; aimv2 has RMS norms only."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        assert auto_name(timm.create_model(name, num_classes=0)) == expected


def test_the_rates_of_auto_are_those_measured_and_published() -> None:
    """sgd: experiments/README.md, the best of each batch; lars: SimCLR, B.1, whose 4.8 at 4,096 is both its
    linear and its square-root rule; adamw: MoCo v3's 1.5e-4 for 256.
    """
    assert [auto_lr("sgd", batch) for batch in (64, 256)] == [0.48, 0.96]
    assert auto_lr("lars", 4096) == 4.8 == 0.3 * 4096 / 256
    assert [auto_lr("adamw", batch) for batch in (256, 1024)] == [1.5e-4, 6e-4]
    assert auto_lr("sgd", 512) == 1.358, "four digits, as config.yaml shows them"
    assert auto_lr("sgd", 2) > 0 and math.isfinite(auto_lr("lars", 2**20))


@pytest.mark.parametrize("one_cycle", [False, True])
def test_the_schedule_writes_the_rates_of_a_step_into_every_group(one_cycle: bool) -> None:
    """A run of 10 steps that was made longer after 4 of them: each plan's curve over all of its steps."""
    schedule = Schedule(0.5, 3, ((4, 10), (25, 25)), one_cycle)
    optimizer = build_optimizer(small_model(), "sgd", 1.0, 0.9, 0.0)
    for step in range(25):
        total = 10 if step < 4 else 25
        schedule.set(optimizer, step)
        lr = one_cycle_lr(step, total, 0.5) if one_cycle else lr_at(step, total, 3, 0.5)
        momentum = one_cycle_momentum(step, total) if one_cycle else 0.9
        assert [(group["lr"], group["momentum"]) for group in optimizer.param_groups] == [(lr, momentum)] * 2
        assert schedule.lr(step) == lr and schedule.planned_steps(step) == total
