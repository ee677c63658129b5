"""Narrow networks, and the exported encoder: the same features by our loader and by timm's, and nothing half
right.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from ssl_emp import load_encoder
from ssl_emp.backbones import resolve_stem
from ssl_emp.errors import UserError
from ssl_emp.model import Encoder, SimCLR, build_encoder, save_encoder

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


def encoder(arch: str = "resnet18", width: int = 8, stem: str = "auto", size: int = 32) -> Encoder:
    torch.manual_seed(0)
    built = build_encoder(arch, width, stem, size, MEAN, STD)
    for module in built.modules():  # running statistics that matter
        if (
            isinstance(module, torch.nn.BatchNorm2d)
            and module.running_mean is not None
            and module.running_var is not None
        ):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return built.eval()


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_width_64_with_the_imagenet_stem_is_torchvisions(arch: str) -> None:
    ours = encoder(arch, 64, "imagenet", 64)
    reference = getattr(torchvision.models, arch)(weights=None)
    reference.fc = torch.nn.Identity()
    reference.load_state_dict(ours.backbone.state_dict())
    images = torch.rand(2, 3, 64, 64)
    normalised = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        assert ours(images).equal(reference.eval()(normalised))


@pytest.mark.parametrize(
    ("arch", "width", "dim"),
    [("resnet18", 8, 64), ("resnet18", 16, 128), ("resnet34", 24, 192), ("resnet50", 16, 512)],
)
def test_narrow_networks(arch: str, width: int, dim: int) -> None:
    narrow = encoder(arch, width)
    assert narrow.feature_dim == dim and narrow(torch.rand(2, 3, 32, 32)).shape == (2, dim)


def test_stem_follows_the_image_size() -> None:
    assert [resolve_stem("auto", size) for size in (28, 32, 64, 65, 224)] == ["cifar"] * 3 + ["imagenet"] * 2
    assert resolve_stem("cifar", 224) == "cifar" and resolve_stem("imagenet", 32) == "imagenet"
    activations: list[torch.Size] = []
    for stem in ("cifar", "imagenet"):
        net = encoder(stem=stem)
        net.backbone.get_submodule("layer1").register_forward_hook(
            lambda module, args, output: activations.append(output.shape)
        )
        net(torch.rand(1, 3, 32, 32))
    assert [shape[-1] for shape in activations] == [32, 8]


def test_simclr_gives_features_before_and_projections_after_the_head() -> None:
    f = encoder()
    model = SimCLR(f, 32, 16).eval()
    views = torch.randn(4, 3, 32, 32)
    h, z = model(views)
    assert h.equal(f.backbone(views)) and z.shape == (4, 16)
    torch.testing.assert_close(z, model.projector(h))


@pytest.mark.parametrize(
    ("arch", "width", "stem", "size"),
    [("resnet18", 8, "cifar", 28), ("resnet18", 64, "imagenet", 96), ("resnet50", 8, "imagenet", 64)],
)
def test_export_gives_the_same_features(tmp_path: Path, arch: str, width: int, stem: str, size: int) -> None:
    trained = encoder(arch, width, stem, size)
    save_encoder(trained, tmp_path / "encoder")
    images = torch.rand(2, 3, size, size)
    for path in (tmp_path, tmp_path / "encoder", str(tmp_path)):
        loaded = load_encoder(path)
        assert (
            loaded(images).equal(trained(images))
            and not loaded.training
            and not any(p.requires_grad for p in loaded.parameters())
        )
        assert (loaded.feature_dim, loaded.image_size) == (trained.feature_dim, size)
    assert sorted(path.name for path in (tmp_path / "encoder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_timm_loads_the_plain_stem(tmp_path: Path, arch: str) -> None:
    timm = pytest.importorskip("timm")
    trained = encoder(arch, 64, "imagenet", 96)
    save_encoder(trained, tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    data = timm.data.resolve_data_config({}, model=model)
    assert (list(data["mean"]), list(data["std"]), list(data["input_size"])) == (MEAN, STD, [3, 96, 96])
    images = torch.rand(2, 3, 96, 96)
    normalised = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(normalised), trained(images), rtol=1e-5, atol=1e-5)


def _spoil(folder: Path, how: str) -> None:
    weights, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    if how == "missing key":
        del weights["layer1.0.bn1.running_mean"]
    elif how == "extra key":
        weights["fc.weight"] = torch.zeros(3)
    elif how == "other width":
        config["ssl_emp"]["width"] = 16
    elif how == "no ssl_emp":
        del config["ssl_emp"]
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text("{" if how == "broken json" else json.dumps(config))
    if how == "truncated":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    if how == "no weights":
        (folder / "model.safetensors").unlink()


def test_a_name_that_is_too_long_is_one_line() -> None:
    with pytest.raises(UserError, match="no encoder in xxx"):
        load_encoder("x" * 5000)


@pytest.mark.parametrize(
    "how", ["missing key", "extra key", "other width", "no ssl_emp", "broken json", "truncated", "no weights"]
)
def test_a_spoilt_export_is_refused(tmp_path: Path, how: str) -> None:
    save_encoder(encoder(), tmp_path)
    _spoil(tmp_path, how)
    with pytest.raises(UserError) as error:
        load_encoder(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_loading_changes_nothing_on_disk(tmp_path: Path) -> None:
    save_encoder(encoder(), tmp_path)
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    load_encoder(tmp_path)(torch.rand(1, 3, 32, 32))
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()} == before
