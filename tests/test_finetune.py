"""Fine-tuning and the augmented probe on tiny ResNets: against plain loops, themselves interrupted, and what
must not change.
"""

import contextlib
import copy
import hashlib
import math
import os
import re
import resource
import signal
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from linear_eval import EvalError
from linear_eval.augmented import augmented_probe, probe_recipe
from linear_eval.finetune import (
    Classifier,
    Execution,
    LabelledSplits,
    Recipe,
    TrainResult,
    finetune,
    keyed_seed,
    parameter_groups,
    state_hash,
)
from linear_eval.linear import split_rows
from linear_eval.numeric import cosine_schedule

SIZE, DIM = 16, 16


class TinyResNet(ResNet):
    """A block a stage, 2 to 16 channels, with torchvision's parameter names: (B, 3, S, S) -> (B, 16)."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1])
        self.conv1, self.bn1, self.fc = nn.Conv2d(3, 2, 3, 1, 1, bias=False), nn.BatchNorm2d(2), nn.Identity()
        self.inplanes = 2
        for number in range(4):
            setattr(
                self,
                f"layer{number + 1}",
                self._make_layer(BasicBlock, 2 ** (number + 1), 1, 2 if number else 1),
            )


def tiny_encoder() -> nn.Module:
    """As loaded from disk: behind a prefix, in eval mode, without gradients."""
    torch.manual_seed(3)
    encoder = nn.Sequential()
    encoder.add_module("backbone", TinyResNet())
    encoder(torch.rand(32, 3, SIZE, SIZE))  # running statistics that are not the initial ones
    return encoder.eval().requires_grad_(False)


def stages(encoder: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names of the parameters of a ResNet behind a prefix: its stem, then its stages."""
    names = [name for name, _ in encoder.named_parameters()]
    stem = tuple(name for name in names if "layer" not in name)
    return stem, *(tuple(name for name in names if f"layer{k}." in name) for k in range(1, 5))


class Flat(nn.Module):
    """Average colours: (B, 3, S, S) -> (B, 3). Nothing to train."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def colors(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise over a red (class 7) or a blue ground (class 2): pixels, labels."""
    labels = torch.arange(num) % 2
    pixels = torch.randint(
        0, 156, (num, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    pixels[labels == 0, 0] += 100
    pixels[labels == 1, 2] += 100
    return pixels, torch.tensor([7, 2])[labels]


TRAIN, TEST = colors(48, 0), colors(20, 1)


def flips(epoch: int, index: Tensor, images: Tensor) -> Tensor:
    """Half of the images mirrored, keyed on (epoch, index)."""
    mirrored = (index * 7919 + epoch * 104729) % 5 < 2
    x = images.float() / 255
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def trained(
    how: Callable[..., TrainResult],
    encoder: nn.Module,
    dim: int,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    **given: Any,
) -> TrainResult:
    """`finetune` or `augmented_probe` with the fields of its recipe and of its execution by their names."""
    names = {part.name for part in fields(Execution)} & given.keys()
    execution = Execution(**{name: given.pop(name) for name in names})
    recipe = (probe_recipe if how is augmented_probe else Recipe)(**given)
    return how(encoder, dim, LabelledSplits(*train, *test), recipe, execution)


def tuned(encoder: nn.Module | None = None, **given: Any) -> TrainResult:
    """finetune with settings that suffice for `colors`."""
    settings: dict[str, Any] = {"views": flips, "seed": 0, "epochs": 12, "lr": 0.4, "batch_size": 16} | given
    return trained(finetune, encoder or tiny_encoder(), DIM, TRAIN, TEST, **settings)


def test_finetuning_learns_and_leaves_the_encoder_alone() -> None:
    encoder = tiny_encoder()
    before, caller = state_hash(encoder), torch.get_rng_state()
    result = tuned(encoder)
    assert result.top1 == 1.0 and result.lr == 0.4 and result.val_top1 is None and result.train_loss < 0.5
    assert state_hash(encoder) == before and not any(
        p.requires_grad or p.grad is not None for p in encoder.parameters()
    )
    assert torch.equal(torch.get_rng_state(), caller)  # and the caller's generator
    assert tuned(encoder, bf16=True, warmup_epochs=0.5, label_smoothing=0.1).top1 == 1.0


def test_one_training_equals_a_plain_loop(tmp_path: Path) -> None:
    """Weights after two epochs of three steps against a loop in which momentum, decay, schedule and stages
    are written out.
    """
    lr, decay, falloff, smoothing = 0.4, 0.01, 0.5, 0.1
    path = tmp_path / "tuned.pt"
    result = tuned(
        epochs=2,
        lr=lr,
        weight_decay=decay,
        layer_decay=falloff,
        parts=stages(tiny_encoder()),
        label_smoothing=smoothing,
        checkpoint=path,
    )

    head = nn.Linear(DIM, 2)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model = nn.Sequential(tiny_encoder().requires_grad_(True), head)
    names = [name for name, _ in model.named_parameters()]
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    target = (TRAIN[1] == 7).long()
    model.train()
    for step in range(6):
        if step % 3 == 0:
            torch.manual_seed(keyed_seed(0, step // 3))
            order, losses = torch.randperm(48), []
        index = order[16 * (step % 3) : 16 * (step % 3 + 1)]
        loss = F.cross_entropy(
            model(flips(step // 3, index, TRAIN[0][index])), target[index], label_smoothing=smoothing
        )
        grads = torch.autograd.grad(loss, list(model.parameters()))
        losses.append(loss.item())
        rate = lr * 16 / 256 * (1 + math.cos(math.pi * step / 6)) / 2
        with torch.no_grad():
            for name, p, gradient in zip(names, model.parameters(), grads, strict=True):
                height = (
                    0 if name[0] == "1" else next((5 - k for k in range(1, 5) if f"layer{k}." in name), 5)
                )
                grad = gradient + (decay if p.dim() > 1 else 0) * p
                momentum[name] = 0.9 * momentum[name] + grad
                p.sub_(rate * falloff**height * (grad + 0.9 * momentum[name]))
    saved = torch.load(path, weights_only=True)["model"]
    assert result.train_loss == pytest.approx(sum(losses) / 3, rel=1e-4)
    for (name, expected), (saved_name, value) in zip(model.state_dict().items(), saved.items(), strict=True):
        assert name.split(".")[-1] == saved_name.split(".")[-1]
        torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-4)


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Killed in every phase: choosing among two rates (3 steps an epoch, 4 epochs each), and the last
    training. With dropout.
    """
    encoder = nn.Sequential(tiny_encoder(), nn.Dropout(0.3)).eval()
    settings = {"epochs": 4, "lr": [0.02, 0.4], "val_fraction": 0.25, "batch_size": 12, "bf16": False}
    whole, broken = tmp_path / "whole.pt", tmp_path / "broken.pt"
    expected = tuned(encoder, checkpoint=whole, **settings)
    assert expected.lr in (0.02, 0.4) and expected.val_top1 is not None
    resumed_from = []
    # in the first epoch, in each trial, in the first of the second, in the last training: 12, 12, 16 steps
    for stop in (2, 8, 14, 17, 33):

        def until_stop(done: int, total: int, stop: int = stop) -> None:
            resumed_from.append(done)
            assert total == 40
            if done == stop:
                raise KeyboardInterrupt

        resumed_from.clear()
        with pytest.raises(KeyboardInterrupt):
            tuned(encoder, checkpoint=broken, progress=until_stop, **settings)
    assert resumed_from[0] == 16  # the second choice goes on after its first epoch: the step 17 was lost
    torch.manual_seed(99)  # what the caller's generator holds must not matter
    assert tuned(encoder, checkpoint=broken, **settings) == expected
    one, other = (torch.load(path, weights_only=True) for path in (whole, broken))
    assert one["fingerprint"] == other["fingerprint"]
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.pt", "whole.pt"]

    seen: list[int] = []
    assert tuned(
        checkpoint=None, epochs=1, progress=lambda done, total: seen.append(done)
    ).lr == 0.4 and seen == [1, 2, 3]
    with pytest.raises(EvalError, match="of another training.*fix: delete it"):
        tuned(encoder, checkpoint=whole, **(settings | {"seed": 1}))
    whole.write_bytes(b"not a checkpoint")
    with pytest.raises(EvalError, match="cannot read the checkpoint"):
        tuned(encoder, checkpoint=whole, **settings)


def test_layer_decay_groups_are_exact() -> None:
    model = Classifier(tiny_encoder(), DIM, 2, 1, frozen=False, bf16=False)
    parts = stages(model.encoder)
    groups = parameter_groups(model, [1.0], weight_decay=0.1, layer_decay=0.5, parts=parts)
    found = {id(p): (group["peak_lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    heights = {"conv1": 5, "bn1": 5, "layer1": 4, "layer2": 3, "layer3": 2, "layer4": 1}
    expected = {}
    for name, p in model.named_parameters():
        height = 0 if name.startswith("heads") else heights[name.split(".")[2]]
        expected[id(p)] = (0.5**height, 0.1 if p.dim() > 1 else 0.0)
    assert found == expected and sum(len(group["params"]) for group in groups) == len(expected)
    assert len(groups) == 12  # six depths, with and without decay
    assert len(parameter_groups(model, [1.0], weight_decay=0.1, layer_decay=1.0)) == 2
    for wrong, said in (
        ((), "these do not name the encoder's backbone.bn1.bias"),
        (parts[:-1], "these do not name the encoder's backbone.layer4.0.bn1.bias"),
        ((*parts, ("fc.weight",)), "these name what the encoder has not: fc.weight"),
    ):
        with pytest.raises(EvalError, match=f"layer_decay counts parts, and {said}. fix: name every"):
            parameter_groups(model, [1.0], weight_decay=0.1, layer_decay=0.5, parts=wrong)
    flat = Classifier(Flat(), 3, 2, 1, frozen=False, bf16=False)  # its head alone learns
    assert len(parameter_groups(flat, [1.0], weight_decay=0.1, layer_decay=0.5)) == 2


def test_tokens_and_positions_take_no_weight_decay() -> None:
    network = timm.create_model("test_vit", num_classes=0)
    model = Classifier(network, 64, 2, 1, frozen=False, bf16=False)
    groups = parameter_groups(model, [1.0], weight_decay=0.1, layer_decay=1.0)
    undecayed = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    names = {name for name, p in network.named_parameters() if id(p) in undecayed}
    tokens = {"cls_token", "pos_embed"}  # timm's network.no_weight_decay(), of which it has these
    assert names == {name for name, p in network.named_parameters() if p.dim() < 2} | tokens


def test_schedule_rises_and_falls() -> None:
    curve = [cosine_schedule(step, 10, 4) for step in range(10)]
    assert curve[:4] == [0.25, 0.5, 0.75, 1.0] and curve[4] == 1.0 and curve[7] == pytest.approx(0.5)
    assert curve[4:] == sorted(curve[4:], reverse=True) and 0 < curve[9] < 0.1
    assert [cosine_schedule(step, 2) for step in range(2)] == pytest.approx([1.0, 0.5])


def test_every_image_once_an_epoch_in_even_batches() -> None:
    seen: list[list[list[int]]] = [[] for _ in range(3)]

    def record(epoch: int, index: Tensor, images: Tensor) -> Tensor:
        assert torch.equal(images, TRAIN[0][index])
        seen[epoch].append(index.tolist())
        return images.float() / 255

    tuned(epochs=3, batch_size=13, views=record)
    for batches in seen:
        assert [len(batch) for batch in batches] == [12] * 4  # not 13, 13, 13, 9
        assert sorted(sum(batches, [])) == list(range(48))
    assert seen[0] != seen[1] != seen[2]


# ---- checkpoints belong to one training


def stop_after(steps: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == steps:
            raise KeyboardInterrupt

    return progress


def one_more(tensor: Tensor) -> Tensor:
    """The smallest change: one value, by one."""
    changed = tensor.clone()
    changed.view(-1)[changed.numel() // 2] += 1
    return changed


def reweighted() -> nn.Module:
    encoder = tiny_encoder()
    next(encoder.parameters()).view(-1)[0] += 1e-3
    return encoder


def with_statistics() -> nn.Module:
    encoder = tiny_encoder()
    next(iter(encoder.buffers())).view(-1)[0] += 1e-3
    return encoder


class Steeper(nn.Module):
    """Of the same weights, another network."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.backbone, self.act = tiny_encoder(), nn.LeakyReLU(slope)

    def forward(self, images: Tensor) -> Tensor:
        return self.act(self.backbone(images) - 0.5)


def darker(epoch: int, index: Tensor, images: Tensor) -> Tensor:
    return flips(epoch, index, images) * 0.9


def late(epoch: int, index: Tensor, images: Tensor) -> Tensor:
    """As `flips`, but for the last epoch."""
    return flips(epoch, index, images) if epoch < 3 else images.float() / 255


ANOTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "a train pixel": ("train images", {"train": (one_more(TRAIN[0]), TRAIN[1])}),
    "a test pixel": ("test images", {"test": (one_more(TEST[0]), TEST[1])}),
    "train images in another order": ("train images", {"train": (TRAIN[0].roll(2, 0), TRAIN[1])}),
    "a train label": ("train labels", {"train": (TRAIN[0], torch.cat([TRAIN[1][1:2], TRAIN[1][1:]]))}),
    "a test label": ("test labels", {"test": (TEST[0], torch.cat([TEST[1][1:2], TEST[1][1:]]))}),
    "fewer test images": ("test images, test labels", {"test": (TEST[0][:10], TEST[1][:10])}),
    "other class ids": ("train labels", {"train": (TRAIN[0], TRAIN[1] + 1), "test": (TEST[0], TEST[1] + 1)}),
    "other views": ("views", {"views": darker}),
    "other views in one epoch": ("views", {"views": late}),
    "views of another size": (
        "views",
        {"views": lambda epoch, index, images: flips(epoch, index, images)[:, :, 2:, 2:]},
    ),
    "weights": ("encoder", {"encoder": reweighted()}),
    "statistics": ("encoder", {"encoder": with_statistics()}),
    "seed": (
        "seed, views",
        {"seed": 1, "views": lambda epoch, index, images: flips(epoch + 1, index, images)},
    ),
    "lr": ("lr", {"lr": 0.3}),
    "epochs": ("epochs, views", {"epochs": 5}),
    "batch_size": ("batch_size", {"batch_size": 25}),
    "weight_decay": ("weight_decay", {"weight_decay": 0.01}),
    "layer_decay": ("layer_decay, parts", {"layer_decay": 0.9, "parts": stages(tiny_encoder())}),
    "label_smoothing": ("label_smoothing", {"label_smoothing": 0.2}),
    "warmup_epochs": ("warmup_epochs", {"warmup_epochs": 1}),
    "bf16": ("bf16", {"bf16": True}),
}


def of_another(**given: Any) -> TrainResult:
    """Four epochs of two steps."""
    settings: dict[str, Any] = {
        "encoder": tiny_encoder(),
        "train": TRAIN,
        "test": TEST,
        "views": flips,
        "seed": 0,
        "epochs": 4,
    }
    settings |= {"lr": 0.4, "batch_size": 24, "warn": pytest.fail} | given
    encoder, train, test = (settings.pop(part) for part in ("encoder", "train", "test"))
    return trained(finetune, encoder, DIM, train, test, **settings)


def test_a_checkpoint_belongs_to_one_training(tmp_path: Path) -> None:
    """Every other training has a file of its own, and is refused where it is given this one's, with what
    differs.
    """
    keyed, fixed = tmp_path / "tuned-{key}.pt", tmp_path / "tuned.pt"
    for path in (keyed, fixed):
        with pytest.raises(KeyboardInterrupt):
            of_another(checkpoint=path, progress=stop_after(3))
    files = set(tmp_path.glob("tuned-*.pt"))
    content = {path: path.read_bytes() for path in files}
    for name, (differs, changed) in ANOTHER.items():
        message = re.escape(f"of another training (other {differs}). fix: delete it or give another file")
        with pytest.raises(EvalError, match=message):
            of_another(checkpoint=fixed, **changed)
        with pytest.raises(KeyboardInterrupt):
            of_another(checkpoint=keyed, progress=stop_after(3), **changed)
        new = set(tmp_path.glob("tuned-*.pt")) - files
        assert len(new) == 1, name
        files |= new
    assert all(path.read_bytes() == before for path, before in content.items())


@pytest.mark.parametrize("name", ["a train pixel", "a test label", "weights"])
def test_an_interrupted_training_changes_no_other(name: str, tmp_path: Path) -> None:
    """Interrupted, then another training, then on with the first: both end as if alone."""
    keyed, (_, changed) = tmp_path / "tuned-{key}.pt", ANOTHER[name]
    with pytest.raises(KeyboardInterrupt):
        of_another(checkpoint=keyed, progress=stop_after(6))
    (left,) = tmp_path.iterdir()
    clean, other = of_another(**changed), of_another(checkpoint=keyed, **changed)
    assert other == clean and state_hash(other.classifier) == state_hash(clean.classifier)
    resumed: list[int] = []
    again, whole = (
        of_another(checkpoint=keyed, progress=lambda done, total: resumed.append(done)),
        of_another(),
    )
    assert resumed[0] == 5 and again == whole and state_hash(again.classifier) == state_hash(whole.classifier)
    assert again.checkpoint == left and {left, other.checkpoint} == set(tmp_path.iterdir())


def test_networks_of_the_same_weights_are_told_apart(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 2, "checkpoint": tmp_path / "{key}.pt"}
    first, second = (tuned(Steeper(slope).eval(), **settings) for slope in (0.1, 0.2))
    assert state_hash(Steeper(0.1)) == state_hash(Steeper(0.2)) and first.checkpoint != second.checkpoint
    assert second == tuned(Steeper(0.2).eval(), epochs=2)


def test_the_probe_has_checkpoints_of_its_own(tmp_path: Path) -> None:
    """Frozen and trained, of the same settings; other images; several rates and one."""
    encoder = nn.Sequential(nn.AvgPool2d(4), nn.Flatten()).eval()
    given: dict[str, Any] = {"views": flips, "seed": 0, "epochs": 3, "batch_size": 16, "lr": 0.5}
    turned = (TRAIN[0].flip(1), TRAIN[1])
    for train in (TRAIN, turned):
        for lr in (0.5, [0.5, 2.0]):
            settings = given | {"lr": lr}
            with pytest.raises(KeyboardInterrupt):
                trained(
                    augmented_probe,
                    encoder,
                    48,
                    train,
                    TEST,
                    checkpoint=tmp_path / "{key}.pt",
                    progress=stop_after(5),
                    **settings,
                )
    assert len(list(tmp_path.iterdir())) == 4
    for train in (TRAIN, turned):
        again = trained(augmented_probe, encoder, 48, train, TEST, checkpoint=tmp_path / "{key}.pt", **given)
        alone = trained(augmented_probe, encoder, 48, train, TEST, **given)
        assert again == alone and state_hash(again.classifier) == state_hash(alone.classifier)
    assert len(list(tmp_path.iterdir())) == 4


def damaged(kind: str, path: Path) -> None:
    """Puts something into the place of a checkpoint."""
    content = path.read_bytes()
    state = torch.load(path, weights_only=True)
    path.unlink()
    if kind == "text":
        path.write_text("no checkpoint")
    elif kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.touch()
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to one":
        path.with_name("elsewhere").write_bytes(content)
        path.symlink_to(path.with_name("elsewhere"))
    elif kind == "code":
        torch.save(state | {"model": os.getcwd}, path)
    elif kind == "compressed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(10**6))
    elif kind == "of another kind":
        torch.save([1, 2, 3], path)
    elif kind == "a trial too far":
        torch.save(state | {"number": 7}, path)
    elif kind == "an epoch too far":
        torch.save(state | {"epochs": 9}, path)
    elif kind == "a score too many":
        torch.save(state | {"scores": [0.5]}, path)
    elif kind == "weights of another shape":
        torch.save(
            state | {"model": {name: tensor[..., :1] for name, tensor in state["model"].items()}}, path
        )
    elif kind == "weights of another type":
        torch.save(
            state | {"model": {name: tensor.double() for name, tensor in state["model"].items()}}, path
        )
    elif kind == "no weights":
        torch.save(state | {"model": {}}, path)
    elif kind == "momentum of another shape":
        moved = {number: {"momentum_buffer": torch.zeros(1)} for number in state["optimizer"]["state"]}
        torch.save(state | {"optimizer": state["optimizer"] | {"state": moved}}, path)
    elif kind == "another rate":
        groups = [group | {"peak_lr": 9.0} for group in state["optimizer"]["param_groups"]]
        torch.save(state | {"optimizer": state["optimizer"] | {"param_groups": groups}}, path)
    else:
        torch.save({"weights": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    "kind",
    (
        "text|cut|empty|a folder|a pipe|a link to one|code|compressed|of another kind|other names|"
        "a trial too far|an epoch too far|a score too many|weights of another shape|"
        "weights of another type|no weights|momentum of another shape|another rate"
    ).split("|"),
)
def test_what_is_no_checkpoint_costs_no_training(kind: str, tmp_path: Path) -> None:
    said: list[str] = []
    settings: dict[str, Any] = {"lr": 0.5, "epochs": 2, "batch_size": 48}
    keyed = settings | {"checkpoint": tmp_path / "{key}.pt", "warn": said.append}
    clean = probed(Flat().eval(), 3, **settings)
    path = probed(Flat().eval(), 3, **keyed).checkpoint
    assert path is not None and said == []
    damaged(kind, path)
    assert probed(Flat().eval(), 3, **keyed) == clean
    assert said[0].startswith(f"cannot read the checkpoint {path} (") and said[0].endswith(
        "the training begins anew"
    )
    if kind == "a folder":
        assert len(said) == 2 and "cannot write the checkpoint" in said[1]
    else:
        assert (
            len(said) == 1
            and probed(Flat().eval(), 3, **keyed) == clean
            and len(said) == 1
            and not path.is_symlink()
        )


@pytest.mark.parametrize(
    "kind", ["no folder can be made", "a folder that cannot be written to", "a full disk"]
)
def test_where_no_checkpoint_can_be_written_the_training_goes_on(kind: str, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "file").write_text("in the way")
    folder = {"no folder can be made": tmp_path / "file" / "eval", "a full disk": tmp_path}.get(
        kind, Path("/proc")
    )
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        if kind == "a full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        result = probed(Flat().eval(), 3, epochs=2, lr=0.5, checkpoint=folder / "{key}.pt", warn=said.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert result == probed(Flat().eval(), 3, epochs=2, lr=0.5) and result.checkpoint is None
    assert len(said) == 1 and re.fullmatch(
        rf"cannot write the checkpoint {folder}/\w{{16}}.pt \(.+\): the training goes on, .*", said[0]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.warns(UserWarning, match="cannot write the checkpoint /proc/tuned.pt"):
        probed(Flat().eval(), 3, epochs=1, lr=0.5, checkpoint=Path("/proc/tuned.pt"))


# ---- augmented probe


def probed(encoder: nn.Module, dim: int, **given: Any) -> TrainResult:
    settings: dict[str, Any] = {"views": flips, "seed": 0, "epochs": 6, "batch_size": 16} | given
    return trained(augmented_probe, encoder, dim, TRAIN, TEST, **settings)


def test_the_probe_learns_over_a_frozen_encoder() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    # its weights could learn, its statistics could move, its dropout could make it random
    encoder = encoder.eval()
    before = hashlib.sha256(
        b"".join(tensor.numpy().tobytes() for tensor in encoder.state_dict().values())
    ).hexdigest()
    result = probed(encoder, 8)
    assert result.top1 == 1.0 and result.val_top1 == 1.0
    assert (
        hashlib.sha256(
            b"".join(tensor.numpy().tobytes() for tensor in encoder.state_dict().values())
        ).hexdigest()
        == before
    )
    assert not encoder.training and all(p.grad is None for p in encoder.parameters())


def test_the_probe_equals_gradient_descent_by_hand(tmp_path: Path) -> None:
    """Two heads trained together against each alone, in plain numbers: the softmax gradient, momentum and
    schedule written out.
    """
    target = F.one_hot((TRAIN[1] == 7).long(), 2).double()
    path = tmp_path / "probe.pt"
    for lr in (0.1, 5.0):
        result = probed(Flat().eval(), 3, lr=lr, epochs=2, batch_size=48, checkpoint=path)
        # (48, 4): raw features and a one for the bias
        x = torch.cat([TRAIN[0].double().mean((2, 3)) / 255, torch.ones(48, 1)], 1)
        weight, momentum = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
        for step in range(2):
            p = (x @ weight.T).softmax(1)
            loss = -(p.log() * target).sum(1).mean()
            gradient = (p - target).T @ x / 48
            momentum = 0.9 * momentum + gradient
            weight = weight - lr * 48 / 256 * (1 + math.cos(math.pi * step / 2)) / 2 * (
                gradient + 0.9 * momentum
            )
        saved = torch.load(path, weights_only=True)["model"]
        torch.testing.assert_close(
            torch.cat([saved["0.weight"], saved["0.bias"][:, None]], 1).double(), weight, atol=1e-5, rtol=1e-5
        )
        assert result.train_loss == pytest.approx(loss.item(), rel=1e-5)
        path.unlink()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_rate_is_chosen_as_by_hand(frozen: bool) -> None:
    """Against a training for each rate on the rows that are not held out, tested on those that are; a fifth
    of the labels is wrong.
    """
    pixels, labels = TRAIN
    labels = torch.where(torch.arange(48) % 5 == 0, 9 - labels, labels)
    # 48 numbers: enough to learn the wrong labels by heart
    coarse = nn.Sequential(nn.AvgPool2d(4), nn.Flatten()).eval()
    encoder, train, dim = (coarse, augmented_probe, 48) if frozen else (tiny_encoder(), finetune, DIM)
    lrs = (1e30, 0.05, 3.0, 0.5)

    def run(
        train_rows: Tensor, pixels_test: Tensor, labels_test: Tensor, lr: float | tuple[float, ...]
    ) -> TrainResult:
        data, test = (pixels[train_rows], labels[train_rows]), (pixels_test, labels_test)
        plain = lambda epoch, index, images: images.float() / 255  # noqa: E731
        return trained(train, encoder, dim, data, test, views=plain, seed=1, epochs=4, batch_size=16, lr=lr)

    fit, val = split_rows(labels, 0.2, 1)
    by_hand = {}
    for lr in sorted(lrs):
        with contextlib.suppress(EvalError):  # 1e30 diverges
            by_hand[lr] = run(fit, pixels[val], labels[val], lr).top1
    best = max(by_hand, key=by_hand.__getitem__)
    assert len(set(by_hand.values())) > 1  # else any choice would do
    chosen = run(torch.arange(48), *TEST, lrs)
    assert (chosen.lr, chosen.val_top1) == (best, by_hand[best])
    assert chosen == replace(run(torch.arange(48), *TEST, best), val_top1=by_hand[best])


def test_heads_trained_together_equal_heads_trained_alone(tmp_path: Path) -> None:
    """The heads as they stand when the probe has tried its rates: none feels the others, not even an absurd
    one.
    """
    encoder = nn.Sequential(nn.AvgPool2d(4), nn.Flatten()).eval()
    (pixels, labels), lrs = TRAIN, [0.1, 2.0, 1e38]
    fit, _ = split_rows(labels, 0.2, 0)

    def run(rows: Tensor, **given: Any) -> None:
        plain = lambda epoch, index, images: images.float() / 255  # noqa: E731
        trained(
            augmented_probe,
            encoder,
            48,
            (pixels[rows], labels[rows]),
            TEST,
            views=plain,
            seed=0,
            epochs=3,
            batch_size=16,
            **given,
        )

    # after the first of the two trainings: 40 and 48 images, 3 steps an epoch each
    def stop(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(torch.arange(48), lr=lrs, checkpoint=tmp_path / "together.pt", progress=stop)
    together = torch.load(tmp_path / "together.pt", weights_only=True)["model"]
    assert together["2.weight"].abs().max() > 1e30
    for number in range(2):
        run(fit, lr=lrs[number], checkpoint=tmp_path / f"{number}.pt")
        alone = torch.load(tmp_path / f"{number}.pt", weights_only=True)["model"]
        torch.testing.assert_close(together[f"{number}.weight"], alone["0.weight"], atol=1e-6, rtol=1e-4)
        assert alone["0.weight"].abs().max() > 1e-3


def test_the_probe_refuses_an_encoder_that_changes() -> None:
    with pytest.raises(EvalError, match="training mode.*eval"):
        probed(tiny_encoder().train(), DIM)

    class Counting(Flat):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def forward(self, images: Tensor) -> Tensor:
            self.seen += len(images)
            return super().forward(images)

    with pytest.raises(EvalError, match="changed while it was judged"):
        probed(Counting().eval(), 3, lr=1.0, epochs=1)


def test_state_hash_sees_every_kind_of_state() -> None:
    encoder = tiny_encoder()
    changed = [copy.deepcopy(encoder) for _ in range(4)]
    next(changed[0].parameters()).view(-1)[0] += 1e-3
    next(changed[1].buffers()).view(-1)[0] += 1
    changed[2].train()
    changed[3].register_buffer("extra", torch.zeros(1), persistent=False)
    hashes = [state_hash(module) for module in (encoder, copy.deepcopy(encoder), *changed)]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 5


# ---- mistakes


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"epochs": 0}, "epochs is 0.*>= 1"),
        ({"batch_size": 3}, "batch_size is 3"),
        ({"warmup_epochs": 12}, "warmup_epochs is 12"),
        ({"weight_decay": -1.0}, "weight_decay is -1"),
        ({"layer_decay": 0.0}, "layer_decay is 0"),
        ({"layer_decay": 1.1}, "layer_decay is 1.1"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1"),
        ({"lr": 0.0}, "lr is 0"),
        ({"lr": []}, "lr is "),
        ({"lr": [0.1, math.inf]}, "lr is .*inf"),
        ({"lr": [0.1, 0.2], "val_fraction": 1.0}, "val_fraction is 1"),
    ],
)
def test_settings_out_of_range(given: dict[str, Any], match: str) -> None:
    with pytest.raises(EvalError, match=match):
        tuned(**given)


def test_data_that_does_not_fit() -> None:
    def run(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], lr: Any = 0.1, dim: int = DIM) -> None:
        trained(finetune, tiny_encoder(), dim, train, test, views=flips, seed=0, epochs=1, lr=lr)

    pixels, labels = TRAIN
    for train, test, match in (
        ((pixels.float(), labels), TEST, "uint8"),
        ((pixels, labels[:5]), TEST, "their labels"),
        ((pixels[:0], labels[:0]), TEST, "train split is empty"),
        ((pixels, labels - 7), TEST, "24 of 48 train labels are negative"),
        ((pixels, labels * 0), TEST, "only class"),
    ):
        with pytest.raises(EvalError, match=match):
            run(train, test)
    with pytest.raises(EvalError, match="the encoder gives .*fix: make it"):
        run(TRAIN, TEST, dim=7)
    with pytest.raises(EvalError, match="one train image.*fix: give one lr"):
        run((pixels[:2], labels[:2]), TEST, lr=[0.1, 0.2])


@pytest.mark.parametrize("of_class", [0, 1])
def test_test_classes_that_train_lacks_count_as_wrong(of_class: int) -> None:
    pixels, labels = TEST
    rows = labels == labels.unique()[of_class]
    changed = torch.where(rows, 99, labels)
    given: dict[str, Any] = {"views": flips, "seed": 0, "epochs": 1, "lr": 0.1}
    everything = trained(finetune, tiny_encoder(), DIM, TRAIN, (pixels, changed), **given)
    known = trained(finetune, tiny_encoder(), DIM, TRAIN, (pixels[~rows], labels[~rows]), **given)
    assert everything.top1 == pytest.approx(known.top1 * float((~rows).double().mean()))


def test_divergence_is_an_error_but_not_as_a_candidate() -> None:
    def boom(epoch: int, index: Tensor, images: Tensor) -> Tensor:
        return flips(epoch, index, images) * (math.nan if epoch else 1)

    with pytest.raises(EvalError, match=r"diverged at lr=0.4.*fix: lower it, e.g. lr=0.04"):
        tuned(views=boom)
    result = tuned(lr=[0.4, 1e30])
    assert result.lr == 0.4 and result.top1 == 1.0
