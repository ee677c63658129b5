"""The network f and g of SimCLR (arXiv 2002.05709): a torchvision ResNet and lightly's projection head.

Letters: B images, D features, P projections.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from ssl_emp.config import Section
from ssl_emp.data.decode import MAX_PIXELS, decode_any, pillow_limits, reason
from ssl_emp.errors import UserError
from ssl_emp.safe_files import check_regular, read_json, write_atomically
from ssl_emp.text import quoted

# name -> (block, number of blocks in each stage)
ARCHS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}
FULL_WIDTH = 64  # channels of the first stage in the published ResNets
ROUNDING = 1e-3  # allowed beyond [0, 1]: rounding errors of resizing; no mistake of scaling is that small
SMALL_IMAGE = 64  # up to this many pixels a side, the "auto" stem keeps the resolution (SimCLR, appendix B.9)
FLOATS = ("F16", "BF16", "F32", "F64")  # names of types in safetensors
LARGEST_WEIGHTS = 1 << 36  # bytes; the largest network that a config allows has 6 GiB


class _Spec(Section):
    """The description of the network in an encoder's config.json, with the limits of a run's config."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)

    arch: Literal["resnet18", "resnet34", "resnet50"]
    width: Annotated[int, Field(ge=1, le=512)]
    stem: Literal["auto", "cifar", "imagenet"]
    image_size: Annotated[int, Field(ge=1, le=4096)]
    mean: Annotated[list[Annotated[float, Field(ge=-1000, le=1000)]], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0, le=1000)]], Field(min_length=3, max_length=3)]


class WidthResNet(ResNet):
    """torchvision's ResNet with `width` channels in the first stage instead of 64; same parameter names."""

    def __init__(self, arch: str, width: int, stem: str) -> None:
        self.width = width
        block, layers = ARCHS[arch]
        super().__init__(block, layers)
        kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding=kernel // 2, bias=False)
        # as torchvision's ResNet initialises its own
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)
        if stem == "cifar":
            self.maxpool = nn.Identity()
        self.feature_dim = 512 * block.expansion * width // FULL_WIDTH
        self.fc = nn.Identity()  # forward ends at the pooled features

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        if planes == FULL_WIDTH:
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // FULL_WIDTH, blocks, stride, dilate)


def resolve_stem(stem: str, image_size: int) -> str:
    """`auto` -> `cifar` (3x3, stride 1, no max-pooling) up to 64 px, else `imagenet` (7x7, stride 2)."""
    return ("cifar" if image_size <= SMALL_IMAGE else "imagenet") if stem == "auto" else stem


OneImage = str | os.PathLike[str] | Image.Image | np.ndarray


class Encoder(nn.Module):
    """f with its input normalisation: images (B, 3, H, W) float in [0, 1] -> features (B, D) float32.

    Raises TypeError for anything but a tensor of floats (bytes of 0 to 255 would give meaningless features)
    and ValueError for another shape. With `checks_range`, values beyond [0, 1] are a ValueError too; that
    check is cheap beside the forward pass, but on a GPU it waits for the images. Training and evaluation,
    whose images are bytes divided by 255, go without it. Nothing is checked while the network is compiled,
    exported, traced or captured.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        image_size: int,
        mean: list[float],
        std: list[float],
        spec: dict[str, Any],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_dim = feature_dim
        self.image_size = image_size
        self.spec = spec  # arch, width, stem: what builds this network again
        self.checks_range = False
        # not part of the state: config.json has mean and std
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.checks_range)
        return self.backbone((images.to(self.mean.dtype) - self.mean) / self.std).float()

    def preprocess(self, images: OneImage | Sequence[OneImage], *, max_pixels: int = MAX_PIXELS) -> Tensor:
        """Images as input of `forward`, with exactly the pixels that evaluate.py uses.

        EXIF rotation, then the short side scaled to `image_size` S (bicubic, antialiased), a centre crop.

        Args:
            images: a file, a PIL image, (H, W), (H, W, 3) or (H, W, 4) uint8 pixels; or a list of them. A
                PIL image that is not decoded yet is decoded like its file. A decoded one can differ by about
                one level of 255, because a large JPEG file is reduced while it is decoded.
            max_pixels: files that declare more are refused.

        Returns:
            (3, S, S) float32 in [0, 1] on the CPU, or (B, 3, S, S) for a list.

        Raises:
            UserError: a file that cannot be read as an image.
            TypeError, ValueError: neither a file nor an image, or no image at all.
        """
        return preprocess(images, self.image_size, max_pixels)


def preprocess(
    images: OneImage | Sequence[OneImage], image_size: int, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """See `Encoder.preprocess`."""
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        if not len(images):
            raise ValueError("there are no images. fix: give at least one")
        return torch.stack([preprocess(image, image_size, max_pixels) for image in images])
    if isinstance(images, np.ndarray):
        shape = images.shape
        is_image = len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))
        if images.dtype != np.uint8 or not is_image or not images.size:
            fix = "give (H, W, 3) uint8 of one image, or a list of them"
            raise ValueError(f"pixels are {shape} {images.dtype}. fix: {fix}")
    elif not isinstance(images, str | os.PathLike | Image.Image):
        fix = "give a path, a PIL image, or (H, W, 3) uint8 pixels"
        raise TypeError(f"an image is of type {type(images).__name__}. fix: {fix}")
    image = os.path.expanduser(os.fspath(images)) if isinstance(images, str | os.PathLike) else images
    try:
        with pillow_limits(max_pixels):
            pixels = decode_any(image, image_size, max_pixels)
    except Exception as error:  # Pillow raises a dozen types
        name = image if isinstance(image, str) else "the image"
        fix = "give a file that holds an image"
        raise UserError(f"{name} cannot be read ({reason(error)})", fix) from error
    return torch.from_numpy(pixels.copy()).float() / 255


def check_images(images: Tensor, check_range: bool) -> None:
    """Raise TypeError or ValueError unless images are (B, 3, H, W) floats, in [0, 1] if asked for."""
    if not torch.jit.is_tracing():
        _check_images(images)
        if check_range and not torch.compiler.is_compiling() and images.numel():
            _check_range(images)


def _check_images(images: Tensor) -> None:
    """Raise TypeError or ValueError unless images are (B, 3, H, W) floats; reads no value."""
    if not isinstance(images, Tensor):
        fix = "give a tensor; encoder.preprocess(image or path) makes one"
        raise TypeError(f"images are of type {type(images).__name__}. fix: {fix}")
    if not images.is_floating_point():
        fix = "give floats in [0, 1], such as images.float() / 255, or encoder.preprocess(image or path)"
        raise TypeError(f"images are {str(images.dtype).removeprefix('torch.')}. fix: {fix}")
    if images.ndim == 4 and images.shape[1] == 3:
        return
    fix = "give (B, 3, H, W)"
    if images.ndim == 3:
        fix += ", such as images[None] for one image"
    elif images.ndim == 4 and images.shape[3] == 3:
        fix += ", such as images.permute(0, 3, 1, 2)"
    elif images.ndim == 4 and images.shape[1] == 1:
        fix += ", such as images.expand(-1, 3, -1, -1) for grey ones"
    elif images.ndim == 4 and images.shape[1] == 4:
        fix += ", such as images[:, :3]: the fourth channel is none of colour"
    raise ValueError(f"images are {tuple(images.shape)}. fix: {fix}")


def _check_range(images: Tensor) -> None:
    """Raise ValueError unless all values are in [0, 1], up to rounding. Waits for the device."""
    if images.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    low, high = torch.stack(images.detach().aminmax()).tolist()
    slack = max(ROUNDING, 2 * torch.finfo(images.dtype).eps)
    if -slack <= low and high <= 1 + slack:  # false for nan
        return
    fix = "leave out Normalize: the encoder normalises by itself"
    if not (math.isfinite(low) and math.isfinite(high)):
        fix = "look for what made values that are no numbers"
    elif -0.5 <= low and high <= 1.5:
        fix = "images.clamp(0, 1): resizing by cubic curves goes beyond the values that there were"
    elif -slack <= low:
        fix = "divide by 255, or by the largest value that there can be"
    raise ValueError(f"images lie in [{low:.4g}, {high:.4g}], not in [0, 1]. fix: {fix}")


def build_encoder(
    arch: str, width: int, stem: str, image_size: int, mean: list[float], std: list[float]
) -> Encoder:
    """An untrained encoder, initialised from torch's global generator.

    Args:
        arch: `resnet18`, `resnet34` or `resnet50`.
        width: channels of the first stage; 64 is the published network, a multiple of 8 otherwise.
        stem: `auto`, `cifar` or `imagenet`, see `resolve_stem`.
        image_size: pixels a side that the encoder is trained on.
        mean, std: three numbers each, of images in [0, 1].
    """
    stem = resolve_stem(stem, image_size)
    backbone = WidthResNet(arch, width, stem)
    spec = {"arch": arch, "width": width, "stem": stem}
    return Encoder(backbone, backbone.feature_dim, image_size, list(mean), list(std), spec)


class SimCLR(nn.Module):
    """f and g: normalised views (M, 3, S, S) -> h = f(x) (M, D), z = g(h) (M, P), neither L2-normalised."""

    def __init__(self, encoder: Encoder, projection_hidden: int, projection_dim: int) -> None:
        # imported here: it takes seconds, and loading an encoder does not need it
        from lightly.models.modules.heads import SimCLRProjectionHead

        super().__init__()
        self.backbone = encoder.backbone
        self.projector = SimCLRProjectionHead(encoder.feature_dim, projection_hidden, projection_dim)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        h = self.backbone(views)
        return h, self.projector(h)


def save_encoder(encoder: Encoder, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`, each through a temporary file, in timm's local-dir layout.

    Where the network is the published one (width 64, ImageNet stem), `timm.create_model("local-dir:FOLDER",
    pretrained=True)` gives the same features; the key `ssl_emp` is for `load_encoder` of all others.
    """
    folder.mkdir(exist_ok=True)
    # six digits: 0.485 as float32 and back is 0.485, not 0.48500001430511475
    mean, std = (
        [round(value, 6) for value in stat.flatten().tolist()] for stat in (encoder.mean, encoder.std)
    )
    size = encoder.image_size
    config = {
        "architecture": encoder.spec["arch"],
        "num_classes": 0,
        "num_features": encoder.feature_dim,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": mean,
            "std": std,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "conv1",
            "classifier": "fc",
        },
        "ssl_emp": {**encoder.spec, "image_size": size, "mean": mean, "std": std},
    }
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in encoder.backbone.state_dict().items()
    }
    # safetensors' save_file would neither sync the file nor raise OSError on a full disk
    write_atomically(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def load_encoder(path: str | os.PathLike[str], *, check_range: bool = True) -> Encoder:
    """The frozen encoder of a run directory or an encoder directory, in eval mode on the CPU.

    Args:
        path: a run directory (`RUN/encoder` is read) or a directory with `model.safetensors` and
            `config.json`.
        check_range: refuse values beyond [0, 1]. On a GPU each call then waits for its images; where they
            are known to be right, False saves that.

    Returns:
        A module: images (B, 3, H, W) float in [0, 1] -> (B, D) float32 features. It normalises its input; its
        `preprocess` makes such images from files, PIL images and pixels.

    Raises:
        UserError: files missing or unreadable, or weights that do not match the network key by key.
    """
    folder = Path(os.path.expanduser(path))
    fix = "give a run directory or an encoder directory that pretrain.py wrote"
    if (folder / "config.yaml").is_file():
        fix = f"write it again from the run's last checkpoint: python pretrain.py --resume {quoted(folder)}"
    folder = folder / "encoder" if (folder / "encoder").is_dir() else folder
    spec, found = _read_headers(folder, fix)
    # on the meta device nothing is allocated, whatever size config.json claims
    with torch.device("meta"):
        expected = build_encoder(**spec).backbone.state_dict()
    shapes = {name: (tuple(x.shape), x.is_floating_point()) for name, x in expected.items()}
    differing = sorted(set(shapes) ^ set(found)) or sorted(
        name for name, (shape, kind) in found.items() if shapes[name] != (shape, kind in FLOATS)
    )
    if differing:
        network = f"{spec['arch']} of width {spec['width']}"
        raise UserError(
            f"the weights in {folder} do not fit {network}, first at {differing[0]}",
            fix if fix.startswith("write") else "give the config.json that was written with these weights",
        )
    encoder = build_encoder(**spec)
    encoder.backbone.load_state_dict(load_file(folder / "model.safetensors"))
    encoder.checks_range = check_range
    return encoder.eval().requires_grad_(False)


def _read_headers(folder: Path, fix: str) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], str]]]:
    """(arguments of `build_encoder`, weight -> shape and type) of a directory. Raises UserError."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"no encoder in {folder}: {name} is missing", fix)
    try:
        spec = _Spec.model_validate(read_json(folder / "config.json")["ssl_emp"]).model_dump()
        check_regular(folder / "model.safetensors", LARGEST_WEIGHTS)
        # reads the header and compares it with the size of the file
        with safe_open(folder / "model.safetensors", "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        what = f"{folder / 'config.json'} is damaged (ssl_emp.{key}: {first['msg']})"
        raise UserError(what, fix) from error
    except UserError:
        raise
    # json, safetensors and key errors have no common base class; each means a damaged export
    except Exception as error:
        what = f"the encoder in {folder} cannot be read ({type(error).__name__}: {error})"
        raise UserError(what, fix) from error
    return spec, found
