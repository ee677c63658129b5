"""A backbone as parts: against timm's own grouping, of torchvision's networks by name; freezing; rates."""

import copy

import pytest
import timm
import torch
import torchvision
from timm.optim import param_groups_layer_decay
from torch import nn

from ssl_emp.backbones import WidthResNet, make_torchvision
from ssl_emp.parts import _by_order, freeze, lr_scales, parts

TIMM = ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "regnety_002", "deit_tiny_distilled_patch16_224"]


def names(network: nn.Module) -> list[str]:
    return [part.name for part in parts(network)]


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("resnet18", ["conv1", "layer1", "layer2", "layer3", "layer4"]),
        ("convnext_tiny", ["features.0", "features.1", "features.2", "features.4", "features.6"]),
        ("mobilenet_v2", [f"features.{number}" for number in range(19)]),
        ("efficientnet_b0", [f"features.{number}" for number in range(9)]),
        ("vit_b_32", ["conv_proj", *(f"encoder.layers.encoder_layer_{number}" for number in range(12))]),
        ("swin_t", ["features.0", "features.1", "features.2", "features.4", "features.6"]),
    ],
)
def test_parts_of_torchvision(arch: str, expected: list[str]) -> None:
    """Stages or blocks; a norm or a token that stands alone belongs to the part beside it."""
    network = make_torchvision(arch, {})
    found = parts(network)
    assert [part.name for part in found] == expected
    own = [name for part in found for name in part.parameters]
    assert sorted(own) == sorted(name for name, _ in network.named_parameters())
    if arch == "vit_b_32":
        assert {"class_token", "encoder.pos_embedding"} < set(found[0].parameters)
        assert "encoder.ln.weight" in found[-1].parameters


@pytest.mark.parametrize("arch", TIMM)
def test_order_says_what_timm_says(arch: str) -> None:
    """The rule for networks that say nothing, on some that do."""
    network = timm.create_model(arch, num_classes=0)
    theirs = [set(part.parameters) for part in parts(network)]
    ours = [set(found) for _, found in _by_order(network)]
    if len(ours) > len(theirs):  # a last norm
        ours[-2:] = [ours[-2] | ours[-1]]
    assert ours == theirs


def test_other_networks() -> None:
    assert names(WidthResNet("resnet18", 8, "cifar")) == ["conv1", "layer1", "layer2", "layer3", "layer4"]
    cut = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
    assert names(cut) == ["0", "4", "5", "6", "7"]
    assert names(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3))) == ["1", "3"]
    wrapped = nn.Sequential(timm.create_model("test_vit", num_classes=0))
    assert names(wrapped) == [f"0.{name}" for name in names(wrapped[0])]
    with pytest.raises(ValueError, match="no parameters"):
        parts(nn.Flatten())


def test_frozen_parts_take_no_gradient_and_keep_their_statistics() -> None:
    network = WidthResNet("resnet18", 8, "cifar").train()
    frozen = freeze(network, 2)
    assert [part.name for part in frozen] == ["conv1", "layer1"]
    before = copy.deepcopy(network.state_dict())
    for module in (network, copy.deepcopy(network)):  # a copy keeps them too
        module.eval()
        module.train()
        module(torch.randn(4, 3, 16, 16)).square().sum().backward()
        for name, parameter in module.named_parameters():
            is_frozen = name.startswith(("conv1", "bn1", "layer1"))
            assert (parameter.grad is None) is is_frozen, name
        for name, buffer in module.named_buffers():
            assert buffer.equal(before[name]) is name.startswith(("bn1", "layer1")), name


def test_a_frozen_whole_is_refused() -> None:
    network = WidthResNet("resnet18", 8, "cifar")
    with pytest.raises(ValueError, match=r"has 5 parts \(conv1, .*\), and 5 of them would not train"):
        freeze(network, 5)
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "test_vit"])
def test_rates_fall_as_in_beit(arch: str) -> None:
    """timm's own groups of the network with its head, whose rate is the full one."""
    network = timm.create_model(arch, num_classes=3)
    theirs: dict[str, float] = {}
    by_number = {id(parameter): name for name, parameter in network.named_parameters()}
    for group in param_groups_layer_decay(network, layer_decay=0.7):
        theirs |= {by_number[id(parameter)]: group["lr_scale"] for parameter in group["params"]}
    ours = lr_scales(timm.create_model(arch, num_classes=0), 0.7)
    assert ours == pytest.approx({name: theirs[name] for name in ours})
